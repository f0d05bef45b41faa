"""Finds the rows whose present value is in a list of leaked values, by salted digests in temporary tables.

No value is sent to the server: only the salt and the digests, by COPY, which the server does not log. Every
function takes the same connection in autocommit mode, because a temporary table belongs to its session.
"""

import secrets
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from psycopg import AsyncConnection, sql
from psycopg.rows import class_row

from rotator.exceptions import OptionError
from rotator.postgres.connection import OwnConnection, execute, fetch_as, fetch_column, fetch_rows, set_local
from rotator.postgres.errors import translate_errors
from rotator.postgres.ledger import DIGEST_BYTES, digest_of, stored_bytes
from rotator.postgres.table import ROW, Column, TargetTable, identifier
from rotator.postgres.values import Place
from rotator.postgres.writer import OlderRow
from rotator.ranges import Key

# 256 MB: a few seconds, and no snapshot that blocks VACUUM for long.
CHUNK_BLOCKS: Final = 32_768
# Each process of the server makes a hash table of a list that is passed as an array.
ARRAY_VALUES: Final = 100_000
_COPIED_ROWS: Final = 20_000
# The planner does not know how long digests take, and would make them in one process.
_PARALLEL: Final = {"jit": "off", "parallel_setup_cost": "0", "parallel_tuple_cost": "0"}
_SALT: Final = sql.SQL("(SELECT salt FROM pg_temp.rotator_leaked_salt)")
_TABLES: Final = (
    "DROP TABLE IF EXISTS pg_temp.rotator_leaked_salt, pg_temp.rotator_leaked, pg_temp.rotator_leaked_rows",
    "CREATE TEMPORARY TABLE rotator_leaked_salt (salt bytea)",
    "CREATE TEMPORARY TABLE rotator_leaked (digest bytea, position integer)",
    (
        "CREATE TEMPORARY TABLE rotator_leaked_rows (number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
        " leaf bigint, ctid_text text, xid text, key text, digests bytea[])"
    ),
)


class LeakedValues:
    """The digests of a list of leaked values, in the order of the list, and which of them were found.

    A value has as many digests as there are forms in which a column may store it. The salt is new for each
    list.

    Attributes:
        searched_before: The oldest transaction that was open when the last search began, epoch included; None
            before a search.
        searched_leaves: The oids of the partitions, or of the table, that it has read, with their files.
    """

    def __init__(self, *, first: int = 1, forms: int = 1) -> None:
        """Create an empty list, with the number of the first line."""
        self.salt = secrets.token_bytes(32)
        self.forms = forms
        self.digests = array("q")
        self.searched_before: int | None = None
        self.searched_leaves = frozenset[tuple[int, int]]()
        self._first = first
        # For each blank line, the number of values before it.
        self._blanks = array("I")
        self._found = bytearray()

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.digests) // self.forms

    def add(self, forms: Sequence[bytes | None]) -> None:
        """Add the stored forms of a value; None for a form that no column can store."""
        for form in forms:
            # A random digest is equal to no other.
            self.digests.append(
                digest_of(form, self.salt)
                if form is not None
                else int.from_bytes(secrets.token_bytes(8), signed=True)
            )

    def skip(self) -> None:
        """Add a blank line."""
        self._blanks.append(len(self))

    def mark(self, position: int) -> None:
        """Note that a row has the value at a position, counted from 0."""
        if not self._found:
            self._found = bytearray(len(self))
        self._found[position] = 1

    @property
    def found(self) -> int:
        """The number of values that rows have, or had when they were found."""
        return self._found.count(1)

    def lines(self, *, found: bool, most: int) -> list[str]:
        """Return the first lines whose values were found, or were not, e.g. ``["5", "17-19"]``."""
        ranges = list[str]()
        wanted = self._found or bytearray(len(self))
        start = wanted.find(int(found))
        while start >= 0 and len(ranges) < most:
            end = wanted.find(int(not found), start)
            end = len(wanted) if end < 0 else end
            first, last = self._line(start), self._line(end - 1)
            ranges.append(str(first) if first == last else f"{first}-{last}")
            start = wanted.find(int(found), end)
        return ranges

    def _line(self, position: int) -> int:
        return self._first + position + bisect_right(self._blanks, position)

    def chunks(self) -> Iterator[str]:
        """Yield the digests and positions as rows of COPY."""
        for start in range(0, len(self.digests), _COPIED_ROWS):
            part = enumerate(self.digests[start : start + _COPIED_ROWS], start)
            yield "".join(f"\\\\x{each % 2**64:016x}\t{at // self.forms}\n" for at, each in part)


