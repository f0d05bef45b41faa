"""Plans ranges from the key's index, and reads the gaps that no checkpoint covers."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Final

from psycopg import AsyncConnection, AsyncCursor, sql

from rotator.exceptions import RangeTooSlowError, TargetError
from rotator.postgres.errors import ANSWER_SECONDS, translate_errors
from rotator.postgres.fence import KEY_SETTINGS
from rotator.postgres.table import PARTITIONS, ROW, TargetTable, identifier
from rotator.ranges import Key, KeyInterval, KeyRange

# So far the planner looks ahead: a way to the server that delays everything then delays many ranges at once.
_AHEAD_ROWS: Final = 20_000
_MAX_RANGES_AHEAD: Final = 16


def _settings(settings: dict[str, str]) -> bytes:
    """Write the statement that changes settings for one transaction."""
    return (
        sql.SQL("SELECT {}")
        .format(
            sql.SQL(", ").join(
                sql.SQL("set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(setting))
                for name, setting in settings.items()
            )
        )
        .as_bytes()
    )


_READING_SETTINGS: Final = _settings(KEY_SETTINGS)
_PLANNING_SETTINGS: Final = _settings(
    {
        **KEY_SETTINGS,
        # A role's own timeouts are for the application's statements.
        "lock_timeout": "1s",
        "statement_timeout": f"{ANSWER_SECONDS * 1000:.0f}ms",
        # Only the key's index says where a range ends without reading what comes after it.
        "enable_seqscan": "off",
        "enable_bitmapscan": "off",
        "enable_sort": "off",
        "jit": "off",
    }
)

_PLANNED: Final = "rotator_planned"
_NEXT: Final = "rotator_next"
_POSITION: Final = "rotator_position"
_TEXT: Final = "rotator_text"


class IndexPlanner:
    """Plans ranges by short queries over the key's index; no cursor, no arithmetic on keys."""

    def __init__(self, connection: AsyncConnection, table: TargetTable) -> None:
        """Take a connection in autocommit mode, for this planner's use alone."""
        self._connection = connection
        # Workers that split a range ask, too.
        self._one_at_a_time = asyncio.Lock()
        self._ahead = deque[KeyRange]()
        self._ahead_batch = 0
        self._expected: KeyInterval | None = None
        # Written out once: putting a statement together takes as long as sending it.
        self._last_keys = {
            known: last_keys(table, after_is_known=known).as_bytes() for known in (False, True)
        }
        self._counts = {known: self._count(table, after_is_known=known).as_bytes() for known in (False, True)}

    @staticmethod
    def _count(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
        return sql.SQL("SELECT count(*) FROM {} WHERE {}").format(
            table.name, table.within(after_is_known=after_is_known)
        )

    async def next_range(self, span: KeyInterval, batch: int) -> KeyRange:
        """The first ``batch`` rows of a span, or the whole of it where it holds fewer, or none.

        Who goes on where the range before ended is translate_errors from what was planned ahead.

        Raises:
            RowsLockedError: Another session has locked the whole table, as DDL does.
            TargetError: A key does not survive as text.
        """
        async with self._one_at_a_time:
            goes_on = span == self._expected
            if goes_on and batch != self._ahead_batch:
                self._ahead.clear()
            if goes_on and not self._ahead:
                most = min(_MAX_RANGES_AHEAD, _AHEAD_ROWS // batch)
                self._ahead.extend(await self._plan(span, batch, ranges=max(1, most)))
                self._ahead_batch = batch
            if goes_on:
                planned = self._ahead.popleft()
            else:
                (planned,) = await self._plan(span, batch, ranges=1)
            # Whoever splits a range in between leaves what was planned ahead as it is.
            if goes_on or not self._ahead:
                self._expected = KeyInterval(after=planned.through, through=span.through)
            return planned

    async def _plan(self, span: KeyInterval, batch: int, *, ranges: int) -> list[KeyRange]:
        connection, is_known = self._connection, span.after is not None
        parameters = {
            "after": span.after,
            "through": span.through,
            "skip": batch - 1,
            "ranges": ranges,
        }
        async with translate_errors(connection), connection.pipeline(), connection.transaction():
            await connection.execute(_PLANNING_SETTINGS)
            cursor = await connection.execute(self._last_keys[is_known], parameters)
            keys = [_checked(key, survives=survives) for _, key, survives in sorted(await cursor.fetchall())]
            if not keys:
                cursor = await connection.execute(self._counts[is_known], parameters)
                return [KeyRange(after=span.after, through=span.through, rows=await _number(cursor))]
        return [
            KeyRange(after=after, through=through, rows=batch)
            for after, through in zip([span.after, *keys], keys, strict=False)
        ]


def last_keys(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
    """The keys at which the next ranges of a span end, as far as these are full.

    Each comes after its number, and before whether it survives as text.

    Parameters: ``after`` and ``through`` (keys), ``skip`` (one less than the rows of a range) and ``ranges``
    (how many of them at the most).
    """
    following = sql.SQL("({}) > ({}) AND {}").format(
        table.key_columns_of(ROW),
        table.key_columns_of(_PLANNED),
        table.within(after_is_known=False, alias=ROW),
    )
    return sql.SQL(
        "WITH RECURSIVE {planned} ({position}, {key}) AS ("
        "(SELECT 1, {key} FROM {table} WHERE {within} ORDER BY {key} OFFSET %(skip)s LIMIT 1)"
        " UNION ALL SELECT {planned}.{position} + 1, {next_key} FROM {planned}, LATERAL ("
        "SELECT {row_key} FROM {row} WHERE {following} ORDER BY {row_key} OFFSET %(skip)s LIMIT 1) AS {next}"
        " WHERE {planned}.{position} < %(ranges)s::integer)"
        # The JSON outside, or the server makes one of every key that it skips.
        " SELECT {position}, {text}, {survives} FROM (SELECT *, {json} AS {text} FROM {planned}) AS {planned}"
    ).format(
        planned=identifier(_PLANNED),
        next=identifier(_NEXT),
        position=identifier(_POSITION),
        key=table.key_columns,
        next_key=table.key_columns_of(_NEXT),
        row_key=table.key_columns_of(ROW),
        json=table.key_json,
        text=identifier(_TEXT),
        survives=table.survives_as_text(sql.SQL("{}::jsonb").format(identifier(_TEXT))),
        table=table.name,
        row=table.row,
        within=table.within(after_is_known=after_is_known),
        following=following,
    )


async def slice_ends(
    connection: AsyncConnection, table: TargetTable, span: KeyInterval, *, rows: int, most: int
) -> list[Key]:
    """The keys at which the full slices of a span end, in key order.

    Args:
        connection: In autocommit mode.
        table: The target's table.
        span: The span.
        rows: The number of rows in a slice.
        most: The largest number of slices.
    """
    statement = last_keys(table, after_is_known=span.after is not None)
    async with translate_errors(connection), connection.transaction():
        await connection.execute(_PLANNING_SETTINGS)
        cursor = await connection.execute(
            statement, {"after": span.after, "through": span.through, "skip": rows - 1, "ranges": most}
        )
        return [_checked(key, survives=survives) for _, key, survives in sorted(await cursor.fetchall())]


async def last_key(connection: AsyncConnection, table: TargetTable) -> Key | None:
    """The highest key that the table holds now; None where it is empty."""
    descending = sql.SQL(", ").join(
        sql.SQL("{} DESC").format(identifier(column.name)) for column in table.key
    )
    async with translate_errors(connection), connection.transaction():
        await connection.execute(_READING_SETTINGS)
        cursor = await connection.execute(
            sql.SQL(
                "SELECT {text}, {survives} FROM (SELECT *, {json} AS {text} FROM"
                " (SELECT {key} FROM {table} ORDER BY {descending} LIMIT 1) AS {last}) AS {last}"
            ).format(
                text=identifier(_TEXT),
                survives=table.survives_as_text(sql.SQL("{}::jsonb").format(identifier(_TEXT))),
                json=table.key_json,
                key=table.key_columns,
                table=table.name,
                descending=descending,
                last=identifier(_NEXT),
            ),
            {},
        )
        row = await cursor.fetchone()
    return None if row is None else _checked(row[0], survives=row[1])


def _checked(key: str, *, survives: bool) -> Key:
    """Return a key that means the same row once it comes back to the server.

    Raises:
        TargetError: It does not.
    """
    if not survives:
        raise TargetError(
            f"The key {key} is not equal to itself once it has been written as text and read again, so no "
            "range can end there: rotate by a model whose key has another type."
        )
    return Key(key)


async def count_rows(
    connection: AsyncConnection, table: TargetTable, bound: Key, *, seconds: float
) -> tuple[int, bool]:
    """How many rows there are up to the bound, and whether that is exact.

    Args:
        connection: In autocommit mode.
        table: The target's table.
        bound: The upper key bound.
        seconds: How long to count; then it is the server's own estimate for the table.
    """
    with suppress(RangeTooSlowError):
        async with translate_errors(connection), connection.transaction():
            await connection.execute(
                "SELECT set_config('statement_timeout', %s, true)", (f"{seconds * 1000:.0f}ms",)
            )
            counted = await connection.execute(
                sql.SQL("SELECT count(*) FROM {} WHERE {}{}").format(
                    table.row, table.within(after_is_known=False), table.and_matches
                ),
                {"through": bound},
            )
            return await _number(counted), True
    return await estimate_rows(connection, table), False


async def estimate_rows(connection: AsyncConnection, table: TargetTable) -> int:
    """How many rows the server believes are to be rotated; 0 where it has yet to find out."""
    async with translate_errors(connection):
        cursor = await connection.execute(
            sql.SQL(
                "SELECT COALESCE(sum(GREATEST(reltuples, 0)), 0)::bigint FROM pg_class WHERE oid IN {}"
            ).format(PARTITIONS),
            {"table": table.regclass},
        )
        rows = await _number(cursor)
        if not rows or table.matches is None:
            return rows
        cursor = await connection.execute(
            sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {}").format(table.row, table.matches), {}
        )
        ((plan,),) = await cursor.fetchall()
        return int(plan[0]["Plan"]["Plan Rows"])


async def gaps(
    connection: AsyncConnection,
    table: TargetTable,
    rotation: int,
    bound: Key,
    *,
    after: Key | None = None,
    checkpoints_before: int | None = None,
) -> list[KeyInterval]:
    """The spans up to the bound that no checkpoint covers, in key order.

    Subtracted by the server, which alone knows the order of the keys.

    Args:
        connection: In autocommit mode, or in a transaction.
        table: The target's table.
        rotation: The rotation's id.
        bound: The last key that matters.
        after: The last key that does not; None for the table's start.
        checkpoints_before: Checkpoints up to this id cover nothing of it; None where they all may.
    """
    order = sql.SQL("ORDER BY {}").format(table.decoded(sql.Identifier("through")))
    # No checkpoint of the rotation is past its own bound.
    is_whole = after is None and checkpoints_before is None
    async with translate_errors(connection):
        cursor = await connection.execute(
            sql.SQL(
                "WITH completed AS (SELECT after, through, lag(through) OVER ordered AS before,"
                " row_number() OVER ordered AS position FROM rotator_completedrange"
                " WHERE rotation_id = %(rotation)s AND id > %(checkpoints_before)s{within}"
                " WINDOW ordered AS ({order})),"
                " gaps AS (SELECT COALESCE(before, %(after)s::jsonb) AS after, after AS through, position "
                "FROM completed UNION ALL SELECT COALESCE((SELECT through FROM completed ORDER BY position "
                "DESC LIMIT 1), %(after)s::jsonb), %(bound)s::jsonb, NULL)"
                " SELECT after::text, through::text FROM gaps"
                " WHERE through IS NOT NULL AND after IS DISTINCT FROM through"
                " ORDER BY position NULLS LAST"
            ).format(
                order=order,
                within=sql.SQL("") if is_whole else _checkpoint_within(table, after),
            ),
            {
                "rotation": rotation,
                "bound": bound,
                "after": after,
                "checkpoints_before": checkpoints_before or 0,
            },
        )
        found = await cursor.fetchall()
    return [
        KeyInterval(after=Key(after) if after is not None else None, through=Key(through))
        for after, through in found
    ]


def _checkpoint_within(table: TargetTable, after: Key | None) -> sql.Composable:
    through = table.decoded(sql.Identifier("through"))
    within = sql.SQL(" AND ({}) <= ({})").format(through, table.decoded(sql.SQL("%(bound)s::jsonb")))
    if after is None:
        return within
    return within + sql.SQL(" AND ({}) > ({})").format(through, table.decoded(sql.SQL("%(after)s::jsonb")))


async def _number(cursor: AsyncCursor) -> int:
    row = await cursor.fetchone()
    return int(row[0]) if row else 0
