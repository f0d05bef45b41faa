"""Searches the columns of all tables for old values of a rotation, by their digests in its ledger.

It reads in read-only transactions, and no value leaves the server.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg import AsyncConnection, sql

from rotator.exceptions import OptionError
from rotator.postgres.column_samples import Pauses, fetch_or_reason, reading
from rotator.postgres.connection import Server
from rotator.postgres.errors import translate_errors
from rotator.postgres.ledger import Ledger, digest, find_ledger
from rotator.postgres.table import identifier

SAMPLED_VALUES: Final = 1000
CHUNK_BLOCKS: Final = 512
_SAMPLED_PAGES: Final = 64
# Texts that contain an old value, e.g. serialized rows, are split into words of at least this length.
_WORD: Final = "[[:alnum:]_+/=.~-]{16,}"
_WORDS_CHARACTERS: Final = 100_000

_COLUMNS: Final = (
    "SELECT n.nspname, c.relname, a.attname, format('%%I.%%I', n.nspname, c.relname),"
    " CASE WHEN b.typname IN ('uuid', 'bytea') THEN b.typname WHEN b.typname IN ('json', 'jsonb') THEN 'json'"
    " ELSE 'text' END,"
    " ARRAY(SELECT ARRAY[ln.nspname, l.relname] FROM pg_class l"
    " JOIN pg_namespace ln ON ln.oid = l.relnamespace"
    " WHERE l.relkind = 'r' AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid)"
    " WHERE isleaf)) ORDER BY l.oid),"
    " GREATEST(c.relpages, (SELECT COALESCE(sum(l.relpages), 0) FROM pg_partition_tree(c.oid) t"
    " JOIN pg_class l ON l.oid = t.relid))::bigint"
    " FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " JOIN pg_type d ON d.oid = a.atttypid"
    " JOIN pg_type b ON b.oid = COALESCE(NULLIF(d.typbasetype, 0), d.oid)"
    " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'"
    " AND n.nspname !~ '^(pg_|information_schema$)' AND c.relname !~ '^rotator_'"
    " AND a.attnum > 0 AND NOT a.attisdropped"
    " AND (b.typcategory = 'S' OR b.typname IN ('uuid', 'bytea', 'json', 'jsonb'))"
    " AND NOT (format('%%I.%%I', n.nspname, c.relname) = %(table)s AND a.attname = ANY (%(columns)s::text[]))"
    " ORDER BY 1, 2, a.attnum"
)
_BLOCKS: Final = sql.SQL(
    "SELECT pg_relation_size(%(leaf)s::regclass) / current_setting('block_size')::integer"
)


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """A column that can hold copies.

    Attributes:
        path: The schema and the name of the table, unquoted.
        column: The name of the column, unquoted.
        table: The name of the table, quoted.
        category: ``text``, ``uuid``, ``bytea`` or ``json``.
        leaves: The schemas and names of the tables that hold the rows: the partitions, or the table.
        pages: The number of pages, according to the server's statistics.
    """

    path: tuple[str, ...]
    column: str
    table: str
    category: str
    leaves: Sequence[Sequence[str]]
    pages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnCopies:
    """The rows of a column that contain old values.

    Attributes:
        table: The name of the table, quoted.
        column: The name of the column.
        rows: The number of rows with an old value.
        searched: The number of rows that were searched, without NULL.
    """

    table: str
    column: str
    rows: int
    searched: int


@dataclass(slots=True)
class CopySearch:
    """The result of a search.

    Attributes:
        found: The columns with old values.
        columns: The number of columns that were searched, without those that could not be.
        problems: The columns that could not be searched completely, one phrase each.
    """

    found: list[ColumnCopies] = field(default_factory=list)
    columns: int = 0
    problems: list[str] = field(default_factory=list)


async def find_copies(
    connection: AsyncConnection,
    server: Server,
    *,
    rotation: int,
    table: str,
    columns: Sequence[str],
    every_row: bool,
) -> CopySearch:
    """Search all columns except the rotated ones: a sample of each, then all rows if the sample has copies.

    Args:
        connection: A connection for reading.
        server: The server of the connection.
        rotation: The id of the rotation.
        table: The quoted name of its table.
        columns: The names of the rotated columns.
        every_row: Whether to search all rows of every column.

    Raises:
        OptionError: The rotation has no complete ledger.
        ServerLostError: The connection was lost.
    """
    async with translate_errors(connection), reading(connection, server):
        ledger = await find_ledger(connection, rotation)
        cursor = await connection.execute(_COLUMNS, {"table": table, "columns": list(columns)})
        stored = [
            StoredColumn((row[0], row[1]), row[2], row[3], row[4], row[5], row[6]) async for row in cursor
        ]
    if ledger is None or not ledger.is_ready:
        raise OptionError(
            f"Rotation {rotation} has no ledger of its old values, so copies cannot be found. Only rotations "
            "with --prove have one."
        )
    search = CopySearch()
    pauses = Pauses()
    for each in stored:
        found = await fetch_or_reason(connection, server, _sample(ledger, each), {})
        await pauses.pause()
        if not isinstance(found, str) and (every_row or found[0][1]):
            found = await _search(connection, server, ledger, each, pauses)
        if isinstance(found, str):
            search.problems.append(f"{each.table}.{each.column} could not be searched: {found}")
            continue
        search.columns += 1
        if found[0][1]:
            search.found.append(
                ColumnCopies(table=each.table, column=each.column, searched=found[0][0], rows=found[0][1])
            )
    return search


async def _search(
    connection: AsyncConnection, server: Server, ledger: Ledger, stored: StoredColumn, pauses: Pauses
) -> list[tuple[Any, ...]] | str:
    """Search all rows of a column, in the order of its blocks."""
    searched = rows = 0
    for leaf in stored.leaves:
        name = sql.Identifier(*leaf).as_string()
        blocks = await fetch_or_reason(connection, server, sql.Composed([_BLOCKS]), {"leaf": name})
        if isinstance(blocks, str):
            return blocks
        query = _count(
            ledger,
            stored,
            sql.SQL("ONLY {} WHERE ctid >= %(begin)s::tid AND ctid < %(end)s::tid AND").format(
                identifier(*leaf)
            ),
        )
        for block in range(0, blocks[0][0], CHUNK_BLOCKS):
            part = {"begin": f"({block},0)", "end": f"({block + CHUNK_BLOCKS},0)"}
            found = await fetch_or_reason(connection, server, query, part)
            if isinstance(found, str):
                return found
            searched, rows = searched + found[0][0], rows + found[0][1]
            await pauses.pause()
    return [(searched, rows)]


def _sample(ledger: Ledger, stored: StoredColumn) -> sql.Composed:
    part = ""
    if stored.pages > _SAMPLED_PAGES:
        part = f" TABLESAMPLE SYSTEM ({100 * _SAMPLED_PAGES / stored.pages:.6f})"
    rows = sql.SQL("{}{} WHERE").format(identifier(*stored.path), sql.SQL(part))
    return _count(ledger, stored, rows, limit=SAMPLED_VALUES)


def _count(
    ledger: Ledger, stored: StoredColumn, rows: sql.Composable, *, limit: int | None = None
) -> sql.Composed:
    """Return the query that counts the rows, and those that contain a value in the ledger.

    Args:
        ledger: The ledger.
        stored: The column.
        rows: The FROM clause, and the beginning of its conditions.
        limit: The largest number of rows to read; None for all.
    """
    value = sql.SQL("rotator_copy.value")
    return sql.SQL(
        "SELECT count(*), count(*) FILTER (WHERE EXISTS (SELECT FROM {digests} JOIN {ledger} AS entry"
        " USING (digest))) FROM (SELECT {column} AS value FROM {rows} {column} IS NOT NULL{limit})"
        " AS rotator_copy"
    ).format(
        digests=_digests(ledger, value, stored.category),
        ledger=ledger.name,
        column=identifier(stored.column),
        rows=rows,
        limit=sql.SQL("" if limit is None else f" LIMIT {limit}"),
    )


def _digests(ledger: Ledger, value: sql.Composable, category: str) -> sql.Composable:
    """Return a subquery with the digests of a value, and of the texts that it contains, as ``digest``."""
    if category in ("uuid", "bytea"):
        return sql.SQL("(VALUES ({})) AS own (digest)").format(digest(value, category, ledger.salt))
    if category == "json":
        parts = sql.SQL(
            "SELECT part #>> '{{}}' FROM jsonb_path_query({}::jsonb, 'lax $.**') AS part"
            " WHERE jsonb_typeof(part) = 'string'"
        ).format(value)
    else:
        parts = sql.SQL(
            "SELECT {value}::text UNION"
            " SELECT found[1] FROM regexp_matches(left({value}::text, {most}), {word}, 'g') AS found"
        ).format(value=value, most=sql.Literal(_WORDS_CHARACTERS), word=sql.Literal(_WORD))
    return sql.SQL("(SELECT {} AS digest FROM ({}) AS parts (part)) AS own").format(
        digest(sql.SQL("part"), "text", ledger.salt), parts
    )
