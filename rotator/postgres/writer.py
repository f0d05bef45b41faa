"""Updates the rows of a range and checkpoints it in the same transaction."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from psycopg import AsyncConnection, AsyncCursor, sql
from psycopg_pool import AsyncConnectionPool

from rotator.events import OnCommit, RowsRotated
from rotator.exceptions import OldValuesKeptError, RangeRejectedError, RangeTooSlowError, ValuesError
from rotator.options import WaitLimits
from rotator.postgres.catalog import read_update_triggers
from rotator.postgres.connection import begin
from rotator.postgres.errors import (
    ANSWER_SECONDS,
    RANGE_GREW,
    SUPPRESSED,
    TOO_LONG,
    RangeGrewError,
    translate_errors,
)
from rotator.postgres.fence import Lease, begin_fenced, set_timeouts
from rotator.postgres.planner import slice_ends
from rotator.postgres.table import (
    COUNT_OUTCOMES,
    ROW,
    TargetTable,
    identifier,
    keyed_update,
    rows_written_so_far,
)
from rotator.postgres.values import FromRows, InBulk, Values, ValueSource, named, part
from rotator.ranges import Key, KeyInterval, KeyRange

Digests: TypeAlias = Mapping[str, Sequence[int | None]]
"""For each key a number for each rotated column; see :attr:`TargetTable.digests`."""


async def by_key(cursor: AsyncCursor | None) -> Digests:
    """Return the digests that a cursor reads, by the rows' keys."""
    return {} if cursor is None else {key: digests async for key, digests in cursor}


def count_kept(before: Digests, after: Digests) -> int:
    """Return the number of rows that have in one of their columns the value that they had before."""
    return sum(
        any(old is not None and old == new for old, new in zip(digests, after[key], strict=True))
        for key, digests in before.items()
        if key in after
    )


SLICE_ROWS: Final = 2000
_ATTEMPTS: Final = 5

_NUMBERED: Final = "rotator_numbered"
_POSITION: Final = "rotator_position"
# Deferred triggers would run in the COMMIT, after the last look at what they do.
_RUN_DEFERRED_TRIGGERS: Final = "SET CONSTRAINTS ALL IMMEDIATE"
_WRITTEN_BY_OTHERS: Final = "a trigger wrote other rows of the range"
_REPEATED: Final = "new values are equal to the old ones"


