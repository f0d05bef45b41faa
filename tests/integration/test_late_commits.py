"""Rows that transactions older than the rotation commit: whom to wait for, and what they leave behind."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain

import psycopg
import pytest
from psycopg import sql

from rotator.errors import RangeRefusedError, RotatorError, RowsLockedError, SupersededError
from rotator.keys import Key
from rotator.postgres import late_commits
from rotator.postgres.connections import connected
from rotator.postgres.late_commits import LatePass, holders
from rotator.postgres.ownership import abandon, read_owned
from rotator.postgres.table import TargetTable
from rotator.postgres.transaction import Claim, WaitLimits
from tests.integration.rotation_tables import (
    COMMITTING,
    ODD,
    PAIRS,
    SCHEMA,
    TICKETS,
    UUIDS,
    Database,
    assert_new_uuid4s,
    begin,
    once_each,
)

pytestmark = COMMITTING

UPDATE = "UPDATE tickets_ticket SET title = 'else' WHERE id = 3"
INSERT = "INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (99, '', now(), gen_random_uuid())"
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


def _do(connection: psycopg.Connection, *statements: str) -> None:
    for statement in statements:
        connection.execute(statement.encode())


# --- Whom to wait for ------------------------------------------------------------------------------


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
    _do(other, *statements)
    owned = await read_owned(control, await begin(control))
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
async def test_a_transaction_that_has_written_nothing_to_the_target_is_not_waited_for(
    control: psycopg.AsyncConnection, other: psycopg.Connection, statements: list[str]
) -> None:
    _do(other, *statements)
    owned = await read_owned(control, await begin(control))
    assert await holders(control, TICKETS, owned.started_xid) == ()


async def test_a_transaction_that_wrote_after_the_start_is_not_waited_for(
    control: psycopg.AsyncConnection, other: psycopg.Connection, claim: Claim
) -> None:
    _do(other, UPDATE)
    owned = await read_owned(control, claim)
    assert await holders(control, TICKETS, owned.started_xid) == ()


async def test_all_of_them_are_named(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    _do(other, UPDATE)
    third = database.connect(application_name="")
    _do(third, "BEGIN", INSERT)
    owned = await read_owned(control, await begin(control))
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
    _do(other, UPDATE, "PREPARE TRANSACTION 'two phases'")
    try:
        owned = await read_owned(control, await begin(control))
        (named,) = await holders(control, TICKETS, owned.started_xid)
        assert named.startswith("prepared two phases, user ")
    finally:
        database.execute("COMMIT PREPARED 'two phases'")
    assert await holders(control, TICKETS, owned.started_xid) == ()


# --- What they leave behind ------------------------------------------------------------------------


@asynccontextmanager
async def _late_pass(
    database: Database, claim: Claim, table: TargetTable = TICKETS
) -> AsyncIterator[LatePass]:
    async with connected(database.server) as side:
        owned = await read_owned(side, claim)
        yield LatePass(side, table, claim, started_xid=owned.started_xid, source=UUIDS, limits=WaitLimits())


def _rotate_all_but(database: Database, *left: int) -> None:
    """Write every row, as the ranges do, but for those whose transactions are not over."""
    database.execute(
        "UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id <> ALL (%s)", (list(left),)
    )


async def test_what_is_committed_late_is_rotated_and_nothing_else(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    _do(other, UPDATE, INSERT, "DELETE FROM tickets_ticket WHERE id = 4", "SAVEPOINT here")
    _do(other, "UPDATE tickets_ticket SET title = 'sub' WHERE id = 7", "SAVEPOINT there")
    _do(other, "UPDATE tickets_ticket SET title = 'undone' WHERE id = 8", "ROLLBACK TO there")
    claim = await begin(control)
    _rotate_all_but(database, 3, 4, 7, 99)
    database.make_tickets(50, 60)
    other.execute("COMMIT")
    before = database.values()
    database.count_updates()
    async with _late_pass(database, claim) as late_pass:
        found = [keys async for keys in late_pass.found(2000)]
        assert [sorted(keys) for keys in found] == [["[3]", "[7]", "[99]"]]
        assert await late_pass.rotate(found[0]) == 3
        assert [keys async for keys in late_pass.found(2000)] == []
    assert database.updates() == once_each((3, 3), (7, 7), (99, 99))
    assert database.changed(before) == {"[3]", "[7]", "[99]"}
    assert_new_uuid4s(before, {key: database.values()[key] for key in ("[3]", "[7]", "[99]")})
    assert database.rotation("late_rows") == 3
    assert database.checkpoints() == []


async def test_what_such_a_transaction_writes_after_the_start_counts_too(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    _do(other, UPDATE)
    claim = await begin(control)
    _rotate_all_but(database, 3)
    _do(other, INSERT, "COMMIT")
    async with _late_pass(database, claim) as late_pass:
        assert [sorted(keys) async for keys in late_pass.found(2000)] == [["[3]", "[99]"]]


@pytest.mark.parametrize("chunk_blocks", [1, 2, 3, 16_384])
@pytest.mark.parametrize("batch", [1, 7, 2000])
async def test_the_whole_table_is_walked_whatever_the_chunks_and_batches(
    database: Database,
    control: psycopg.AsyncConnection,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    chunk_blocks: int,
) -> None:
    monkeypatch.setattr(late_commits, "CHUNK_BLOCKS", chunk_blocks)
    database.make_tickets(1, 300)
    # Seven blocks and more, with late rows in the first line of the table, in its last, and in runs.
    database.execute("UPDATE tickets_ticket SET title = repeat('x', 200)")
    claim = await begin(control)
    late = [*range(1, 20), *range(100, 140), 300]
    _rotate_all_but(database, *late)
    async with _late_pass(database, claim) as late_pass:
        found = [keys async for keys in late_pass.found(batch)]
        assert max(map(len, found)) <= batch
        keys = list(chain.from_iterable(found))
        assert len(keys) == len(late)
        assert {int(key[1:-1]) for key in keys} == set(late)
        before = database.values()
        assert [await late_pass.rotate(some) for some in found] == [len(some) for some in found]
    assert database.changed(before) == set(keys)
    assert database.rotation("late_rows") == len(late)


async def test_rows_are_rotated_while_they_are_looked_for(
    database: Database, control: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_commits, "CHUNK_BLOCKS", 1)
    database.make_tickets(1, 300)
    claim = await begin(control)
    database.count_updates()
    async with _late_pass(database, claim) as late_pass:
        rows = [await late_pass.rotate(keys) async for keys in late_pass.found(7)]
    assert sum(rows) == 300
    assert database.updates() == once_each((1, 300))


@pytest.mark.parametrize("meanwhile", ["DELETE FROM tickets_ticket", "UPDATE tickets_ticket SET title = ''"])
async def test_rows_that_were_written_since_they_were_found_are_left_alone(
    database: Database, control: psycopg.AsyncConnection, meanwhile: str
) -> None:
    database.make_tickets(1, 5)
    claim = await begin(control)
    async with _late_pass(database, claim) as late_pass:
        ((*keys,),) = [keys async for keys in late_pass.found(10)]
        database.execute(f"{meanwhile} WHERE id = 2")
        before = database.values()
        assert await late_pass.rotate(keys) == 4
    assert database.changed(before) == set(once_each((1, 1), (3, 5)))
    assert database.rotation("late_rows") == 4


async def _refused(database: Database, claim: Claim, kind: type[RotatorError]) -> None:
    before = database.values()
    async with _late_pass(database, claim) as late_pass:
        with pytest.raises(kind):
            await late_pass.rotate([Key(key) for key in before])
        assert database.values() == before
        assert database.rotation("late_rows") == 0


async def test_locked_late_rows_are_left_for_later(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    claim = await begin(control)
    _do(other, UPDATE)
    await _refused(database, claim, RowsLockedError)


@pytest.mark.parametrize("body", ["RETURN NULL;", "RAISE EXCEPTION 'no';"])
async def test_refused_late_rows_are_not_counted(
    database: Database, control: psycopg.AsyncConnection, body: str
) -> None:
    database.make_tickets(1, 5)
    claim = await begin(control)
    database.before_update(f"IF OLD.id = 2 THEN {body} END IF; RETURN NEW;")
    await _refused(database, claim, RangeRefusedError)


async def test_late_rows_are_fenced_like_ranges(database: Database, control: psycopg.AsyncConnection) -> None:
    database.make_tickets(1, 5)
    claim = await begin(control)
    async with _late_pass(database, claim) as late_pass:
        await abandon(control, claim)
        with pytest.raises(SupersededError):
            await late_pass.rotate([Key("[1]")])


@pytest.mark.parametrize(
    ("table", "keys"),
    [(ODD, ["i * 1000"]), (PAIRS, ["chr(97 + i / 5)", "i % 5"])],
    ids=["odd names", "pairs"],
)
async def test_late_rows_of_tables_of_any_name_and_shape(
    database: Database, control: psycopg.AsyncConnection, table: TargetTable, keys: list[str]
) -> None:
    database.make_table(table)
    database.fill(table, *keys)
    claim = await begin(control)
    before = database.values(table)
    async with _late_pass(database, claim, table) as late_pass:
        assert sum([await late_pass.rotate(some) async for some in late_pass.found(3)]) == 10
    assert database.changed(before, table) == set(before)


async def test_an_empty_table_holds_nothing_late(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    async with _late_pass(database, await begin(control)) as late_pass:
        assert [keys async for keys in late_pass.found(10)] == []
