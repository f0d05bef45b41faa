"""Plans ranges from the key's index, and reads the gaps that no checkpoint covers."""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.abc import Params
from psycopg.rows import class_row

from rotator.exceptions import RangeTooSlowError, TargetError
from rotator.postgres.connection import begin, fetch_as, fetch_column, fetch_rows, set_local, transaction_with
from rotator.postgres.errors import ANSWER_SECONDS
from rotator.postgres.fence import KEY_SETTINGS, rolled_back_on_error
from rotator.postgres.table import TargetTable, identifier, range_rows
from rotator.ranges import Key, KeyInterval, KeyRange

# The planner plans this far ahead: one round trip to a distant server then plans many ranges.
_AHEAD_ROWS: Final = 20_000
_MAX_RANGES_AHEAD: Final = 16

_PLANNING_SETTINGS: Final = {
    **KEY_SETTINGS,
    # A role's own timeouts are meant for the application's statements.
    "lock_timeout": "1s",
    "statement_timeout": f"{ANSWER_SECONDS * 1000:.0f}ms",
    # Only the key's index tells where a range ends without reading the rows after it.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    "jit": "off",
}
_ESTIMATE: Final = (
    "SELECT COALESCE(sum(GREATEST(reltuples, 0)), 0)::bigint FROM pg_class WHERE oid IN {partitions}"
)
_TEXT: Final = "rotator_text"


