"""Rewrites some ranges as a rotation would and rolls them back, to find out how fast that is."""

import asyncio
import time
from contextlib import suppress
from typing import Final

from psycopg import AsyncConnection, sql
from psycopg_pool import AsyncConnectionPool

from rotator.errors import (
    RangeRefusedError,
    RowsLockedError,
    ServerLostError,
    ServerRefusedError,
)
from rotator.findings import Sample
from rotator.keys import Key, KeyRange, KeySpan
from rotator.postgres.connections import Server, pooled
from rotator.postgres.failures import RangeGrewError, answered
from rotator.postgres.planning import IndexPlanner, last_key
from rotator.postgres.table import TargetTable
from rotator.postgres.writing import RangeUpdate, RewriteError
from rotator.tasks import first_error_alone

# What is rolled back leaves dead rows behind, so it is kept to a small part of the table.
MOST_RANGES: Final = 24
MOST_PART: Final = 1 / 30
LEAST_RANGES: Final = 8
MOST_SECONDS: Final = 1.5
# The first changes of a page, which write it whole, are many in a sample and few in a rotation.
WARMING_PART: Final = 1 / 3
_ROWS_READ: Final = 2000
TRY_SECONDS: Final = 1.0
# With two, a generator that returns a constant is noticed.
TRIED_ROWS: Final = 2


async def try_values(connection: AsyncConnection, update: RangeUpdate) -> None:
    """Rewrite the first rows and roll them back, to find out whether their new values can be made.

    Args:
        connection: In autocommit mode.
        update: The update of the rotation.

    Raises:
        ValuesError: There is something wrong with the new values.
        ServerLostError: The server cannot be reached.
    """
    # A single row or what else writes to it is for the rotation to meet.
    with suppress(RangeRefusedError, RowsLockedError, RangeGrewError, RewriteError, ServerRefusedError):
        keys = await _first_keys(connection, update.table)
        if not keys:
            return
        key_range = KeyRange(after=None, through=keys[-1], rows=len(keys))
        made = await update.make(key_range, key_range.rows)
        try:
            await update.execute(connection, key_range, made, None)
        finally:
            await connection.rollback()


async def _first_keys(connection: AsyncConnection, table: TargetTable) -> list[Key]:
    async with answered(connection), connection.transaction():
        await connection.execute(
            "SELECT set_config('statement_timeout', %s, true)", (f"{TRY_SECONDS * 1000:.0f}ms",)
        )
        cursor = await connection.execute(
            sql.SQL("SELECT {json} FROM {row} WHERE true{and_matches} ORDER BY {key} LIMIT {most}").format(
                json=table.key_json,
                row=table.row,
                and_matches=table.and_matches,
                key=table.key_columns,
                most=sql.Literal(TRIED_ROWS),
            ),
            {},
        )
        return [Key(key) async for (key,) in cursor]


async def sample(
    connection: AsyncConnection,
    server: Server,
    update: RangeUpdate,
    *,
    rows: int,
    batch: int,
    concurrency: int,
) -> Sample:
    """Measure how many rows a second all workers together rewrite; nothing of it stays but dead rows.

    Args:
        connection: In autocommit mode, for planning.
        server: Where the workers connect to.
        update: What they do.
        rows: About how many rows the table holds.
        batch: How many rows a range holds.
        concurrency: How many workers there are.
    """
    ranges = min(MOST_RANGES, int(rows * MOST_PART / batch))
    if ranges < LEAST_RANGES:
        return Sample(skipped="the table is too small for that")
    try:
        planned = await _plan(connection, update.table, rows=rows, batch=batch, ranges=ranges)
        return await _measure(server, update, planned, concurrency)
    except RangeRefusedError as refused:
        skipped = f"the server refused a range: {refused.condition}"
    except (RowsLockedError, RangeGrewError):
        skipped = "other sessions wrote to its rows"
    except RewriteError:
        skipped = "rows kept their old values, perhaps because of a trigger"
    except (ServerRefusedError, ServerLostError) as error:
        skipped = str(error).rstrip(".")
    return Sample(skipped=skipped)


async def _measure(server: Server, update: RangeUpdate, planned: list[KeyRange], concurrency: int) -> Sample:
    async with pooled(server, concurrency) as pool:
        warming = planned[: int(len(planned) * WARMING_PART)]
        await _rewrite(pool, update, warming, concurrency)
        started = time.monotonic()
        rewritten = await _rewrite(pool, update, planned[len(warming) :], concurrency)
        seconds = time.monotonic() - started
    if not rewritten:
        return Sample(skipped="no rows were found for it")
    return Sample(rows=sum(key_range.rows for key_range in planned), rows_per_second=rewritten / seconds)


async def _plan(
    connection: AsyncConnection, table: TargetTable, *, rows: int, batch: int, ranges: int
) -> list[KeyRange]:
    """Ranges that share no row, from all over the table, in no order."""
    async with answered(connection):
        cursor = await connection.execute(
            sql.SQL(
                "SELECT {json} FROM (SELECT {key} FROM (SELECT {key} FROM {table}"
                " TABLESAMPLE SYSTEM (%(percent)s)) AS read ORDER BY random() LIMIT %(ranges)s) AS chosen"
                " ORDER BY {key}"
            ).format(json=table.key_json, key=table.key_columns, table=table.name),
            {"percent": min(100.0, 100 * _ROWS_READ / max(rows, 1)), "ranges": ranges},
        )
        keys = [Key(key) async for (key,) in cursor]
    last = await last_key(connection, table)
    if last is None:
        return []
    planner = IndexPlanner(connection, table)
    planned = [
        await planner.next_range(KeySpan(after=after, through=through), batch)
        for after, through in zip(keys, [*keys[1:], last], strict=True)
        if after != through
    ]
    # Every other one first, so that those for warming up are from all over it, too.
    return planned[::2] + planned[1::2]


async def _rewrite(
    pool: AsyncConnectionPool, update: RangeUpdate, ranges: list[KeyRange], concurrency: int
) -> int:
    """Rewrite ranges until there are none left or the time is up; return how many rows that were."""
    until = time.monotonic() + MOST_SECONDS
    left = iter(ranges)

    async def work() -> int:
        rewritten = 0
        for key_range in left:
            if time.monotonic() > until:
                break
            made = await update.make(key_range, key_range.rows)
            async with answered(), pool.connection() as connection:
                try:
                    rewritten += (await update.execute(connection, key_range, made, None)).rows
                finally:
                    await connection.rollback()
        return rewritten

    with first_error_alone():
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(work(), name="rotator sample") for _ in range(concurrency)]
    return sum(worker.result() for worker in workers)
