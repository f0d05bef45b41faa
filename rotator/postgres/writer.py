"""Gives rows new values: begins a fenced transaction, updates, checks the result and commits."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, LiteralString, TypeAlias

from psycopg import AsyncConnection, AsyncCursor, sql
from psycopg_pool import AsyncConnectionPool

from rotator.events import OnCommit, RowsRotated
from rotator.exceptions import (
    RangeRejectedError,
    RangeTooSlowError,
    TargetError,
    ValuesError,
    ValuesReplacedError,
)
from rotator.options import WaitLimits
from rotator.postgres.catalog import read_update_triggers
from rotator.postgres.errors import ANSWER_SECONDS, SUPPRESSED, TOO_LONG, RangeGrewError, translate_errors
from rotator.postgres.fence import Lease, begin_fenced, rolled_back_on_error
from rotator.postgres.identity import changed_target, replaced
from rotator.postgres.ledger import COUNT_ENTRIES, Ledger, enter_newer_values, enter_values
from rotator.postgres.planner import last_keys, slice_ends
from rotator.postgres.table import (
    ROW,
    TargetTable,
    count_writes,
    identifier,
    keyed_update,
    placed_update,
    range_rows,
    range_update,
    rows_at_places,
    rows_with_keys,
)
from rotator.postgres.values import FromRows, InBulk, Place, ValueSource, named, part
from rotator.ranges import Key, KeyInterval, KeyRange, Written

SLICE_ROWS: Final = 2000
_ATTEMPTS: Final = 5
_GREW: Final = "other sessions keep inserting rows into the range"
_KEPT: Final = "rows still have their old values after the update"
# A trigger that restores the old values of so many rows, and of every row so far, ends the run.
_KEPT_ROWS: Final = 8
_REPEATED: Final = "new values are equal to the old ones"
_EQUAL: Final = "rows have the same value after the update"
_UNCOMPARED: Final = "triggers wrote to the table, and the old values were not read before"
_WRITTEN_BY_TRIGGER: Final = "a trigger wrote other rows of the range"

# Merging two scans of the key's index is the cheapest join of a range, and keeps the key's order. No other
# index may be read, and sorted, for a condition on the rows. Rows with some keys, or at some places, are
# looked up one by one.
_MERGE: Final = {"enable_nestloop": "off", "enable_sort": "off", "enable_incremental_sort": "off"}
_LOOK_UP: Final = {"enable_mergejoin": "off"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OlderRow:
    """A row that no session has written since the rotation began; ``xid`` is its ``xmin``."""

    place: Place
    xid: str
    key: Key


Rows: TypeAlias = KeyRange | Sequence[OlderRow]
"""The rows of one transaction: a range, or rows of one partition at their places."""


class RewriteError(Exception):
    """The rows must not be committed as they were written; another attempt may succeed.

    Attributes:
        condition: What is wrong, in one phrase.
        rows: The number of rows that still have their old values.
    """

    def __init__(self, condition: str, *, rows: int = 0) -> None:
        super().__init__(condition)
        self.condition = condition
        self.rows = rows


class RangeUpdate:
    """Updates rows of one table; the caller commits.

    Attributes:
        has_stored: Whether a row has kept a new value, in this run or before. Triggers do not restore every
            old value then, and rows that they restore are rejected.
    """

    def __init__(
        self,
        table: TargetTable,
        source: ValueSource,
        limits: WaitLimits,
        ledger: Ledger | None = None,
        *,
        keeps_plan: bool = False,
    ) -> None:
        """Prepare the statements.

        Values that the ledger may lack enter it; None where it has all, or there is none. With
        ``keeps_plan``, the server keeps the plan of a range's update instead of making it for each range. A
        kept plan locks all partitions, and the queries of triggers get kept plans too.
        """
        self.table = table
        self._source = source
        self.limits = limits

        def entering(rows: sql.Composable) -> sql.Composed | None:
            return None if ledger is None else enter_newer_values(ledger, table, rows)

        # Formatted once: formatting a statement takes as long as sending it.
        self._range_updates = {
            known: range_update(
                table,
                after_is_known=known,
                transaction_seconds=limits.transaction_seconds,
                entering=entering(range_rows(table, after_is_known=known)),
            ).as_bytes()
            for known in (False, True)
        }
        self._slice_ends = {
            known: last_keys(table, after_is_known=known).as_bytes() for known in (False, True)
        }
        self._locked_keys = {
            known: table.compose(
                # Not by {key}: the column of the JSON can have the name of one of the key's.
                "SELECT {row_json} FROM {rows} ORDER BY {row_key} LIMIT {most} FOR UPDATE",
                rows=range_rows(table, after_is_known=known),
                most=SLICE_ROWS,
            ).as_bytes()
            for known in (False, True)
        }
        self._keyed_update = keyed_update(table, entering(rows_with_keys(table))).as_bytes()
        self._placed_update = placed_update(table).as_bytes()
        placed_rows = table.compose("{placed}{and_matches}", placed=rows_at_places(table))
        self._enter_values = ledger and enter_values(ledger, table, placed_rows).as_bytes()
        self._count_writes = count_writes(table).as_bytes()
        self._digests = table.compose("{row_json}, {digests}", digests=table.digests)
        # Once triggers have written to the table, each transaction reads digests of the old values first.
        self._reads_digests = False
        self.has_stored = False
        self._plan_settings = _MERGE if isinstance(source, InBulk) else _LOOK_UP
        if keeps_plan:
            self._plan_settings = {**self._plan_settings, "plan_cache_mode": "force_generic_plan"}

    async def write(self, connection: AsyncConnection, lease: Lease, rows: Rows) -> Written:
        """Attempt to give rows new values until the result may be committed.

        The transaction is open when this returns, and rolled back when it raises.

        Raises:
            RowsLockedError: Another session has locked some of the rows.
            RangeRejectedError: The server rejected the rows.
            ValuesReplacedError: Triggers restore the old value of every row so far, or store the same
                value in several rows.
            TargetError: Another table has the name now.
            ValuesError: The new values are invalid.
        """
        condition, was_kept = SUPPRESSED, False
        count = rows.rows if isinstance(rows, KeyRange) else len(rows)
        for _ in range(_ATTEMPTS):
            try:
                return await self.attempt(connection, lease, rows, count)
            except RangeGrewError:
                condition = _GREW
                async with translate_errors(connection):
                    cursor = await self._select(connection, rows, sql.SQL("count(*)"))
                    (count,) = await cursor.fetchone() or (0,)
            except RewriteError as error:
                # Once can be chance, where the server rounds a value.
                if error.condition == _EQUAL or (error.condition == _KEPT and was_kept):
                    triggers = await read_update_triggers(connection, self.table)
                    if error.condition == _KEPT and (self.has_stored or error.rows < _KEPT_ROWS):
                        raise RangeRejectedError(_kept_by(triggers), retryable=False) from None
                    where = (
                        f"in the range {rows}"
                        if isinstance(rows, KeyRange)
                        else f"at the keys {rows[0].key} to {rows[-1].key}"
                    )
                    are_equal = error.condition == _EQUAL
                    raise ValuesReplacedError(where, triggers, are_equal=are_equal) from None
                was_kept = was_kept or error.condition == _KEPT
                condition = error.condition
        raise RangeRejectedError(condition, retryable=True)

    async def attempt(
        self, connection: AsyncConnection, lease: Lease | None, rows: Rows, count: int
    ) -> Written:
        """Begin a transaction, update rows, and check that each of them has a new value.

        Without a lease, the caller rolls the transaction back. ``count`` is the number of values to make,
        where they are made in bulk.

        Raises:
            RangeGrewError: A range holds more rows than that.
            RewriteError: The result must not be committed.
        """
        try:
            updates = await self._prepare(connection, rows, count)
            plan_settings = self._plan_settings if isinstance(rows, KeyRange) else _LOOK_UP
            async with rolled_back_on_error(connection):
                async with connection.pipeline():
                    await begin_fenced(connection, lease, self.limits, plan_settings)
                    digests = (
                        await self._select(connection, rows, self._digests) if self._reads_digests else None
                    )
                    if self._enter_values and not isinstance(rows, KeyRange):
                        await connection.execute(self._enter_values, _at(rows))
                    writes_before = await connection.execute(self._count_writes, ())
                    expected, cursors, making_seconds = count, list[AsyncCursor](), 0.0
                    for statement, parameters in updates:
                        cursors.append(connection.cursor())
                        await cursors[-1].executemany(statement, parameters, returning=True)
                    if isinstance(rows, KeyRange) and isinstance(self._source, FromRows):
                        expected, cursors, making_seconds = await self._update_from_rows(
                            connection, rows, self._source
                        )
                    # Deferred triggers would run in the COMMIT, after the checks.
                    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
                    writes_after = await connection.execute(self._count_writes, ())
                results = [await result.fetchone() for cursor in cursors async for result in cursor.results()]
                written, kept, repeated, entered = map(sum, zip(*filter(None, results), strict=True))
                before, *_ = await writes_before.fetchone() or (0,)
                after, seconds, oid = await writes_after.fetchone() or (0, 0.0, 0)
                # By now the table is locked, so its name stays the same.
                if self.table.oid not in (0, oid):
                    raise self._replaced(lease, oid)
                if kept or repeated:
                    self.has_stored = self.has_stored or written > kept + repeated
                    raise RewriteError(_KEPT if kept else _REPEATED, rows=kept)
                has_other_writes = after - before != written
                if written < expected or has_other_writes:
                    await self._check_rows(connection, rows, written)
                if has_other_writes:
                    await self._check_digests(connection, rows, digests)
                # Values that are made from rows are different within a slice only.
                if self.table.has_before_triggers and (
                    count <= SLICE_ROWS or isinstance(self._source, InBulk)
                ):
                    await self._check_distinct(connection, rows)
        except ValuesError as error:
            raise (error.of(rows) if isinstance(rows, KeyRange) else error) from None
        self.has_stored = self.has_stored or written > 0
        return Written(
            rows=written,
            has_other_writes=has_other_writes,
            entered=entered,
            server_seconds=max(0.0, seconds - making_seconds),
        )

    async def _prepare(
        self, connection: AsyncConnection, rows: Rows, count: int
    ) -> list[tuple[bytes, list[dict[str, object]]]]:
        """Make new values, where this does not need locked rows; return statements with their parameters."""
        source = self._source
        if not isinstance(rows, KeyRange):
            at = {row.place: row for row in rows}
            places, at_places = (
                (list(at), await source.make(count))
                if isinstance(source, InBulk)
                else await source.make_at(list(at))
            )
            parameters = _at([at[place] for place in places]) | named(at_places)
            return [(self._placed_update, [parameters])]
        if isinstance(source, FromRows):
            return []
        values, ends = await source.make(count), list[Key]()
        if count > SLICE_ROWS:
            most = -(-count // SLICE_ROWS) - 1
            statement = self._slice_ends[rows.after is not None]
            ends = await slice_ends(connection, statement, rows, rows=SLICE_ROWS, most=most)
        ends = [end for end in ends if end != rows.through] + [rows.through]
        starts = range(0, len(ends) * SLICE_ROWS, SLICE_ROWS)
        slices: list[dict[str, object]] = [
            {
                "after": after,
                "through": through,
                "rows": max(0, min(SLICE_ROWS, count - start)),
                **named(tuple(part(of_column, start, start + SLICE_ROWS) for of_column in values)),
            }
            for start, after, through in zip(starts, [rows.after, *ends], ends, strict=False)
        ]
        # The slice at the table's start has no lower bound, and therefore another statement.
        return [
            (self._range_updates[known], of_statement)
            for known in (False, True)
            if (of_statement := [one for one in slices if (one["after"] is not None) == known])
        ]

    async def _update_from_rows(
        self, connection: AsyncConnection, key_range: KeyRange, source: FromRows
    ) -> tuple[int, list[AsyncCursor], float]:
        """Lock rows in the key's order, make their values, and update them by their keys.

        Return the number of the rows, the updates' cursors, and the seconds in which the server waited for
        new values.
        """
        rest: KeyInterval = key_range
        count, cursors, began, making_seconds = 0, list[AsyncCursor](), time.monotonic(), 0.0
        async with connection.pipeline() as pipeline:
            while True:
                statement = self._locked_keys[rest.after is not None]
                locked = await connection.execute(statement, asdict(rest))
                # Only after a sync does the server limit how long the transaction may be idle.
                await pipeline.sync()
                keys = [Key(key) async for (key,) in locked]
                if cursors and time.monotonic() - began > self.limits.transaction_seconds:
                    raise RangeTooSlowError(TOO_LONG)
                making_since = time.monotonic()
                found, values = await source.make(keys)
                making_seconds += time.monotonic() - making_since
                parameters = {"keys": [str(key) for key in found], **named(values)}
                cursors.append(await connection.execute(self._keyed_update, parameters))
                count += len(keys)
                if len(keys) < SLICE_ROWS:
                    return count, cursors, making_seconds
                rest = KeyInterval(after=keys[-1], through=key_range.through)

    async def _check_rows(self, connection: AsyncConnection, rows: Rows, written: int) -> None:
        """Refuse rows that were not updated, and rows of a range that only a trigger wrote.

        Rows that other sessions have deleted since they were planned are not missed.
        """
        columns = self.table.compose("count(*), count(*) FILTER (WHERE {xmin} = pg_current_xact_id()::xid)")
        found, own = await (await self._select(connection, rows, columns)).fetchone() or (0, 0)
        # A row that was updated is not at its place any more.
        if found > (written if isinstance(rows, KeyRange) else 0):
            raise RangeRejectedError(SUPPRESSED, retryable=True)
        if own > written:
            raise RangeRejectedError(_WRITTEN_BY_TRIGGER, retryable=False)

    async def _check_digests(
        self, connection: AsyncConnection, rows: Rows, before: AsyncCursor | None
    ) -> None:
        """Refuse rows that have old values: triggers ran after the update that returned its result."""
        if before is None:
            self._reads_digests = True
            raise RewriteError(_UNCOMPARED)
        old, kept = {key: digests async for key, digests in before}, list[bool]()
        async for key, digests in await self._select(connection, rows, self._digests, keys=list(old)):
            # Another session can have inserted a row since.
            if key in old:
                pairs = zip(old[key], digests, strict=True)
                kept.append(any(was is not None and was == now for was, now in pairs))
        if any(kept):
            self.has_stored = self.has_stored or not all(kept)
            raise RewriteError(_KEPT, rows=sum(kept))

    def _replaced(self, lease: Lease | None, oid: int) -> TargetError:
        """Return the error for another table that has the target's name now."""
        difference = replaced(oid=oid, before=self.table.oid)
        if lease is None:
            return TargetError(
                f"Cannot rotate {self.table.found_name}: {difference}. Run the same command again."
            )
        return changed_target(lease.rotation, self.table.found_name, difference)

    async def _check_distinct(self, connection: AsyncConnection, rows: Rows) -> None:
        """Refuse equal values: those that were assigned are different, so a trigger has stored others.

        With several columns, the new values of a row are different together. A row that keeps a NULL or an
        empty text in one of them is left out.
        """
        names = [identifier(ROW, column.name) for column in self.table.columns]
        conditions: list[sql.Composable] = [self.table.compose("{xmin} = pg_current_xact_id()::xid")]
        conditions += [sql.SQL("{} IS NOT NULL").format(name) for name in names]
        if len(names) > 1:
            conditions += [sql.SQL("{}::text <> ''").format(name) for name in names]
        columns = sql.SQL(
            "count(*) FILTER (WHERE {is_own}), count(DISTINCT ROW({values})::text) FILTER (WHERE {is_own})"
        ).format(is_own=sql.SQL(" AND ").join(conditions), values=sql.SQL(", ").join(names))
        keys = None if isinstance(rows, KeyRange) else [str(row.key) for row in rows]
        # A row that has an empty text now matches no more.
        cursor = await self._select(connection, rows, columns, keys=keys, and_matches=sql.SQL(""))
        stored, distinct = await cursor.fetchone() or (0, 0)
        if distinct < stored:
            raise RewriteError(_EQUAL)

    async def _select(
        self,
        connection: AsyncConnection,
        rows: Rows,
        columns: sql.Composable,
        *,
        keys: list[str] | None = None,
        and_matches: sql.Composable | None = None,
    ) -> AsyncCursor:
        """Select columns of the rows; by these keys where the rows have left their places."""
        table = self.table
        if isinstance(rows, KeyRange):
            within = table.within(after_is_known=rows.after is not None)
            found: sql.Composable = table.compose("{row} WHERE {within}", within=within)
            parameters: dict[str, object] = asdict(rows)
        elif keys is None:
            found, parameters = rows_at_places(table), _at(rows)
        else:
            found, parameters = rows_with_keys(table), {"keys": keys}
        return await connection.execute(
            sql.SQL("SELECT {} FROM {}{}").format(
                columns, found, table.and_matches if and_matches is None else and_matches
            ),
            parameters,
        )

    async def planning_seconds(self, connection: AsyncConnection, key: Key) -> float:
        """Measure the time that the server takes to plan the update of a slice, with any key."""
        is_bulk = isinstance(self._source, InBulk)
        statement = self._range_updates[True] if is_bulk else self._keyed_update
        no_values = named(tuple([] for _ in self.table.columns))
        parameters = {"after": key, "through": key, "rows": 0, "keys": [], **no_values}
        limits = replace(self.limits, statement_seconds=ANSWER_SECONDS)
        async with rolled_back_on_error(connection):
            await begin_fenced(connection, None, limits, self._plan_settings)
            cursor = await connection.execute(b"EXPLAIN (SUMMARY, FORMAT JSON) " + statement, parameters)
            ((plan,),) = await cursor.fetchall()
            await connection.rollback()
        return float(plan[0]["Planning Time"]) / 1000


