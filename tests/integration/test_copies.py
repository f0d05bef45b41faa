"""Copies of a rotation's old values in other columns and tables."""

import json
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from psycopg import AsyncConnection, sql

from rotator.postgres.column_samples import connected_for_reading
from rotator.postgres.copies import CopySearch, find_copies
from rotator.postgres.fence import Lease
from rotator.postgres.ledger import create_ledger, finish_ledger, index_ledger, load_range
from rotator.ranges import Key, KeyInterval
from tests.integration.rotation_tables import SCHEMA, TABLE_NAME, TICKETS, Database

pytestmark = [
    pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"]),
    pytest.mark.usefixtures("no_pauses"),
]

ROWS = 50


@pytest.fixture
async def rotation(database: Database, control: AsyncConnection, lease: Lease) -> int:
    """A rotation with a ledger of its tickets' tokens."""
    database.make_tickets(1, ROWS)
    ledger = await create_ledger(control, lease)
    await load_range(control, lease, TICKETS, ledger, KeyInterval(after=None, through=Key(f"[{ROWS}]")), None)
    await index_ledger(control, lease, ledger)
    await finish_ledger(control, ledger, 0)
    return lease.rotation


async def search(database: Database, rotation: int, *, every_row: bool = False) -> CopySearch:
    async with connected_for_reading(database.server) as connection:
        return await find_copies(
            connection,
            database.server,
            rotation=rotation,
            table=TABLE_NAME,
            columns=["token"],
            every_row=every_row,
        )


COPIES = {
    "uuid": "token",
    "text": "token::text",
    "fixed %s": "token::char(36)",
    "bytes": "convert_to(token::text, 'UTF8')",
    "json": "json_build_object('a', ARRAY[token])",
    "jsonb": "jsonb_build_object('a', jsonb_build_object('b', token))",
    "document": """'{"token": "' || token || '"}'""",
    "sentence": "'the token ' || token || ', and more'",
}
OTHERS = {
    "another": "gen_random_uuid()",
    "null": "NULL::text",
    "short": "'x'::text",
    "longer": "'no' || token",
    "number": "id",
}


async def test_each_form_of_a_copy_is_found(database: Database, rotation: int) -> None:
    chosen = sql.SQL(", ").join(
        sql.SQL("{} AS {}").format(sql.SQL(value), sql.Identifier(name))
        for name, value in (COPIES | OTHERS).items()
    )
    # The sample does not reach the other rows, but the search of all rows does.
    database.execute(
        sql.SQL(
            "CREATE TABLE {name} AS SELECT {chosen} FROM tickets_ticket;"
            " INSERT INTO {name} (uuid, text) SELECT gen_random_uuid(), gen_random_uuid()"
            " FROM generate_series(1, 5000)"
        ).format(name=sql.Identifier(SCHEMA, "100% copies"), chosen=chosen)
    )
    found = await search(database, rotation)
    assert {each.column: (each.rows, each.searched) for each in found.found} == {
        name: (ROWS, ROWS + 5000 if name in ("uuid", "text") else ROWS) for name in COPIES
    }
    assert {each.table for each in found.found} == {'"Rotation ""tests"" %s"."100% copies"'}
    assert not found.problems


async def test_a_rare_copy_is_found_in_all_rows_and_partitions(database: Database, rotation: int) -> None:
    name = sql.Identifier(SCHEMA, "copies")
    database.execute(
        sql.SQL("CREATE TABLE {} (number int, value text) PARTITION BY LIST (number)").format(name)
    )
    for number in (1, 2):
        part = sql.Identifier(SCHEMA, f"part {number}")
        database.execute(
            sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES IN ({})").format(
                part, name, sql.Literal(number)
            )
        )
    database.execute(
        sql.SQL("INSERT INTO {} SELECT 1, gen_random_uuid() FROM generate_series(1, 3000)").format(name)
    )
    database.execute(sql.SQL("INSERT INTO {} SELECT 2, token FROM tickets_ticket WHERE id = 7").format(name))
    assert not (await search(database, rotation)).found
    (found,) = (await search(database, rotation, every_row=True)).found
    assert (found.rows, found.searched) == (1, 3001)


def find(*options: str) -> str:
    out = StringIO()
    call_command("find_secrets", *options, stdout=out)
    return out.getvalue()


def find_some(*options: str) -> str:
    """Return the output of a search that could not search all columns."""
    out = StringIO()
    with pytest.raises(SystemExit) as exited:
        call_command("find_secrets", *options, stdout=out)
    assert exited.value.code == 1
    return out.getvalue()


def test_the_command(database: Database, rotation: int) -> None:
    database.execute("UPDATE tickets_ticket SET title = token::text WHERE id <= 3")
    every = json.loads(find("--copies-of", str(rotation), "--json"))["columns_searched"]
    locker = database.connect()
    locker.execute("BEGIN")
    locker.execute("LOCK TABLE shop_client")
    text = find_some("--copies-of", str(rotation))
    assert "  public.tickets_ticket.title: 3 of 50 rows\n" in text
    facts = json.loads(find_some("--copies-of", str(rotation), "--all", "--json"))
    skipped = len(facts["problems"])
    assert facts["columns_searched"] == every - skipped
    assert text.endswith(
        f"Searched {every - skipped} columns for old values of rotation {rotation}: 1 has copies. "
        f"{skipped} columns could not be searched, and can have copies.\n"
    )
    assert facts["copies"] == [
        {"table": "public.tickets_ticket", "column": "title", "rows": 3, "rows_searched": 50}
    ]
    reason = "lock_not_available (55P03): canceling statement due to lock timeout"
    assert f"public.shop_client.secret could not be searched: {reason}" in facts["problems"]


@pytest.mark.usefixtures("database")
def test_a_rotation_without_a_ledger_is_refused(lease: Lease) -> None:
    with pytest.raises(CommandError, match="has no ledger of its old values"):
        find("--copies-of", str(lease.rotation))
    with pytest.raises(CommandError, match="There is no rotation 999999"):
        find("--copies-of", "999999")
    with pytest.raises(CommandError, match="--all needs a rotation"):
        find("--all")