class IndexPlanner:
    """Plans ranges by short queries over the key's index, without a cursor or arithmetic on keys."""

    def __init__(
        self, connection: AsyncConnection, table: TargetTable, *, seconds: float = ANSWER_SECONDS
    ) -> None:
        """Take a connection for this planner's use alone.

        The server's limit for each statement is ``seconds``. By default, this process takes the server for
        lost first.
        """
        self._connection = connection
        self._settings = {**_PLANNING_SETTINGS, "statement_timeout": f"{seconds * 1000:.0f}ms"}
        # Workers that split a range use the planner, too.
        self._one_at_a_time = asyncio.Lock()
        self._ahead = deque[KeyRange]()
        self._expected: KeyInterval | None = None
        # Formatted once: formatting a statement takes as long as sending it.
        self._last_keys = {
            known: last_keys(table, after_is_known=known).as_bytes() for known in (False, True)
        }
        self._counts = {
            known: table.compose(
                "SELECT count(*) FROM {row} WHERE {within}", within=table.within(after_is_known=known)
            ).as_bytes()
            for known in (False, True)
        }

    async def next_range(self, interval: KeyInterval, batch: int) -> KeyRange:
        """Return the first ``batch`` rows of an interval, or the whole interval where it holds fewer rows.

        A caller that continues where the last range ended gets a range that was planned ahead.

        Raises:
            RowsLockedError: Another session has locked the whole table, as DDL does.
            RangeTooSlowError: A statement exceeded the server's limit.
            TargetError: A key does not survive as text.
        """
        async with self._one_at_a_time:
            continues = interval == self._expected
            if continues:
                if not self._ahead or self._ahead[0].rows != batch:
                    most = min(_MAX_RANGES_AHEAD, _AHEAD_ROWS // batch)
                    self._ahead = deque(await self._plan(interval, batch, ranges=max(1, most)))
                planned = self._ahead.popleft()
            else:
                (planned,) = await self._plan(interval, batch, ranges=1)
            # A worker that splits a range in the meantime does not change the ranges that are planned ahead.
            if continues or not self._ahead:
                self._expected = KeyInterval(after=planned.through, through=interval.through)
            return planned

    async def _plan(self, interval: KeyInterval, batch: int, *, ranges: int) -> list[KeyRange]:
        is_known = interval.after is not None
        parameters = {**asdict(interval), "skip": batch - 1, "ranges": ranges}
        found = await self._fetch(self._last_keys[is_known], parameters)
        keys = [_checked(key, survives=survives) for _, key, survives in sorted(found)]
        if not keys:
            ((rows,),) = await self._fetch(self._counts[is_known], parameters)
            return [KeyRange(after=interval.after, through=interval.through, rows=rows)]
        return [
            KeyRange(after=after, through=through, rows=batch)
            for after, through in zip([interval.after, *keys], keys, strict=False)
        ]

    async def _fetch(self, query: bytes | sql.Composed, parameters: Params) -> list[tuple[Any, ...]]:
        """Fetch rows with the planner's settings, in one round trip, so no lock outlasts it."""
        connection = self._connection
        async with rolled_back_on_error(connection), connection.pipeline():
            await begin(connection)
            await set_local(connection, self._settings)
            cursor = await connection.execute(query, parameters)
            await connection.execute("COMMIT")
        return await cursor.fetchall()


def last_keys(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
    """Select the keys at which the next full ranges of an interval end.

    Each row has the number of the range, the key, and whether the key survives as text.

    Parameters: ``after`` and ``through`` (keys), ``skip`` (the rows of a range, less one) and ``ranges`` (the
    largest number of ranges).
    """
    return table.compose(
        "WITH RECURSIVE rotator_planned ({position}, {key}) AS ("
        "(SELECT 1, {row_key} FROM {row} WHERE {within} ORDER BY {row_key} OFFSET %(skip)s LIMIT 1)"
        " UNION ALL SELECT rotator_planned.{position} + 1, {next_key} FROM rotator_planned, LATERAL ("
        "SELECT {row_key} FROM {row} WHERE ({row_key}) > ({planned_key}) AND {to_through}"
        " ORDER BY {row_key} OFFSET %(skip)s LIMIT 1) AS rotator_next"
        " WHERE rotator_planned.{position} < %(ranges)s::integer)"
        # The outer query makes the JSON, because the inner one would make it of every key that it skips.
        " SELECT {position}, {checked} FROM (SELECT *, {json} AS {text} FROM rotator_planned) AS planned",
        position=table.own_name("rotator_position"),
        next_key=table.key_columns("rotator_next"),
        planned_key=table.key_columns("rotator_planned"),
        json=table.key_json(),
        text=table.own_name(_TEXT),
        checked=_text_and_survives(table),
        within=table.within(after_is_known=after_is_known),
        to_through=table.within(after_is_known=False),
    )


def _text_and_survives(table: TargetTable) -> sql.Composed:
    """Return a key's text, and whether the key is equal to the one that is read from it."""
    text = table.own_name(_TEXT)
    decoded = table.decoded(sql.SQL("{}::jsonb").format(text))
    return table.compose("{text}, ({key}) = ({decoded})", text=text, decoded=decoded)


async def slice_ends(
    connection: AsyncConnection, statement: bytes, interval: KeyInterval, *, rows: int, most: int
) -> list[Key]:
    """Return the keys at which the first ``most`` slices of ``rows`` rows end, in key order.

    The statement is that of :func:`last_keys`.
    """
    async with transaction_with(connection, _PLANNING_SETTINGS):
        parameters = {**asdict(interval), "skip": rows - 1, "ranges": most}
        found = await fetch_rows(connection, statement, parameters)
    return [_checked(key, survives=survives) for _, key, survives in sorted(found)]


async def last_key(connection: AsyncConnection, table: TargetTable) -> Key | None:
    """Return the highest key in the table; None where the table is empty."""
    descending = sql.SQL(", ").join(
        sql.SQL("{} DESC").format(identifier(column.name)) for column in table.key
    )
    query = table.compose(
        "SELECT {checked} FROM (SELECT *, {json} AS {text} FROM"
        " (SELECT {key} FROM {table} ORDER BY {descending} LIMIT 1) AS last) AS last",
        checked=_text_and_survives(table),
        json=table.key_json(),
        text=table.own_name(_TEXT),
        descending=descending,
    )
    async with transaction_with(connection, KEY_SETTINGS):
        found = await fetch_rows(connection, query)
    return next((_checked(key, survives=survives) for key, survives in found), None)


def _checked(key: str, *, survives: bool) -> Key:
    if not survives:
        raise TargetError(
            f"Cannot end a range at the key {key}: the server reads another key from its text. Rotate by a "
            "model whose key has another type."
        )
    return Key(key)


async def count_rows(
    connection: AsyncConnection, table: TargetTable, bound: Key, *, seconds: float
) -> tuple[int, bool]:
    """Return the number of rows up to the bound, and whether they were counted.

    After ``seconds``, it is the server's estimate for the table.
    """
    query = sql.SQL("SELECT count(*) FROM {}").format(range_rows(table, after_is_known=False))
    if counted := await fetch_within(connection, seconds, query, {"through": bound}):
        return int(counted[0][0]), True
    return await estimate_rows(connection, table), False


async def count_table(connection: AsyncConnection, table: TargetTable, *, seconds: float) -> tuple[int, bool]:
    """Return the number of rows of the whole table, rotated or not, and whether they were counted.

    After ``seconds``, it is the server's estimate.
    """
    query = table.compose("SELECT count(*) FROM {table}")
    if counted := await fetch_within(connection, seconds, query):
        return int(counted[0][0]), True
    (estimated,) = await fetch_column(connection, table.compose(_ESTIMATE))
    return int(estimated), False


async def fetch_within(
    connection: AsyncConnection, seconds: float, query: sql.Composed, parameters: Params = ()
) -> list[tuple[Any, ...]] | None:
    """Return the rows of a query; None where it takes longer than ``seconds``."""
    with suppress(RangeTooSlowError):
        async with transaction_with(connection, {"statement_timeout": f"{seconds * 1000:.0f}ms"}):
            return await fetch_rows(connection, query, parameters)
    return None


async def estimate_rows(connection: AsyncConnection, table: TargetTable) -> int:
    """Return the server's estimate of the rows to rotate; 0 where it has none yet."""
    (rows,) = await fetch_column(connection, table.compose(_ESTIMATE))
    if not rows or table.matches is None:
        return int(rows)
    query = table.compose("EXPLAIN (FORMAT JSON) SELECT FROM {row} WHERE {matches}", matches=table.matches)
    (plan,) = await fetch_column(connection, query)
    return int(plan[0]["Plan"]["Plan Rows"])


async def gaps(
    connection: AsyncConnection,
    table: TargetTable,
    rotation: int,
    bound: Key | None,
    *,
    after: Key | None = None,
    checkpoints_before: int | None = None,
) -> list[KeyInterval]:
    """Return the intervals up to the bound that no checkpoint covers, in key order; none without a bound.

    The server subtracts them, with the key's own order. With ``after``, only the gaps after this key are
    returned. ``checkpoints_before`` is the id of the last checkpoint that covers nothing of them; None where
    all may. The connection may be in a transaction.
    """
    if bound is None:
        return []
    through = table.decoded(sql.Identifier("through"))
    conditions: list[sql.Composable] = [sql.SQL("rotation_id = %(rotation)s AND id > %(checkpoints_before)s")]
    # No checkpoint of the rotation is past its own bound.
    if after is not None or checkpoints_before is not None:
        last = table.decoded(sql.SQL("%(bound)s::jsonb"))
        conditions.append(sql.SQL("({}) <= ({})").format(through, last))
    if after is not None:
        first = table.decoded(sql.SQL("%(after)s::jsonb"))
        conditions.append(sql.SQL("({}) > ({})").format(through, first))
    query = sql.SQL(
        "WITH completed AS (SELECT after, through, lag(through) OVER ordered AS before,"
        " row_number() OVER ordered AS position FROM rotator_completedrange WHERE {conditions}"
        " WINDOW ordered AS (ORDER BY {through})),"
        " gaps AS (SELECT COALESCE(before, %(after)s::jsonb) AS after, after AS through, position"
        " FROM completed UNION ALL SELECT COALESCE((SELECT through FROM completed ORDER BY position"
        " DESC LIMIT 1), %(after)s::jsonb), %(bound)s::jsonb, NULL)"
        " SELECT after::text, through::text FROM gaps"
        " WHERE through IS NOT NULL AND after IS DISTINCT FROM through"
        " ORDER BY position NULLS LAST"
    ).format(through=through, conditions=sql.SQL(" AND ").join(conditions))
    parameters = {
        "rotation": rotation,
        "bound": bound,
        "after": after,
        "checkpoints_before": checkpoints_before or 0,
    }
    return await fetch_as(connection, class_row(KeyInterval), query, parameters)
