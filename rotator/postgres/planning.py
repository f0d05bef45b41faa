"""Reads ranges from the key's index, and what is left to do from the checkpoints."""

import asyncio
from contextlib import suppress
from typing import Final

from psycopg import AsyncConnection, AsyncCursor, sql

from rotator.errors import RangeTooSlowError
from rotator.keys import Key, KeyRange, KeySpan
from rotator.postgres.failures import ANSWER_SECONDS, answered
from rotator.postgres.relations import LEAVES
from rotator.postgres.table import TargetTable, identifier

# A role's own timeouts are for the application's statements.
_PLANNING_LIMITS: Final = (
    "SELECT set_config('lock_timeout', '1s', true),"
    f" set_config('statement_timeout', '{ANSWER_SECONDS * 1000:.0f}ms', true)"
).encode()


class IndexPlanner:
    """Plans ranges by short queries over the key's index; no cursor, no arithmetic on keys."""

    def __init__(self, connection: AsyncConnection, table: TargetTable) -> None:
        """Take a connection in autocommit mode, for this planner's use alone."""
        self._connection = connection
        # Workers that split a range ask, too.
        self._one_at_a_time = asyncio.Lock()
        # Written out once: putting a statement together takes as long as sending it.
        self._last_keys = {
            known: self._last_key(table, after_is_known=known).as_bytes() for known in (False, True)
        }
        self._counts = {known: self._count(table, after_is_known=known).as_bytes() for known in (False, True)}

    @staticmethod
    def _last_key(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
        # The JSON outside, or the server makes one of every key that it skips.
        return sql.SQL(
            "SELECT {} FROM (SELECT {} FROM {} WHERE {} ORDER BY {} OFFSET %(skip)s LIMIT 1) AS last"
        ).format(
            table.key_json,
            table.key_columns,
            table.name,
            table.within(after_is_known=after_is_known),
            table.key_columns,
        )

    @staticmethod
    def _count(table: TargetTable, *, after_is_known: bool) -> sql.Composed:
        return sql.SQL("SELECT count(*) FROM {} WHERE {}").format(
            table.name, table.within(after_is_known=after_is_known)
        )

    async def next_range(self, span: KeySpan, batch: int) -> KeyRange:
        """The first ``batch`` rows of a span, or the whole of it where it holds fewer, or none.

        Raises:
            RowsLockedError: Somebody else has locked the whole table, as DDL does.
        """
        is_known, connection = span.after is not None, self._connection
        parameters = {"after": span.after, "through": span.through, "skip": batch - 1}
        async with (
            self._one_at_a_time,
            answered(connection),
            connection.pipeline(),
            connection.transaction(),
        ):
            await connection.execute(_PLANNING_LIMITS)
            cursor = await connection.execute(self._last_keys[is_known], parameters)
            last = await cursor.fetchone()
            if last is not None:
                return KeyRange(after=span.after, through=Key(last[0]), rows=batch)
            cursor = await connection.execute(self._counts[is_known], parameters)
            return KeyRange(after=span.after, through=span.through, rows=await _number(cursor))


async def last_key(connection: AsyncConnection, table: TargetTable) -> Key | None:
    """The highest key that the table holds now; None where it is empty."""
    descending = sql.SQL(", ").join(
        sql.SQL("{} DESC").format(identifier(column.name)) for column in table.key
    )
    async with answered(connection):
        cursor = await connection.execute(
            sql.SQL("SELECT {} FROM {} ORDER BY {} LIMIT 1").format(table.key_json, table.name, descending),
            {},
        )
        row = await cursor.fetchone()
    return Key(row[0]) if row is not None else None


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
        async with answered(connection), connection.transaction():
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
    async with answered(connection):
        cursor = await connection.execute(
            sql.SQL(
                "SELECT COALESCE(sum(GREATEST(reltuples, 0)), 0)::bigint FROM pg_class WHERE oid IN {}"
            ).format(LEAVES),
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
) -> list[KeySpan]:
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
    async with answered(connection):
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
        KeySpan(after=Key(after) if after is not None else None, through=Key(through))
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
