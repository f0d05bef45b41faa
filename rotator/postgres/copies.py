"""Searches the columns of all tables for old values of a rotation, by their digests in its ledger.

It reads in read-only transactions, and no value leaves the server.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from psycopg import AsyncConnection, sql
from psycopg.rows import class_row, tuple_row

from rotator.exceptions import OptionError
from rotator.postgres.column_samples import Pauses, UnreadableError, fetch_reading, reading, sampled_part
from rotator.postgres.connection import Server, fetch_as
from rotator.postgres.errors import translate_errors
from rotator.postgres.ledger import Ledger, digest, find_ledger
from rotator.postgres.table import identifier

SAMPLED_VALUES: Final = 1000
CHUNK_BLOCKS: Final = 512
# Texts that contain an old value, e.g. serialized rows, are split into words of at least this length.
_WORD: Final = "[[:alnum:]_+/=.~-]{16,}"
_WORDS_CHARACTERS: Final = 100_000

_COLUMNS: Final = (
    "SELECT ARRAY[n.nspname, c.relname]::text[] AS path, a.attname AS column,"
    " format('%%I.%%I', n.nspname, c.relname) AS table,"
    " CASE WHEN b.typname IN ('uuid', 'bytea') THEN b.typname WHEN b.typname IN ('json', 'jsonb') THEN 'json'"
    " ELSE 'text' END AS category,"
    " ARRAY(SELECT ARRAY[ln.nspname, l.relname]::text[] FROM pg_class l"
    " JOIN pg_namespace ln ON ln.oid = l.relnamespace"
    " WHERE l.relkind = 'r' AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid)"
    " WHERE isleaf)) ORDER BY l.oid) AS leaves,"
    " GREATEST(c.relpages, (SELECT COALESCE(sum(l.relpages), 0) FROM pg_partition_tree(c.oid) t"
    " JOIN pg_class l ON l.oid = t.relid))::bigint AS pages"
    " FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " JOIN pg_type d ON d.oid = a.atttypid"
    " JOIN pg_type b ON b.oid = COALESCE(NULLIF(d.typbasetype, 0), d.oid)"
    " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'"
    " AND n.nspname !~ '^(pg_|information_schema$)' AND c.relname !~ '^rotator_'"
    " AND a.attnum > 0 AND NOT a.attisdropped"
    " AND (b.typcategory = 'S' OR b.typname IN ('uuid', 'bytea', 'json', 'jsonb'))"
    " AND NOT (format('%%I.%%I', n.nspname, c.relname) = %(table)s AND a.attname = ANY (%(columns)s::text[]))"
    " ORDER BY n.nspname, c.relname, a.attnum"
)
_BLOCKS: Final = "SELECT pg_relation_size(%(leaf)s::regclass) / current_setting('block_size')::integer"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredColumn:
    """A column that can hold copies.

    Attributes:
        path: The schema and the name of the table, unquoted.
        table: The name of the table, quoted.
        category: ``text``, ``uuid``, ``bytea`` or ``json``.
        leaves: The schemas and names of the tables that hold the rows: the partitions, or the table.
    """

    path: Sequence[str]
    column: str
    table: str
    category: str
    leaves: Sequence[Sequence[str]]
    pages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnCopies:
    """The number of rows of a column with an old value, and of those that were searched, without NULL."""

    table: str
    column: str
    rows: int
    searched: int


@dataclass(slots=True)
class CopySearch:
    """The columns with old values, the number of searched columns, and a phrase for each other one."""

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

    ``table`` is the quoted name of the rotation's table. With ``every_row``, all rows are always searched.

    Raises:
        OptionError: The rotation has no complete ledger.
        ServerLostError: The connection was lost.
    """
    async with translate_errors(connection), reading(connection, server):
        ledger = await find_ledger(connection, rotation)
        parameters = {"table": table, "columns": list(columns)}
        stored = await fetch_as(connection, class_row(StoredColumn), _COLUMNS, parameters)
    if ledger is None or not ledger.is_ready:
        raise OptionError(
            f"Rotation {rotation} has no ledger of its old values, so copies cannot be found. Only rotations "
            "with --prove have one."
        )
    search = CopySearch()
    pauses = Pauses()
    for each in stored:
        await pauses.pause()
        sampled = sql.SQL("{}{} WHERE").format(identifier(*each.path), sampled_part(each.pages))
        query = _count(ledger, each, sampled, limit=SAMPLED_VALUES)
        try:
            ((searched, rows),) = await fetch_reading(connection, server, tuple_row, query)
            if every_row or rows:
                searched, rows = await _search(connection, server, ledger, each, pauses)
        except UnreadableError as error:
            search.problems.append(f"{each.table}.{each.column} could not be searched: {error}")
            continue
        search.columns += 1
        if rows:
            found = ColumnCopies(table=each.table, column=each.column, searched=searched, rows=rows)
            search.found.append(found)
    return search


async def _search(
    connection: AsyncConnection, server: Server, ledger: Ledger, stored: StoredColumn, pauses: Pauses
) -> tuple[int, int]:
    """Search all rows of a column, in the order of its blocks, and return their number and that of copies."""
    searched = rows = 0
    for leaf in stored.leaves:
        name = sql.Identifier(*leaf).as_string()
        ((blocks,),) = await fetch_reading(connection, server, tuple_row, _BLOCKS, {"leaf": name})
        part_of_leaf = sql.SQL("ONLY {} WHERE ctid >= %(begin)s::tid AND ctid < %(end)s::tid AND")
        query = _count(ledger, stored, part_of_leaf.format(identifier(*leaf)))
        for block in range(0, blocks, CHUNK_BLOCKS):
            part = {"begin": f"({block},0)", "end": f"({block + CHUNK_BLOCKS},0)"}
            await pauses.pause()
            ((searched_here, rows_here),) = await fetch_reading(connection, server, tuple_row, query, part)
            searched, rows = searched + searched_here, rows + rows_here
    return searched, rows


def _count(
    ledger: Ledger, stored: StoredColumn, rows: sql.Composable, *, limit: int | None = None
) -> sql.Composed:
    """Return the query that counts the rows, and those that contain a value in the ledger.

    ``rows`` is the FROM clause, and the beginning of its conditions. At most ``limit`` rows are read.
    """
    value = sql.SQL("rotator_copy.value")
    return sql.SQL(
        "SELECT count(*), count(*) FILTER (WHERE EXISTS (SELECT FROM {digests} JOIN {ledger} AS entry"
        " USING (digest))) FROM (SELECT {column} AS value FROM {rows} {column} IS NOT NULL LIMIT {limit})"
        " AS rotator_copy"
    ).format(
        digests=_digests(ledger, value, stored.category),
        ledger=ledger.name,
        column=identifier(stored.column),
        rows=rows,
        limit=limit,
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
        ).format(value=value, most=_WORDS_CHARACTERS, word=_WORD)
    return sql.SQL("(SELECT {} AS digest FROM ({}) AS parts (part)) AS own").format(
        digest(sql.SQL("part"), "text", ledger.salt), parts
    )
