"""Gives the rows of a range new values, and checkpoints it in the same transaction."""

import time
from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection, AsyncCursor, sql
from psycopg_pool import AsyncConnectionPool

from rotator.errors import RangeRefusedError, ValuesError
from rotator.keys import Key, KeyRange, KeySpan
from rotator.postgres.arrays import Values, part
from rotator.postgres.failures import RANGE_GREW, SUPPRESSED, RangeGrewError, answered
from rotator.postgres.keyed import keyed_update
from rotator.postgres.table import ROW, TargetTable, identifier
from rotator.postgres.transaction import Claim, WaitLimits, guard, limit
from rotator.postgres.value_source import FromRows, ValueSource, named

SLICE_ROWS: Final = 2000
_GROWTHS: Final = 5

_NUMBERED: Final = "rotator_numbered"
_POSITION: Final = "rotator_position"


def update_statement(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
    """The update of one slice; see docs/decisions/0001.

    Parameters: ``after`` and ``through`` (keys), ``values_0`` and so on (an array for each column), ``rows``
    (how many values there are), ``is_first`` (whether no other slice of this range comes before) and
    ``limit`` (``rows`` again, or NULL in the last slice, where more rows than values are an error). Rows that
    this transaction has written already belong to an earlier slice.
    """
    return sql.SQL(
        "UPDATE {row} SET {assignments}"
        " FROM (SELECT {key}, (row_number() OVER (ORDER BY {key}))::integer AS {position} FROM"
        " (SELECT {key} FROM {row} WHERE {within}{and_matches}"
        # The planner folds this away where it is the first slice: such statements are not prepared.
        " AND (%(is_first)s::boolean OR xmin <> pg_current_xact_id()::xid)"
        " ORDER BY {key} LIMIT %(limit)s::bigint) AS rotator_slice) AS {numbered}"
        " WHERE {same_key} AND {target_within}{and_matches}"
        " AND CASE WHEN {numbered}.{position} <= %(rows)s::integer THEN true"
        # Joined with a column, or the planner would work the cast out, and fail, before there is a row.
        " ELSE CAST({grew} || ', at row ' || {numbered}.{position} AS boolean) END"
    ).format(
        row=table.row,
        assignments=table.assignments(identifier(_NUMBERED, _POSITION)),
        and_matches=table.and_matches,
        numbered=identifier(_NUMBERED),
        position=identifier(_POSITION),
        key=table.key_columns,
        within=table.within(after_is_known=after_is_known),
        same_key=sql.SQL(" AND ").join(
            sql.SQL("{} = {}").format(identifier(ROW, key.name), identifier(_NUMBERED, key.name))
            for key in table.key
        ),
        target_within=table.within(after_is_known=after_is_known, alias=ROW),
        grew=sql.Literal(RANGE_GREW),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """New values for a range.

    Attributes:
        rows: For how many rows.
        columns: One array for each column; none where each value needs its row, and is made from that.
    """

    rows: int
    columns: tuple[Values, ...] = ()


class RangeUpdate:
    """The update of one range of a table, in a transaction that is somebody else's to end."""

    def __init__(self, table: TargetTable, source: ValueSource, limits: WaitLimits) -> None:
        self.table = table
        self._source = source
        self._limits = limits
        # Written out once: putting a statement together takes as long as sending it.
        self._updates = {
            known: update_statement(table, after_is_known=known).as_bytes() for known in (False, True)
        }
        self._keyed_update = keyed_update(table, sql.SQL("true")).as_bytes()

    async def make(self, key_range: KeySpan, rows: int) -> Made:
        """Make a range's values ahead of its transaction, which so holds nothing meanwhile.

        Args:
            key_range: Which.
            rows: How many there are.

        Raises:
            ValuesError: There is something wrong with the new values.
            RangeTooSlowError: Making so many takes too long.
        """
        if isinstance(self._source, FromRows):
            return Made(rows=rows)
        try:
            return Made(rows=rows, columns=await self._source.make(rows))
        except ValuesError as error:
            raise error.of(key_range) from None

    async def execute(
        self, connection: AsyncConnection, key_range: KeyRange, made: Made, claim: Claim | None
    ) -> int:
        """Begin a transaction and give a range's rows new values.

        Args:
            connection: In autocommit mode.
            key_range: Which.
            made: Its values.
            claim: What this process owns; None where the transaction will be rolled back.

        Returns:
            How many rows got a new value.

        Raises:
            RangeGrewError: There are more rows.
            ValuesError: There is something wrong with the new values.
            RotatorError: As :func:`answered` has it; all of them leave the transaction to be rolled back.
        """
        try:
            if isinstance(self._source, FromRows):
                return await self._execute_from_rows(connection, key_range, self._source, claim)
            return await self._execute_in_bulk(connection, key_range, made, claim)
        except ValuesError as error:
            raise error.of(key_range) from None

    async def _execute_in_bulk(
        self, connection: AsyncConnection, key_range: KeyRange, made: Made, claim: Claim | None
    ) -> int:
        rows, values = made.rows, made.columns
        starts = range(0, max(rows, 1), SLICE_ROWS)
        slices = [
            {
                "after": key_range.after,
                "through": key_range.through,
                **named(tuple(part(of_column, start, start + SLICE_ROWS) for of_column in values)),
                "rows": min(SLICE_ROWS, rows - start),
                "is_first": start == 0,
                "limit": None if start == starts[-1] else SLICE_ROWS,
            }
            for start in starts
        ]
        async with answered(connection):
            async with connection.pipeline():
                # Merging two scans of the key's index is the cheapest join, and keeps the key's order.
                await self._begin(connection, claim, without="nestloop")
                cursor: AsyncCursor = connection.cursor()
                await cursor.executemany(self._updates[key_range.after is not None], slices)
            if cursor.rowcount < rows and await self._holds_untouched(connection, key_range):
                raise RangeRefusedError(SUPPRESSED, passing=True)
        return cursor.rowcount

    async def _execute_from_rows(
        self, connection: AsyncConnection, key_range: KeyRange, source: FromRows, claim: Claim | None
    ) -> int:
        """The same where each value needs its row: locked in key order, and updated by their keys."""
        span: KeySpan = key_range
        updated = 0
        async with answered(connection), connection.pipeline():
            await self._begin(connection, claim, without="mergejoin")
        while True:
            async with answered(connection):
                keys = await self._locked(connection, span)
                parameters = await source.parameters(keys)
                cursor = await connection.execute(self._keyed_update, parameters)
            if cursor.rowcount < len(keys):
                raise RangeRefusedError(SUPPRESSED, passing=True)
            updated += cursor.rowcount
            if len(keys) < SLICE_ROWS:
                return updated
            span = KeySpan(after=keys[-1], through=key_range.through)

    async def _begin(self, connection: AsyncConnection, claim: Claim | None, *, without: str) -> None:
        await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        if claim is None:
            await limit(connection, self._limits, without=(without,))
        else:
            await guard(connection, claim, self._limits, without=(without,))

    async def _locked(self, connection: AsyncConnection, span: KeySpan) -> list[Key]:
        """Lock the first rows of a span, and return their keys."""
        cursor = await connection.execute(
            sql.SQL("SELECT {} FROM {} WHERE {}{} ORDER BY {} LIMIT {} FOR UPDATE").format(
                self.table.key_json,
                self.table.row,
                self.table.within(after_is_known=span.after is not None),
                self.table.and_matches,
                self.table.key_columns,
                sql.Literal(SLICE_ROWS),
            ),
            {"after": span.after, "through": span.through},
        )
        return [Key(key) async for (key,) in cursor]

    async def count(self, connection: AsyncConnection, span: KeySpan) -> int:
        """How many rows a span holds."""
        return await self._fetch(connection, span, sql.SQL("SELECT count(*) FROM {} WHERE {}{}"))

    async def _holds_untouched(self, connection: AsyncConnection, span: KeySpan) -> bool:
        """Whether the span holds a row that the current transaction has not written.

        Rows that were deleted since they were planned are none of ours; rows that are still there are.
        """
        return bool(
            await self._fetch(
                connection,
                span,
                sql.SQL(
                    "SELECT EXISTS (SELECT FROM {} WHERE {}{} AND xmin <> pg_current_xact_id()::xid)::integer"
                ),
            )
        )

    async def _fetch(self, connection: AsyncConnection, span: KeySpan, query: sql.SQL) -> int:
        cursor = await connection.execute(
            query.format(
                self.table.row,
                self.table.within(after_is_known=span.after is not None),
                self.table.and_matches,
            ),
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
            ValuesError: There is something wrong with the new values; nothing was written.
            ServerRefusedError: The server refuses for good; nothing was written.
            ServerLostError: Nobody knows but the checkpoints.
        """
        started = time.monotonic()
        rows = key_range.rows
        for _ in range(_GROWTHS):
            made = await self._update.make(key_range, rows)
            async with answered(), self._pool.connection() as connection, answered(connection):
                try:
                    updated = await self._update.execute(connection, key_range, made, self._claim)
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
            if self._claim.span is not None:
                await connection.execute(
                    "UPDATE rotator_span SET rows = rows + %s, ranges = ranges + 1,"
                    " updated_at = clock_timestamp() WHERE id = %s",
                    (rows, self._claim.span),
                )
            await connection.execute("COMMIT")