async def load(connection: AsyncConnection, values: LeakedValues) -> None:
    """Send the digests to temporary tables of this session.

    Raises:
        OptionError: Each transaction may get another session of the server.
        RotatorError: The role must not create temporary tables, or the server cannot be reached.
    """
    if isinstance(connection, OwnConnection) and connection.local_settings:
        raise OptionError(
            "--leaked needs the same session of the server for all of its transactions. Connect to the "
            "server directly, not through a pooler."
        )
    values.searched_before, values.searched_leaves = None, frozenset()
    async with translate_errors(connection, seconds=None):
        for statement in _TABLES:
            await connection.execute(statement)
        cursor = connection.cursor()
        async with cursor.copy("COPY pg_temp.rotator_leaked_salt FROM STDIN") as copy:
            await copy.write_row((values.salt,))
        async with cursor.copy("COPY pg_temp.rotator_leaked FROM STDIN") as copy:
            for chunk in values.chunks():
                await copy.write(chunk)
        await connection.execute("CREATE INDEX ON pg_temp.rotator_leaked (digest)")
        await connection.execute("ANALYZE pg_temp.rotator_leaked")


async def search(connection: AsyncConnection, table: TargetTable, values: LeakedValues) -> int:
    """Read the table, note the rows whose value is in the list, and return their number.

    Afterwards ``values`` knows which of its values were found. Rows that an earlier search has read, and that
    no session has written since, are left out.
    """
    await execute(connection, "TRUNCATE pg_temp.rotator_leaked_rows RESTART IDENTITY")
    found = 0
    if values.searched_before is None:
        async with translate_errors(connection), connection.transaction():
            xid, leaves = await _read_leaves(connection, table)
        # What is missed because a row moves in the meantime is newer, and in the next search.
        for leaf in leaves:
            for begin in range(0, leaf.blocks, CHUNK_BLOCKS):
                async with translate_errors(connection, seconds=None), connection.transaction():
                    blocks = (begin, begin + CHUNK_BLOCKS)
                    found += await _search(connection, table, leaf, values, blocks)
    else:
        # In one snapshot, a row that moves is met once, at its old place.
        async with translate_errors(connection, seconds=None), connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            xid, leaves = await _read_leaves(connection, table)
            for leaf in leaves:
                found += await _search(connection, table, leaf, values, None)
    async with translate_errors(connection, seconds=None):
        cursor = connection.cursor()
        async with cursor.copy(
            "COPY (SELECT DISTINCT position FROM pg_temp.rotator_leaked WHERE digest IN"
            " (SELECT unnest(digests) FROM pg_temp.rotator_leaked_rows)) TO STDOUT"
        ) as copy:
            async for row in copy.rows():
                values.mark(int(row[0]))
    values.searched_before, values.searched_leaves = xid, frozenset((leaf.oid, leaf.file) for leaf in leaves)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    """A table or a partition that holds rows; a rewrite changes the number of its file."""

    path: Sequence[str]
    oid: int
    file: int
    blocks: int


