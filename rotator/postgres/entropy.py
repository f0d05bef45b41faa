"""Refuses columns whose values can be guessed: a digest of such a value is as good as the value.

The salt is on the same server as the digests. So it protects only values of which there are too many to try.
"""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.exceptions import TargetError
from rotator.postgres.connection import fetch_rows
from rotator.postgres.planner import estimate_rows
from rotator.postgres.table import ROW, Column, TargetTable, identifier

MIN_BITS: Final = 64
SAMPLE_ROWS: Final = 1000
# Below this number of values, the characters at one position say little about those that are possible there.
MIN_POSITIONAL_VALUES: Final = 256
MIN_REPEATABLE_VALUES: Final = 20
MOST_WEAK_PART: Final = 0.01
MOST_REPEATED_PART: Final = 0.1
_ROWS_READ: Final = 20_000
# Other types have at most 2^64 values, or several stored forms of one value.
_TYPES: Final = ("uuid", "text", "varchar", "bpchar", "citext", "bytea", "numeric")

# Only numbers leave the server.
_SAMPLE: Final = (
    'WITH sample AS MATERIALIZED (SELECT {text} COLLATE "C" AS value FROM {row}'
    " TABLESAMPLE SYSTEM (%(percent)s) WHERE {is_rotated} LIMIT {rows}),"
    " measured AS (SELECT value, length(value) AS length, log(2, CASE WHEN value ~ '^[0-9]*$' THEN 10"
    " WHEN value ~* '^[0-9a-f-]*$' THEN 16 ELSE GREATEST(2, CASE WHEN value ~ '[0-9]' THEN 10 ELSE 0 END"
    " + CASE WHEN value ~ '[a-z]' THEN 26 ELSE 0 END + CASE WHEN value ~ '[A-Z]' THEN 26 ELSE 0 END"
    " + CASE WHEN value ~ '[^0-9a-zA-Z]' THEN 8 ELSE 0 END) END::numeric) AS bits FROM sample),"
    " shortest AS (SELECT percentile_disc(0.05) WITHIN GROUP (ORDER BY length) AS length FROM measured),"
    " positions AS (SELECT count(DISTINCT c.character) AS characters FROM sample,"
    " LATERAL unnest(string_to_array(value, NULL)) WITH ORDINALITY AS c (character, place)"
    " WHERE c.place <= (SELECT length FROM shortest) GROUP BY c.place)"
    " SELECT count(*), count(DISTINCT value), count(*) FILTER (WHERE length * bits < {bits}),"
    " COALESCE((SELECT sum(log(2, characters::numeric)) FROM positions), 0)::double precision FROM measured"
)


async def check_not_guessable(connection: AsyncConnection, table: TargetTable) -> None:
    """Refuse a column with fewer than 2^64 possible values, by its type and by a sample.

    Raises:
        TargetError: The values of a column can be guessed; nothing was changed.
    """
    for column in table.columns:
        reason = await _reason(connection, table, column)
        if reason:
            raise TargetError(
                f"Cannot prove a rotation of the column {column.name} of {table.found_name}: {reason}. Who "
                "can read the ledger could try all values. Rotate it without --prove."
            )


async def _reason(connection: AsyncConnection, table: TargetTable, column: Column) -> str:
    """Return why the values of a column can be guessed; an empty text where they cannot."""
    if column.type_name not in _TYPES:
        return f"its type {column.type_name} has too few possible values"
    rows, distinct, weak, bits = await _measure(connection, table, column)
    if weak > rows * MOST_WEAK_PART:
        return (
            f"{weak:,} of {rows:,} sampled values are so short that there are fewer than 2^{MIN_BITS} "
            "possible ones"
        )
    if rows >= MIN_REPEATABLE_VALUES and rows - distinct > rows * MOST_REPEATED_PART:
        return f"{rows - distinct:,} of {rows:,} sampled values repeat another one"
    if distinct >= MIN_POSITIONAL_VALUES and bits < MIN_BITS:
        return f"its values differ so little that there are about 2^{bits:.0f} possible ones"
    return ""


async def _measure(
    connection: AsyncConnection, table: TargetTable, column: Column
) -> tuple[int, int, int, float]:
    """Return the number of sampled values, of different ones and of short ones, and the varying bits."""
    value = identifier(ROW, column.name)
    text = "encode({}, 'hex')" if column.type_name == "bytea" else "{}::text"
    is_rotated = column.is_rotated(value) or sql.SQL("{} IS NOT NULL").format(value)
    estimated = await estimate_rows(connection, table)
    query = sql.SQL(_SAMPLE).format(
        text=sql.SQL(text).format(value),
        row=table.row,
        is_rotated=is_rotated
        if table.matches is None
        else sql.SQL("{} AND {}").format(is_rotated, table.matches),
        rows=sql.Literal(SAMPLE_ROWS),
        bits=sql.Literal(MIN_BITS),
    )
    percent = min(100.0, 100 * _ROWS_READ / max(estimated, 1))
    ((rows, distinct, weak, bits),) = await fetch_rows(connection, query, {"percent": percent})
    return int(rows), int(distinct), int(weak), float(bits)