def update_statement(table: TargetTable, *, after_is_known: bool, transaction_seconds: float) -> sql.Composed:
    """The update of one slice; see docs/decisions/0001.

    It returns one row: the number of rows that were updated, of those that still have their old value, and of
    those whose new value is the old one; see :meth:`TargetTable.outcome`.

    Parameters: ``after`` and ``through`` (keys), ``values_0`` and so on (an array for each column) and
    ``rows`` (the number of values; more rows than that are an error).

    Args:
        table: The table.
        after_is_known: Whether the slice has a lower bound.
        transaction_seconds: The age of the transaction at which the statement fails instead.
    """
    return sql.SQL(
        "WITH written AS (UPDATE {row} SET {assignments}"
        " FROM (SELECT {key}, {old_values}, (row_number() OVER (ORDER BY {key}))::integer AS {position}"
        " FROM {row} WHERE {within}{and_matches}) AS {numbered}"
        " WHERE {same_key} AND {target_within}{and_matches}"
        " AND CASE WHEN {numbered}.{position} <= %(rows)s::integer THEN true"
        # Joined with a column, or the planner would work the cast out, and fail, before there is a row.
        " ELSE CAST({grew} || ', at row ' || {numbered}.{position} AS boolean) END"
        # Evaluated once, before the first row.
        " AND (SELECT CASE WHEN clock_timestamp() - transaction_timestamp() < {limit}"
        " THEN true ELSE CAST({too_long} || clock_timestamp() AS boolean) END)"
        " RETURNING {outcome})"
        " {count_outcomes}"
    ).format(
        count_outcomes=COUNT_OUTCOMES,
        row=table.row,
        assignments=table.assignments(identifier(_NUMBERED, _POSITION)),
        old_values=table.old_values,
        outcome=table.outcome(_NUMBERED, identifier(_NUMBERED, _POSITION)),
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
        limit=sql.SQL("make_interval(secs => {})").format(sql.Literal(transaction_seconds)),
        too_long=sql.Literal(TOO_LONG),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NewValues:
    """New values for a range.

    Attributes:
        rows: For how many rows.
        columns: One array for each column; none where each value needs its row, and is made from that.
    """

    rows: int
    columns: tuple[Values, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What the transaction of a range has written.

    Attributes:
        rows: The number of rows that have new values.
        has_other_writes: Whether a trigger wrote other rows of the table in the same transaction.
    """

    rows: int
    has_other_writes: bool


class RewriteError(Exception):
    """The range was written in a way that must not be committed; another attempt may differ."""


class _RowsKeptError(RewriteError):
    """Rows still have their old value."""


class _RowsRepeatedError(RewriteError):
    """Rows were given a new value that is equal to the old one."""


class _UncomparedError(RewriteError):
    """Triggers wrote to the table and the old values were not noted beforehand."""


class RangeUpdate:
    """The update of one range of a table, in a transaction that the caller ends."""

    def __init__(self, table: TargetTable, source: ValueSource, limits: WaitLimits) -> None:
        self.table = table
        self._source = source
        self.limits = limits
        # Written out once: putting a statement together takes as long as sending it.
        self._updates = {
            known: update_statement(
                table, after_is_known=known, transaction_seconds=limits.transaction_seconds
            ).as_bytes()
            for known in (False, True)
        }
        self._keyed_update = keyed_update(table).as_bytes()
        self._rows_written_so_far = rows_written_so_far(table).as_bytes()
        # Once triggers have written to the table, each range notes its old values first.
        self._compares_digests = False

    async def make(self, key_range: KeyInterval, rows: int) -> NewValues:
        """Make a range's values ahead of its transaction, which so holds nothing meanwhile.

        Args:
            key_range: Which.
            rows: How many there are.

        Raises:
            ValuesError: There is something wrong with the new values.
            RangeTooSlowError: Making so many takes too long.
        """
        if isinstance(self._source, FromRows):
            return NewValues(rows=rows)
        try:
            return NewValues(rows=rows, columns=await self._source.make(rows))
        except ValuesError as error:
            raise error.of(key_range) from None

    async def execute(
        self, connection: AsyncConnection, key_range: KeyRange, new_values: NewValues, lease: Lease | None
    ) -> Written:
        """Begin a transaction, give a range's rows new values, and make sure that they have them.

        Args:
            connection: In autocommit mode.
            key_range: Which.
            new_values: Its values.
            lease: What this process owns; None where the transaction will be rolled back.

        Raises:
            RangeGrewError: There are more rows.
            RewriteError: It must not be committed.
            ValuesError: There is something wrong with the new values.
            RotatorError: The error of :func:`translate_errors`; the caller rolls the transaction back.
        """
        try:
            if isinstance(self._source, FromRows):
                return await self._execute_from_rows(connection, key_range, self._source, lease)
            return await self._execute_in_bulk(connection, key_range, new_values, lease)
        except ValuesError as error:
            raise error.of(key_range) from None

    async def _execute_in_bulk(
        self, connection: AsyncConnection, key_range: KeyRange, new_values: NewValues, lease: Lease | None
    ) -> Written:
        slices = await self._slices(connection, key_range, new_values)
        # The slice at the table's start has no lower bound, and so another statement than those after it.
        starts = [parameters for parameters in slices if parameters["after"] is None]
        others = [parameters for parameters in slices if parameters["after"] is not None]
        async with translate_errors(connection):
            async with connection.pipeline():
                # Merging two scans of the key's index is the cheapest join, and keeps the key's order.
                await self._begin(connection, lease, disabled_joins="nestloop")
                before = await self._digests(connection, key_range)
                written_before = await self._written_so_far(connection)
                cursors: list[AsyncCursor] = []
                for known, parameters in ((False, starts), (True, others)):
                    if parameters:
                        cursors.append(connection.cursor())
                        await cursors[-1].executemany(self._updates[known], parameters, returning=True)
                await connection.execute(_RUN_DEFERRED_TRIGGERS)
                written_after = await self._written_so_far(connection)
            outcomes = [await result.fetchone() for cursor in cursors async for result in cursor.results()]
            return await self._check(
                connection,
                key_range,
                [outcome for outcome in outcomes if outcome is not None],
                rows=new_values.rows,
                before=before,
                table_writes=await _number(written_after) - await _number(written_before),
            )

    async def _slices(
        self, connection: AsyncConnection, key_range: KeyRange, new_values: NewValues
    ) -> list[dict[str, object]]:
        """The parameters of each slice's update; a slice ends at a key, whatever others insert."""
        ends: list[Key] = []
        if new_values.rows > SLICE_ROWS:
            most = -(-new_values.rows // SLICE_ROWS) - 1
            ends = await slice_ends(connection, self.table, key_range, rows=SLICE_ROWS, most=most)
        ends = [end for end in ends if end != key_range.through] + [key_range.through]
        starts = range(0, len(ends) * SLICE_ROWS, SLICE_ROWS)
        return [
            {
                "after": after,
                "through": through,
                **named(
                    tuple(part(of_column, start, start + SLICE_ROWS) for of_column in new_values.columns)
                ),
                "rows": max(0, min(SLICE_ROWS, new_values.rows - start)),
            }
            for start, after, through in zip(starts, [key_range.after, *ends], ends, strict=False)
        ]

    async def _execute_from_rows(
        self, connection: AsyncConnection, key_range: KeyRange, source: FromRows, lease: Lease | None
    ) -> Written:
        """The same where each value needs its row: locked in key order, and updated by their keys."""
        span: KeyInterval = key_range
        outcomes: list[tuple[int, int, int]] = []
        rows, began = 0, time.monotonic()
        async with translate_errors(connection), connection.pipeline():
            await self._begin(connection, lease, disabled_joins="mergejoin")
            before = await self._digests(connection, key_range)
            written_before = await self._written_so_far(connection)
        while True:
            async with translate_errors(connection):
                keys = await self._locked(connection, span)
                parameters = await source.parameters(keys)
                cursor = await connection.execute(self._keyed_update, parameters)
                outcomes.append(await cursor.fetchone() or (0, 0, 0))
            rows += len(keys)
            if len(keys) < SLICE_ROWS:
                break
            if time.monotonic() - began > self.limits.transaction_seconds:
                raise RangeTooSlowError(TOO_LONG)
            span = KeyInterval(after=keys[-1], through=key_range.through)
        async with translate_errors(connection):
            async with connection.pipeline():
                await connection.execute(_RUN_DEFERRED_TRIGGERS)
                written_after = await self._written_so_far(connection)
            return await self._check(
                connection,
                key_range,
                outcomes,
                rows=rows,
                before=before,
                table_writes=await _number(written_after) - await _number(written_before),
            )

    async def _begin(self, connection: AsyncConnection, lease: Lease | None, *, disabled_joins: str) -> None:
        await begin(connection)
        if lease is None:
            await set_timeouts(connection, self.limits, disabled_joins=(disabled_joins,))
        else:
            await begin_fenced(connection, lease, self.limits, disabled_joins=(disabled_joins,))

    async def _check(
        self,
        connection: AsyncConnection,
        span: KeyInterval,
        outcomes: list[tuple[int, int, int]],
        *,
        rows: int,
        before: AsyncCursor | None,
        table_writes: int,
    ) -> Written:
        """Make sure that every row of the range has a new value, whatever triggers did.

        Args:
            connection: In the transaction.
            span: The range.
            outcomes: What each update has returned.
            rows: The number of rows that were planned.
            before: The digests before the updates; None where they were not read.
            table_writes: The number of row versions that the transaction has written to the table.
        """
        written, kept, repeated = (sum(column) for column in zip(*outcomes, strict=True))
        if kept:
            raise _RowsKeptError
        if repeated:
            raise _RowsRepeatedError
        has_other_writes = table_writes != written
        if written < rows or has_other_writes:
            now, ours = await self._count_now(connection, span)
            # Rows that were deleted since they were planned are gone; rows that are still there stayed as
            # they were.
            if now > written:
                raise RangeRejectedError(SUPPRESSED, retryable=True)
            if ours > written:
                raise RangeRejectedError(_WRITTEN_BY_OTHERS, retryable=False)
        if has_other_writes:
            # What an update returns is older than what the triggers after it do.
            if before is None:
                self._compares_digests = True
                raise _UncomparedError
            after = await self._digests(connection, span)
            if count_kept(await by_key(before), await by_key(after)):
                raise _RowsKeptError
        return Written(rows=written, has_other_writes=has_other_writes)

    async def _digests(self, connection: AsyncConnection, span: KeyInterval) -> AsyncCursor | None:
        """Ask for the digests of the rows' values; None while nothing else writes to the table."""
        if not self._compares_digests:
            return None
        columns = sql.SQL("{}, {}").format(self.table.key_json, self.table.digests)
        return await self._select(connection, span, columns)

    async def _written_so_far(self, connection: AsyncConnection) -> AsyncCursor:
        return await connection.execute(self._rows_written_so_far, {"table": self.table.regclass})

    async def _locked(self, connection: AsyncConnection, span: KeyInterval) -> list[Key]:
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

    async def planning_seconds(self, connection: AsyncConnection, key: Key) -> float:
        """Measure the time that the server takes to plan the update of a slice.

        Args:
            connection: In autocommit mode.
            key: Any key of the table.
        """
        is_bulk = isinstance(self._source, InBulk)
        statement = self._updates[True] if is_bulk else self._keyed_update
        no_values = named(tuple([] for _ in self.table.columns))
        parameters = {"after": key, "through": key, "rows": 0, "keys": [], **no_values}
        limits = replace(self.limits, statement_seconds=ANSWER_SECONDS)
        async with translate_errors(connection), connection.transaction():
            await set_timeouts(connection, limits, disabled_joins=("nestloop" if is_bulk else "mergejoin",))
            cursor = await connection.execute(b"EXPLAIN (SUMMARY) " + statement, parameters)
            lines = [str(line) for (line,) in await cursor.fetchall()]
        milliseconds = [line.split()[2] for line in lines if line.startswith("Planning Time:")]
        return float(milliseconds[0]) / 1000 if milliseconds else 0.0

    async def count(self, connection: AsyncConnection, span: KeyInterval) -> int:
        """How many rows a span holds."""
        return await _number(await self._select(connection, span, sql.SQL("count(*)")))

    async def _count_now(self, connection: AsyncConnection, span: KeyInterval) -> tuple[int, int]:
        """The number of rows that a span holds now, and of those that this transaction wrote."""
        columns = sql.SQL("count(*), count(*) FILTER (WHERE xmin = pg_current_xact_id()::xid)")
        return await (await self._select(connection, span, columns)).fetchone() or (0, 0)

    async def _select(
        self, connection: AsyncConnection, span: KeyInterval, columns: sql.Composable
    ) -> AsyncCursor:
        return await connection.execute(
            sql.SQL("SELECT {} FROM {} WHERE {}{}").format(
                columns,
                self.table.row,
                self.table.within(after_is_known=span.after is not None),
                self.table.and_matches,
            ),
            {"after": span.after, "through": span.through},
        )


class PostgresWriter:
    """Writes ranges for as long as the lease holds."""

    def __init__(
        self,
        pool: AsyncConnectionPool,
        update: RangeUpdate,
        lease: Lease,
        on_commit: OnCommit | None = None,
    ) -> None:
        self._pool = pool
        self._update = update
        self._lease = lease
        self._on_commit = on_commit

    async def rewrite(self, key_range: KeyRange) -> int:
        """Give a range's rows new values and checkpoint it, in one transaction; then call the callback.

        Returns:
            How many rows got a new value.

        Raises:
            RowsLockedError: Another session holds rows of it; nothing was written.
            RangeRejectedError: The server refused it; nothing was written.
            OldValuesKeptError: Triggers put the old values back; nothing was written.
            SupersededError: Another process owns the rotation; nothing was written.
            ValuesError: There is something wrong with the new values; nothing was written.
            ServerRefusedError: The server refuses for good; nothing was written.
            ServerLostError: Nobody knows but the checkpoints.
        """
        rows = await self._write(key_range)
        if self._on_commit is not None:
            await self._on_commit(
                RowsRotated(
                    rotation=self._lease.rotation,
                    after=key_range.after,
                    through=key_range.through,
                    rows=rows,
                )
            )
        return rows

    async def _write(self, key_range: KeyRange) -> int:
        started = time.monotonic()
        rows = key_range.rows
        reason, kept_before = "", False
        for _ in range(_ATTEMPTS):
            new_values = await self._update.make(key_range, rows)
            async with (
                translate_errors(),
                self._pool.connection() as connection,
                translate_errors(connection),
            ):
                try:
                    written = await self._update.execute(connection, key_range, new_values, self._lease)
                except RangeGrewError:
                    await connection.rollback()
                    reason = "rows keep coming into the range"
                    rows = await self._update.count(connection, key_range)
                except _RowsKeptError:
                    await connection.rollback()
                    # Once may be chance, where the server rounds what it is given.
                    if kept_before:
                        triggers = await read_update_triggers(connection, self._update.table)
                        raise OldValuesKeptError(f"in the range {key_range}", triggers) from None
                    kept_before = True
                except _RowsRepeatedError:
                    await connection.rollback()
                    reason = _REPEATED
                except _UncomparedError:
                    await connection.rollback()
                else:
                    await self._commit(connection, key_range, written, time.monotonic() - started)
                    return written.rows
        raise RangeRejectedError(reason or SUPPRESSED, retryable=True)

    async def _commit(
        self, connection: AsyncConnection, key_range: KeyRange, written: Written, seconds: float
    ) -> None:
        async with connection.pipeline():
            await connection.execute(
                "INSERT INTO rotator_completedrange"
                " (rotation_id, after, through, rows, seconds, xid, has_other_writes)"
                " VALUES (%s, %s::jsonb, %s::jsonb, %s, %s, pg_current_xact_id()::text::bigint, %s)",
                (
                    self._lease.rotation,
                    key_range.after,
                    key_range.through,
                    written.rows,
                    seconds,
                    written.has_other_writes,
                ),
            )
            await connection.execute("COMMIT")


async def _number(cursor: AsyncCursor) -> int:
    row = await cursor.fetchone()
    return int(row[0]) if row else 0
