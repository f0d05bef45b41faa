"""Gives the rows of a range new values, and checkpoints it in the same transaction."""

import time
from typing import Final

from psycopg import AsyncConnection, AsyncCursor, sql
from psycopg_pool import AsyncConnectionPool

from rotator.errors import RangeRefusedError
from rotator.keys import KeyRange, KeySpan
from rotator.postgres.arrays import MakeValues, part
from rotator.postgres.failures import RANGE_GREW, SUPPRESSED, RangeGrewError, answered
from rotator.postgres.table import TargetTable, identifier
from rotator.postgres.transaction import Claim, WaitLimits, guard, limit

SLICE_ROWS: Final = 2000
_GROWTHS: Final = 5

_TARGET: Final = "rotator_target"
_NUMBERED: Final = "rotator_numbered"
_POSITION: Final = "rotator_position"


def update_statement(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
    """The update of one slice; see docs/decisions/0001.

    Parameters: ``after`` and ``through`` (keys), ``values`` (array), ``rows`` (how many values there are),
    ``is_first`` (whether no other slice of this range comes before) and ``limit`` (``rows`` again, or NULL in
    the last slice, where more rows than values are an error). Rows that this transaction has written already
    belong to an earlier slice.
    """
    return sql.SQL(
        "UPDATE {table} AS {target} SET {column} = (%(values)b::{type}[])[{numbered}.{position}]"
        " FROM (SELECT {key}, (row_number() OVER (ORDER BY {key}))::integer AS {position} FROM"
        " (SELECT {key} FROM {table} WHERE {within}"
        # The planner folds this away where it is the first slice: such statements are not prepared.
        " AND (%(is_first)s::boolean OR xmin <> pg_current_xact_id()::xid)"
        " ORDER BY {key} LIMIT %(limit)s::bigint) AS rotator_slice) AS {numbered}"
        " WHERE {same_key} AND {target_within}"
        " AND CASE WHEN {numbered}.{position} <= %(rows)s::integer THEN true"
        # Joined with a column, or the planner would work the cast out, and fail, before there is a row.
        " ELSE CAST({grew} || ', at row ' || {numbered}.{position} AS boolean) END"
    ).format(
        table=table.name,
        target=identifier(_TARGET),
        column=identifier(table.column.name),
        type=table.column.type,
        numbered=identifier(_NUMBERED),
        position=identifier(_POSITION),
        key=table.key_columns,
        within=table.within(after_is_known=after_is_known),
        same_key=sql.SQL(" AND ").join(
            sql.SQL("{} = {}").format(identifier(_TARGET, key.name), identifier(_NUMBERED, key.name))
            for key in table.key
        ),
        target_within=table.within(after_is_known=after_is_known, alias=_TARGET),
        grew=sql.Literal(RANGE_GREW),
    )


class RangeUpdate:
    """The update of one range of a table, in a transaction that is somebody else's to end."""

    def __init__(self, table: TargetTable, make_values: MakeValues, limits: WaitLimits) -> None:
        self.table = table
        self._make_values = make_values
        self._limits = limits
        # Written out once: putting a statement together takes as long as sending it.
        self._updates = {
            known: update_statement(table, after_is_known=known).as_bytes() for known in (False, True)
        }

    async def execute(
        self, connection: AsyncConnection, key_range: KeyRange, rows: int, claim: Claim | None
    ) -> int:
        """Begin a transaction and give a range's rows new values.

        Args:
            connection: In autocommit mode.
            key_range: Which.
            rows: How many there are.
            claim: What this process owns; None where the transaction will be rolled back.

        Returns:
            How many rows got a new value.

        Raises:
            RangeGrewError: There are more rows.
            RotatorError: As :func:`answered` has it; all of them leave the transaction to be rolled back.
        """
        values = self._make_values(rows)
        starts = range(0, max(rows, 1), SLICE_ROWS)
        slices = [
            {
                "after": key_range.after,
                "through": key_range.through,
                "values": part(values, start, start + SLICE_ROWS),
                "rows": min(SLICE_ROWS, rows - start),
                "is_first": start == 0,
                "limit": None if start == starts[-1] else SLICE_ROWS,
            }
            for start in starts
        ]
        async with answered(connection):
            async with connection.pipeline():
                await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
                # Merging two scans of the key's index is the cheapest join, and keeps the key's order.
                if claim is None:
                    await limit(connection, self._limits, without=("nestloop",))
                else:
                    await guard(connection, claim, self._limits, without=("nestloop",))
                cursor: AsyncCursor = connection.cursor()
                await cursor.executemany(self._updates[key_range.after is not None], slices)
            if cursor.rowcount < rows and await self._holds_untouched(connection, key_range):
                raise RangeRefusedError(SUPPRESSED, passing=True)
        return cursor.rowcount

    async def count(self, connection: AsyncConnection, span: KeySpan) -> int:
        """How many rows a span holds."""
        return await self._fetch(connection, span, sql.SQL("SELECT count(*) FROM {} WHERE {}"))

    async def _holds_untouched(self, connection: AsyncConnection, span: KeySpan) -> bool:
        """Whether the span holds a row that the current transaction has not written.

        Rows that were deleted since they were planned are none of ours; rows that are still there are.
        """
        return bool(
            await self._fetch(
                connection,
                span,
                sql.SQL(
                    "SELECT EXISTS (SELECT FROM {} WHERE {} AND xmin <> pg_current_xact_id()::xid)::integer"
                ),
            )
        )

    async def _fetch(self, connection: AsyncConnection, span: KeySpan, query: sql.SQL) -> int:
        cursor = await connection.execute(
            query.format(self.table.name, self.table.within(after_is_known=span.after is not None)),
            {"after": span.after, "through": span.through},
        )
        row = await cursor.fetchone()
        return row[0] if row else 0


class PostgresWriter:
    """Writes ranges for as long as the claim holds."""

    def __init__(self, pool: AsyncConnectionPool, update: RangeUpdate, claim: Claim) -> None:
        self._pool = pool
        self._update = update
        self._claim = claim

    async def rewrite(self, key_range: KeyRange) -> int:
        """Give a range's rows new values and checkpoint it, in one transaction.

        Returns:
            How many rows got a new value.

        Raises:
            RowsLockedError: Somebody else holds rows of it; nothing was written.
            RangeRefusedError: The server refused it; nothing was written.
            SupersededError: Another process owns the rotation; nothing was written.
            ServerRefusedError: The server refuses for good; nothing was written.
            ServerLostError: Nobody knows but the checkpoints.
        """
        started = time.monotonic()
        rows = key_range.rows
        for _ in range(_GROWTHS):
            async with answered(), self._pool.connection() as connection, answered(connection):
                try:
                    updated = await self._update.execute(connection, key_range, rows, self._claim)
                except RangeGrewError:
                    await connection.rollback()
                    rows = await self._update.count(connection, key_range)
                    continue
                await self._commit(connection, key_range, updated, time.monotonic() - started)
                return updated
        raise RangeRefusedError("rows keep coming into the range", passing=True)

    async def _commit(
        self, connection: AsyncConnection, key_range: KeyRange, rows: int, seconds: float
    ) -> None:
        async with connection.pipeline():
            await connection.execute(
                "INSERT INTO rotator_completedrange (rotation_id, after, through, rows, seconds)"
                " VALUES (%s, %s::jsonb, %s::jsonb, %s, %s)",
                (self._claim.rotation, key_range.after, key_range.through, rows, seconds),
            )
            await connection.execute("COMMIT")
