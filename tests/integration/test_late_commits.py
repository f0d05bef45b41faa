"""The transactions, older than the rotation, that it waits for."""

import psycopg
import pytest
from psycopg import sql

from rotator.postgres.activity import holders
from rotator.postgres.fence import Lease
from rotator.postgres.rotations import read_state
from tests.integration.rotation_tables import (
    COMMITTING,
    INSERT,
    SCHEMA,
    TICKETS,
    UPDATE,
    Database,
    begin,
    execute_all,
)

pytestmark = COMMITTING

WRITE_ELSEWHERE = sql.SQL("INSERT INTO {} DEFAULT VALUES").format(sql.Identifier(SCHEMA, "else")).as_string()


@pytest.fixture
def other(database: Database) -> psycopg.Connection:
    """A transaction of an application, begun before any rotation."""
    database.make_tickets(1, 20)
    database.execute(
        sql.SQL("CREATE TABLE {} (id int GENERATED ALWAYS AS IDENTITY)").format(
            sql.Identifier(SCHEMA, "else")
        )
    )
    opened = database.connect(application_name="shop")
    opened.execute("BEGIN")
    return opened


@pytest.mark.parametrize(
    "statements",
    [
        [UPDATE],
        [INSERT],
        ["DELETE FROM tickets_ticket WHERE id = 3"],
        ["SAVEPOINT here", UPDATE],
        ["SAVEPOINT here", UPDATE, "RELEASE here", "SAVEPOINT there", INSERT],
        [UPDATE, "SAVEPOINT here", INSERT, "ROLLBACK TO here"],
        [WRITE_ELSEWHERE, UPDATE],
    ],
)
async def test_a_transaction_that_wrote_before_the_start_is_named_until_it_is_over(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection, statements: list[str]
) -> None:
    execute_all(other, *statements)
    owned = await read_state(control, await begin(control))
    (named,) = await holders(control, TICKETS, owned.started_xid)
    user = database.execute("SELECT current_user")[0][0]
    assert named.startswith(f"pid {other.info.backend_pid}, user {user}, application shop, since ")
    other.execute("COMMIT")
    assert await holders(control, TICKETS, owned.started_xid) == ()


@pytest.mark.parametrize(
    "statements",
    [
        [],
        ["SELECT count(*) FROM tickets_ticket"],
        ["SELECT FROM tickets_ticket WHERE id = 3 FOR UPDATE"],
        [WRITE_ELSEWHERE],
        [WRITE_ELSEWHERE, "SELECT count(*) FROM tickets_ticket"],
        [WRITE_ELSEWHERE, "SAVEPOINT here", UPDATE, "ROLLBACK TO here"],
    ],
)
async def test_a_transaction_without_writes_to_the_target_delays_nothing(
    control: psycopg.AsyncConnection, other: psycopg.Connection, statements: list[str]
) -> None:
    execute_all(other, *statements)
    owned = await read_state(control, await begin(control))
    assert await holders(control, TICKETS, owned.started_xid) == ()


async def test_a_transaction_that_wrote_after_the_start_is_not_waited_for(
    control: psycopg.AsyncConnection, other: psycopg.Connection, lease: Lease
) -> None:
    execute_all(other, UPDATE)
    owned = await read_state(control, lease)
    assert await holders(control, TICKETS, owned.started_xid) == ()


async def test_all_of_them_are_named(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    execute_all(other, UPDATE)
    third = database.connect(application_name="")
    execute_all(third, "BEGIN", INSERT)
    owned = await read_state(control, await begin(control))
    named = await holders(control, TICKETS, owned.started_xid)
    assert {phrase.split(",")[0] for phrase in named} == {
        f"pid {connection.info.backend_pid}" for connection in (other, third)
    }
    assert "application" not in next(phrase for phrase in named if "shop" not in phrase)


async def test_a_prepared_transaction_is_named_by_its_id(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    ((allowed,),) = database.execute("SELECT current_setting('max_prepared_transactions')::int")
    if not allowed:
        pytest.skip("this server allows no prepared transactions")
    execute_all(other, UPDATE, "PREPARE TRANSACTION 'two phases'")
    try:
        owned = await read_state(control, await begin(control))
        (named,) = await holders(control, TICKETS, owned.started_xid)
        assert named.startswith("prepared two phases, user ")
    finally:
        database.execute("COMMIT PREPARED 'two phases'")
    assert await holders(control, TICKETS, owned.started_xid) == ()