async def _read_leaves(connection: AsyncConnection, table: TargetTable) -> tuple[int, list[_Leaf]]:
    """Return the oldest open transaction, and the leaves; none is rewritten until the commit."""
    # Takes a lock on each of them.
    await connection.execute(table.compose("SELECT FROM {table} LIMIT 0"), ())
    (xid,) = await fetch_column(connection, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
    query = table.compose(
        "SELECT ARRAY[n.nspname, c.relname]::text[] AS path, c.oid::bigint AS oid,"
        " pg_relation_filenode(c.oid)::bigint AS file,"
        " pg_relation_size(c.oid) / current_setting('block_size')::integer AS blocks FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.oid IN {partitions} AND c.relkind = 'r' ORDER BY c.oid"
    )
    return xid, await fetch_as(connection, class_row(_Leaf), query)


async def _search(
    connection: AsyncConnection,
    table: TargetTable,
    leaf: _Leaf,
    values: LeakedValues,
    blocks: tuple[int, int] | None,
) -> int:
    """Note the rows of a leaf, or of some of its blocks, whose value is in the list; return their number."""
    conditions = [_is_in_list(table, is_short=len(values.digests) <= ARRAY_VALUES)]
    if blocks is not None:
        conditions.insert(0, table.compose("{ctid} >= %(begin)s::tid AND {ctid} < %(end)s::tid"))
    if (leaf.oid, leaf.file) in values.searched_leaves:
        # A row that is newer than this transaction has a negative age.
        conditions.insert(0, table.compose("age({xmin}) <= age(%(xid)s::text::xid8::xid)"))
    begin, end = blocks or (0, 0)
    await set_local(connection, _PARALLEL)
    # Unlike INSERT, CREATE TABLE AS can read in parallel.
    await connection.execute(
        table.compose(
            "CREATE TEMPORARY TABLE rotator_leaked_part ON COMMIT DROP AS SELECT {leaf}::bigint AS leaf,"
            " {ctid}::text AS ctid_text, {xmin}::text AS xid, {row_json} AS key, ARRAY[{digests}] AS digests"
            " FROM ONLY {leaf_name} AS {row_name} WHERE {conditions}{and_matches}",
            digests=sql.SQL(", ").join(_digests(table)),
            leaf_name=identifier(*leaf.path),
            conditions=sql.SQL(" AND ").join(conditions),
        ),
        {"begin": f"({begin},0)", "end": f"({end},0)", "xid": values.searched_before},
    )
    cursor = await connection.execute(
        "INSERT INTO pg_temp.rotator_leaked_rows (leaf, ctid_text, xid, key, digests)"
        " SELECT leaf, ctid_text, xid, key, digests FROM pg_temp.rotator_leaked_part"
    )
    await connection.execute("DROP TABLE pg_temp.rotator_leaked_part")
    return cursor.rowcount


def _is_in_list(table: TargetTable, *, is_short: bool) -> sql.Composed:
    """Return a condition: one of the row's values is in the list, which may be short enough for an array."""
    digests = _digests(table)
    if is_short:
        # A plan that reads a temporary table is not parallel, unless it does so before the scan.
        entries = "unnest((SELECT array_agg(digest) FROM pg_temp.rotator_leaked))"
        # An IN is joined outside of the parallel part of the plan, and an EXISTS in an OR is no join.
        is_in_list = (
            f"EXISTS (SELECT FROM {entries} AS entry (digest) WHERE entry.digest = {{}})"
            if len(digests) == 1
            else f"{{}} IN (SELECT {entries})"
        )
    elif len(digests) == 1:
        is_in_list = "{} IN (SELECT digest FROM pg_temp.rotator_leaked)"
    else:
        # An IN in an OR is no join: the server reads a list that exceeds its memory for hashes for each row.
        is_in_list = "EXISTS (SELECT FROM pg_temp.rotator_leaked AS entry WHERE entry.digest = {})"
    is_leaked = sql.SQL(" OR ").join(sql.SQL(is_in_list).format(each) for each in digests)
    return sql.SQL("({})").format(is_leaked)


def _digests(table: TargetTable) -> list[sql.Composable]:
    def digest(column: Column) -> sql.Composable:
        value = identifier(ROW, column.name)
        # As bytes, because the server takes a third longer to make a number of them.
        found = sql.SQL("substr(sha256({} || {}), 1, {})").format(
            _SALT, stored_bytes(value, column.type_name), DIGEST_BYTES
        )
        return column.null_unless_rotated(value, found)

    return [digest(column) for column in table.columns]


async def found_rows(connection: AsyncConnection, batch: int) -> AsyncIterator[list[OlderRow]]:
    """Yield the rows of the last search, at most ``batch`` of one leaf at a time."""
    after = 0
    while True:
        rows = await fetch_rows(
            connection,
            "SELECT number, leaf, ctid_text, xid, key FROM pg_temp.rotator_leaked_rows"
            " WHERE number > %s ORDER BY number LIMIT %s",
            (after, batch),
        )
        if not rows:
            return
        after = rows[-1][0]
        for leaf, part in groupby(rows, key=lambda row: int(row[1])):
            yield [
                OlderRow(place=Place(leaf=leaf, ctid=ctid), xid=xid, key=Key(key))
                for _, _, ctid, xid, key in part
            ]