async def write_range(
    pool: AsyncConnectionPool,
    update: RangeUpdate,
    lease: Lease,
    on_commit: OnCommit | None,
    key_range: KeyRange,
) -> Written:
    """Give a range's rows new values and checkpoint it, in one transaction.

    Call ``on_commit`` after the commit; a crash in between skips the call.

    Raises:
        SupersededError: Another process owns the rotation; nothing was written.
        ServerLostError: Only the checkpoints tell whether the range was committed.
        RotatorError: Every other error of :meth:`RangeUpdate.write`; nothing was written.
    """
    started, rotation = time.monotonic(), lease.rotation
    async with translate_errors(seconds=None), pool.connection() as connection:
        written = await update.write(connection, lease, key_range)
        async with rolled_back_on_error(connection), connection.pipeline():
            await connection.execute(
                "INSERT INTO rotator_completedrange"
                " (rotation_id, after, through, rows, seconds, xid, has_other_writes)"
                " VALUES (%s, %s::jsonb, %s::jsonb, %s, %s, pg_current_xact_id()::text::bigint, %s)",
                (
                    rotation,
                    key_range.after,
                    key_range.through,
                    written.rows,
                    time.monotonic() - started,
                    written.has_other_writes,
                ),
            )
            if written.entered:
                # Last, since all ranges that enter values update the same row.
                await connection.execute(COUNT_ENTRIES, (written.entered, rotation))
            await connection.execute("COMMIT")
    if on_commit is not None:
        after, through = key_range.after, key_range.through
        await on_commit(RowsRotated(rotation=rotation, after=after, through=through, rows=written.rows))
    return written


