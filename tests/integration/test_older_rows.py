"""Rows that nothing has written since the rotation began, found by reading the table."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import psycopg
import pytest
from psycopg import sql

from rotator.exceptions import RangeRejectedError, RotatorError, RowsLockedError, SupersededError
from rotator.options import WaitLimits
from rotator.postgres import last_writers
from rotator.postgres.connection import connected
from rotator.postgres.fence import Lease
from rotator.postgres.last_writers import find_older_rows
from rotator.postgres.rotations import abandon, read_state
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import OlderRow, RangeUpdate, write_placed
from rotator.ranges import Key, Written
from tests.integration.rotation_tables import (
    COMMITTING,
    INSERT,
    ODD,
    PAIRS,
    SCHEMA,
    TICKETS,
    UPDATE,
    UUIDS,
    Database,
    assert_new_uuid4s,
    begin,
    execute_all,
    once_each,
)
from tests.pairs import all_pairs

pytestmark = COMMITTING


@pytest.fixture
def other(database: Database) -> psycopg.Connection:
    """A transaction of an application, begun before any rotation."""
    database.make_tickets(1, 20)
    opened = database.connect(application_name="shop")
    opened.execute("BEGIN")
    return opened


Find: TypeAlias = Callable[[int], AsyncGenerator[list[OlderRow], None]]
Rotate: TypeAlias = Callable[[Sequence[OlderRow]], Coroutine[Any, Any, Written]]


@asynccontextmanager
async def _older_rows(
    database: Database, lease: Lease, table: TargetTable = TICKETS
) -> AsyncIterator[tuple[Find, Rotate]]:
    async with connected(database.server) as side:
        state = await read_state(side, lease)
        update = RangeUpdate(table, UUIDS, WaitLimits())

        def find(batch: int) -> AsyncGenerator[list[OlderRow], None]:
            return find_older_rows(
                side, table, rotation=lease.rotation, started_xid=state.started_xid, batch=batch
            )

        yield find, partial(write_placed, side, update, lease, None)


def _keys(rows: Iterable[OlderRow]) -> list[Key]:
    return sorted(row.key for row in rows)


def _rotate_all_but(database: Database, *left: int) -> None:
    """Write every row, as the ranges do, except those whose transactions are not over."""
    database.execute(
        "UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id <> ALL (%s)", (list(left),)
    )


async def test_what_is_committed_late_is_rotated_and_nothing_else(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    execute_all(other, UPDATE, INSERT, "DELETE FROM tickets_ticket WHERE id = 4", "SAVEPOINT here")
    execute_all(other, "UPDATE tickets_ticket SET title = 'sub' WHERE id = 7", "SAVEPOINT there")
    execute_all(other, "UPDATE tickets_ticket SET title = 'undone' WHERE id = 8", "ROLLBACK TO there")
    lease = await begin(control)
    _rotate_all_but(database, 3, 4, 7, 99)
    database.make_tickets(50, 60)
    other.execute("COMMIT")
    before = database.values()
    database.count_updates()
    async with _older_rows(database, lease) as (find, rotate):
        found = [rows async for rows in find(2000)]
        assert [_keys(rows) for rows in found] == [["[3]", "[7]", "[99]"]]
        assert (await rotate(found[0])).rows == 3
        assert [rows async for rows in find(2000)] == []
    assert database.updates() == once_each((3, 3), (7, 7), (99, 99))
    assert database.changed(before) == {"[3]", "[7]", "[99]"}
    assert_new_uuid4s(before, {key: database.values()[key] for key in ("[3]", "[7]", "[99]")})
    assert database.rotation("late_rows") == 3
    assert database.checkpoints() == []


async def test_what_such_a_transaction_writes_after_the_start_counts_too(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    execute_all(other, UPDATE)
    lease = await begin(control)
    _rotate_all_but(database, 3)
    execute_all(other, INSERT, "COMMIT")
    async with _older_rows(database, lease) as (find, _rotate):
        assert [_keys(rows) async for rows in find(2000)] == [["[3]", "[99]"]]


@pytest.mark.parametrize(("chunk_blocks", "batch"), all_pairs([1, 2, 3, 16_384], [1, 7, 2000]))
async def test_the_whole_table_is_walked_whatever_the_chunks_and_batches(
    database: Database,
    control: psycopg.AsyncConnection,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    chunk_blocks: int,
) -> None:
    monkeypatch.setattr(last_writers, "CHUNK_BLOCKS", chunk_blocks)
    database.make_tickets(1, 300)
    # Seven blocks and more, with late rows in the first line of the table, in its last, and in runs.
    database.execute("UPDATE tickets_ticket SET title = repeat('x', 200)")
    lease = await begin(control)
    late = [*range(1, 20), *range(100, 140), 300]
    _rotate_all_but(database, *late)
    async with _older_rows(database, lease) as (find, rotate):
        found = [rows async for rows in find(batch)]
        assert max(map(len, found)) <= batch
        keys = _keys(chain.from_iterable(found))
        assert len(keys) == len(late)
        assert {int(key[1:-1]) for key in keys} == set(late)
        before = database.values()
        assert [(await rotate(some)).rows for some in found] == [len(some) for some in found]
    assert database.changed(before) == set(keys)
    assert database.rotation("late_rows") == len(late)


async def test_rows_are_rotated_while_they_are_looked_for(
    database: Database, control: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_writers, "CHUNK_BLOCKS", 1)
    database.make_tickets(1, 300)
    lease = await begin(control)
    database.count_updates()
    async with _older_rows(database, lease) as (find, rotate):
        rotated = [(await rotate(rows)).rows async for rows in find(7)]
    assert sum(rotated) == 300
    assert database.updates() == once_each((1, 300))


@pytest.mark.parametrize("own_change", ["DELETE FROM tickets_ticket", "UPDATE tickets_ticket SET title = ''"])
async def test_rows_that_were_written_since_they_were_found_are_left_alone(
    database: Database, control: psycopg.AsyncConnection, own_change: str
) -> None:
    database.make_tickets(1, 5)
    lease = await begin(control)
    async with _older_rows(database, lease) as (find, rotate):
        (rows,) = [rows async for rows in find(10)]
        database.execute(f"{own_change} WHERE id = 2")
        before = database.values()
        assert (await rotate(rows)).rows == 4
    assert database.changed(before) == set(once_each((1, 1), (3, 5)))
    assert database.rotation("late_rows") == 4


async def test_what_others_write_after_the_attachment_stays_theirs(
    database: Database, control: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_writers, "CHUNK_BLOCKS", 1)
    table = TargetTable(
        path=(SCHEMA, "parted"), key=TICKETS.key, columns=TICKETS.columns, is_partitioned=True
    )
    parent, leaf = (sql.Identifier(SCHEMA, name).as_string() for name in ("parted", "leaf"))
    database.execute(f"CREATE TABLE {parent} (id bigint PRIMARY KEY, token uuid) PARTITION BY RANGE (id)")
    database.execute(f"CREATE TABLE {leaf} (LIKE {parent} INCLUDING ALL)")
    database.execute(f"INSERT INTO {leaf} SELECT i, gen_random_uuid() FROM generate_series(1, 5) AS i")
    lease = await begin(control)
    database.execute(f"ALTER TABLE {parent} ATTACH PARTITION {leaf} FOR VALUES FROM (1) TO (100)")
    database.execute(f"INSERT INTO {parent} VALUES (9, gen_random_uuid())")
    async with _older_rows(database, lease, table) as (find, rotate):
        found = []
        async for rows in find(1):
            found += rows
            # Each transaction makes all rows older, and the attachment too.
            assert (await rotate(rows)).rows == 1
    assert _keys(found) == [f"[{number}]" for number in range(1, 6)]


async def _refused(database: Database, lease: Lease, kind: type[RotatorError]) -> None:
    before = database.values()
    async with _older_rows(database, lease) as (find, rotate):
        (rows,) = [rows async for rows in find(2000)]
        with pytest.raises(kind):
            await rotate(rows)
        assert database.values() == before
        assert database.rotation("late_rows") == 0


async def test_locked_late_rows_are_left_for_later(
    database: Database, control: psycopg.AsyncConnection, other: psycopg.Connection
) -> None:
    lease = await begin(control)
    execute_all(other, UPDATE)
    await _refused(database, lease, RowsLockedError)


@pytest.mark.parametrize("body", ["RETURN NULL;", "RAISE EXCEPTION 'no';"])
async def test_refused_late_rows_are_not_counted(
    database: Database, control: psycopg.AsyncConnection, body: str
) -> None:
    database.make_tickets(1, 5)
    lease = await begin(control)
    database.before_update(f"IF OLD.id = 2 THEN {body} END IF; RETURN NEW;")
    await _refused(database, lease, RangeRejectedError)


async def test_late_rows_are_fenced_like_ranges(database: Database, control: psycopg.AsyncConnection) -> None:
    database.make_tickets(1, 5)
    lease = await begin(control)
    async with _older_rows(database, lease) as (find, rotate):
        (rows,) = [rows async for rows in find(2000)]
        await abandon(control, lease)
        with pytest.raises(SupersededError):
            await rotate(rows)


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
    lease = await begin(control)
    before = database.values(table)
    async with _older_rows(database, lease, table) as (find, rotate):
        assert sum([(await rotate(some)).rows async for some in find(3)]) == 10
    assert database.changed(before, table) == set(before)


async def test_an_empty_table_holds_nothing_late(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    async with _older_rows(database, await begin(control)) as (find, _rotate):
        assert [rows async for rows in find(10)] == []