async def write_placed(
    connection: AsyncConnection,
    update: RangeUpdate,
    lease: Lease,
    on_commit: OnCommit | None,
    rows: Sequence[OlderRow],
    *,
    verification: int | None = None,
) -> Written:
    """Give rows of one leaf new values, and record the transaction in itself.

    Rows that were deleted, or written by another session since they were found, are left out.
    ``verification`` is the id of the verification that found them as survivors; None where none did.

    Raises:
        RotatorError: An error of :meth:`RangeUpdate.write`; nothing was written.
    """
    written = await update.write(connection, lease, rows)
    count: LiteralString = "UPDATE rotator_rotation SET late_rows = late_rows + %s WHERE id = %s"
    if verification is not None:
        count = "UPDATE rotator_verification SET repaired = repaired + %s WHERE id = %s"
    async with rolled_back_on_error(connection), connection.pipeline():
        await connection.execute(count, (written.rows, verification or lease.rotation))
        # Where triggers wrote too, their rows and these have the same xmin: none is confirmed.
        if not written.has_other_writes:
            await connection.execute(
                "INSERT INTO rotator_latetransaction (rotation_id, xid, rows)"
                " VALUES (%s, pg_current_xact_id()::text::bigint, %s)",
                (lease.rotation, written.rows),
            )
        await connection.execute("COMMIT")
    if on_commit is not None:
        keys = tuple(row.key for row in rows)
        await on_commit(RowsRotated(rotation=lease.rotation, keys=keys, rows=written.rows))
    return written


def _kept_by(triggers: Sequence[str]) -> str:
    """Return the condition of rows whose old values the server has restored, with the triggers' names."""
    if not triggers:
        return f"{_KEPT}, although the table has no trigger that could restore them"
    return f"{_KEPT}, because one of the triggers that an update fires restores them: {', '.join(triggers)}"


def _at(rows: Sequence[OlderRow]) -> dict[str, object]:
    """Return the parameters that name row versions by their places, ``xmin`` and keys."""
    return {
        "leaves": [row.place.leaf for row in rows],
        "ctids": [row.place.ctid for row in rows],
        "xids": [row.xid for row in rows],
        "keys": [str(row.key) for row in rows],
    }
