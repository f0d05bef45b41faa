"""The ledger of a rotation: salted digests of the old values, in a table for each rotation.

An entry is the first 8 bytes of ``sha256(salt || value)``, as a bigint. The server computes it from the row,
and the salt stays in the database, next to the digests. So it protects only values of which there are too
many to try: columns whose values can be guessed are refused.
"""

import asyncio
import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Final, LiteralString

from psycopg import AsyncConnection, sql
from psycopg.rows import class_row

from rotator.exceptions import TargetError
from rotator.options import WaitLimits
from rotator.postgres.connection import execute, fetch_as, fetch_rows, first, set_local, transaction_with
from rotator.postgres.fence import Lease, begin_fenced, rolled_back_on_error
from rotator.postgres.planner import estimate_rows
from rotator.postgres.table import ROW, Column, TargetTable, identifier, range_rows
from rotator.ranges import Key, KeyInterval

DIGEST_BYTES: Final = 8
DIGEST_BITS: Final = 8 * DIGEST_BYTES
# Reading locks no rows, so a range of the ledger may be larger and slower than one that writes.
LOAD_LIMITS: Final = WaitLimits(lock_seconds=0.1, statement_seconds=30.0, transaction_seconds=60.0)
# Building an index of a billion entries takes long. No other session waits for it. Autovacuum gives way to a
# session that has waited for a second.
INDEX_LIMITS: Final = WaitLimits(lock_seconds=10.0, statement_seconds=86_400.0, transaction_seconds=60.0)
FORGET_LOCK_TIMEOUT: Final = "5s"

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
    " TABLESAMPLE SYSTEM (%(percent)s) WHERE {is_rotated}{and_matches} LIMIT {rows}),"
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

# The first entry of each ledger is the digest of this text: it shows that salt and table belong together.
_KNOWN_TEXT: Final = "The first entry of a ledger."


def stored_bytes(value: sql.Composable, type_name: str) -> sql.Composable:
    """Return the bytes of a stored value: those of a bytea, and the text in UTF-8 of every other type.

    The text of a uuid is in lower case with hyphens. The text of a ``char(n)`` has no blanks at its end.
    """
    return value if type_name == "bytea" else sql.SQL("convert_to({}::text, 'UTF8')").format(value)


def digest(value: sql.Composable, type_name: str, salt: sql.Composable) -> sql.Composable:
    """Return the digest of a value as SQL of type bigint; NULL for NULL.

    ``type_name`` is the name of the value's type, or of the base type of its domain. The salt is a bytea.
    """
    return sql.SQL("('x' || encode(substr(sha256({} || {}), 1, {}), 'hex'))::bit(64)::bigint").format(
        salt, stored_bytes(value, type_name), DIGEST_BYTES
    )


def digest_of(value: str | bytes, salt: bytes) -> int:
    """Return the same digest of a value that this process has, e.g. of a line of a file."""
    encoded = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.sha256(salt + encoded).digest()[:DIGEST_BYTES], "big", signed=True)


COUNT_ENTRIES: Final = "UPDATE rotator_ledger SET entries = entries + %s WHERE rotation_id = %s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """A ledger that exists.

    Attributes:
        schema: The schema of the rotator's tables, unquoted.
        is_ready: Whether it is complete and indexed.
        through: The key up to which it is loaded; None before the first range.
        started_xid: The oldest transaction that was open when loading began, epoch included.
        control_rows: The number of rows of a sample that were found in it before the rotation.
        guard: The action of the guard: ``refuse`` or ``keep``; empty where there is none.
    """

    rotation: int
    schema: str
    is_ready: bool
    through: Key | None
    started_xid: int
    entries: int
    control_rows: int
    guard: str

    @property
    def name(self) -> sql.Composable:
        """The quoted name of the table of entries."""
        return identifier(self.schema, f"rotator_ledger_{self.rotation}")

    @property
    def salt(self) -> sql.Composable:
        """The salt as SQL, which the server reads once for each statement."""
        return sql.SQL("(SELECT salt FROM {} WHERE rotation_id = {})").format(
            identifier(self.schema, "rotator_ledger"), self.rotation
        )

    def digest(self, column: Column, alias: str = ROW) -> sql.Composable:
        """Return the digest of a column's value in a row; NULL where the rotation keeps the value."""
        value = identifier(alias, column.name)
        return column.null_unless_rotated(value, digest(value, column.type_name, self.salt))

    @property
    def known(self) -> sql.Composable:
        """The digest of the first entry."""
        return digest(sql.Literal(_KNOWN_TEXT), "text", self.salt)

    def digests(self, table: TargetTable) -> sql.Composable:
        """Return a subquery with the digests of a row, to be joined laterally.

        Its columns are ``digest``, and ``is_rotated``: whether the value has a digest and is rotated. A query
        that tests the digest itself makes it once more, because the planner merges the subquery.
        """
        rows = []
        for column in table.columns:
            value = identifier(ROW, column.name)
            made, is_rotated = digest(value, column.type_name, self.salt), column.is_rotated(value)
            rows.append(
                sql.SQL("({}, {} IS NOT NULL AND {})").format(made, value, is_rotated or sql.SQL("true"))
            )
        return sql.SQL("(VALUES {}) AS rotator_values (digest, is_rotated)").format(sql.SQL(", ").join(rows))


_COLUMNS: Final = (
    "rotation_id AS rotation, (SELECT nspname FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid"
    " WHERE c.oid = 'rotator_ledger'::regclass) AS schema, state = 'ready' AS is_ready,"
    " loaded_through::text AS through, started_xid, entries, control_rows, guard"
)
_FIND: Final = f"SELECT {_COLUMNS} FROM rotator_ledger WHERE rotation_id = %s AND state <> 'forgotten'"  # noqa: S608 - our own text
_CREATE: Final = (
    # The salt never leaves the server: 366 random bits, of which it keeps 256.
    "INSERT INTO rotator_ledger (rotation_id, salt, state, started_xid, entries, control_rows, guard,"  # noqa: S608 - our own text
    " guard_hits) VALUES (%s, sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())"
    " || uuid_send(gen_random_uuid())), 'loading',"
    f" pg_snapshot_xmin(pg_current_snapshot())::text::bigint, 1, 0, '', 0) RETURNING {_COLUMNS}"
)


async def find_ledger(connection: AsyncConnection, rotation: int) -> Ledger | None:
    """Return the ledger of a rotation; None where it has none, or it was forgotten."""
    return first(await fetch_as(connection, class_row(Ledger), _FIND, (rotation,)))


async def create_ledger(connection: AsyncConnection, lease: Lease) -> Ledger:
    """Create an empty ledger with a new salt.

    Raises:
        SupersededError: Another process owns the rotation.
        RotatorError: The server rejected it, e.g. because the role must not create tables.
    """
    async with rolled_back_on_error(connection):
        await begin_fenced(connection, lease, LOAD_LIMITS)
        (ledger,) = await fetch_as(connection, class_row(Ledger), _CREATE, (lease.rotation,))
        for statement in (
            # A table of the same name can only come from a database that was copied in part.
            "DROP TABLE IF EXISTS {name}",
            "CREATE TABLE {name} (digest bigint NOT NULL)",
            "INSERT INTO {name} SELECT {known}",
        ):
            await connection.execute(sql.SQL(statement).format(name=ledger.name, known=ledger.known), {})
        await connection.execute("COMMIT")
    return ledger


async def load_range(
    connection: AsyncConnection,
    lease: Lease,
    table: TargetTable,
    ledger: Ledger,
    key_range: KeyInterval,
    before: asyncio.Event | None,
) -> None:
    """Enter the values of a range of rows, and the progress in the same transaction.

    The commit waits for ``before``, which is set once the range before it is committed; None for the first.

    Raises:
        RowsLockedError: Another session has locked the table.
        RangeTooSlowError: The range is too large.
        RotatorError: Every other error of :func:`translate_errors`; nothing was entered.
    """
    rows = range_rows(table, after_is_known=key_range.after is not None)
    insert, parameters = _insert(ledger, table, rows), asdict(key_range)
    async with rolled_back_on_error(connection, seconds=LOAD_LIMITS.transaction_seconds):
        async with connection.pipeline():
            await begin_fenced(connection, lease, LOAD_LIMITS)
            # It waits for the range before it, which may take as long as a transaction may.
            await set_local(
                connection, {"idle_in_transaction_session_timeout": f"{LOAD_LIMITS.transaction_seconds:.0f}s"}
            )
            cursor = await connection.execute(insert, parameters)
        if before is not None:
            await before.wait()
        async with connection.pipeline():
            await connection.execute(
                "UPDATE rotator_ledger SET loaded_through = %s::jsonb, entries = entries + %s"
                " WHERE rotation_id = %s",
                (key_range.through, cursor.rowcount, ledger.rotation),
            )
            await connection.execute("COMMIT")


def enter_values(ledger: Ledger, table: TargetTable, rows: sql.Composable) -> sql.Composed:
    """Return the statement that enters the values of some rows, and counts the entries.

    ``rows`` is a FROM clause and its conditions, with the table under the alias :data:`ROW`.
    """
    return sql.SQL(
        "WITH entered AS ({} RETURNING 1)"
        " UPDATE {} SET entries = entries + (SELECT count(*) FROM entered) WHERE rotation_id = {}"
    ).format(_insert(ledger, table, rows), identifier(ledger.schema, "rotator_ledger"), ledger.rotation)


def enter_newer_values(ledger: Ledger, table: TargetTable, rows: sql.Composable) -> sql.Composed:
    """Return the statement that enters the values of rows that the loaded ledger may lack.

    Another session has written them since loading began, or their partition was attached since then: they can
    have come into the range, or into the selection. It returns a row for each entry. ``rows`` is that of
    :func:`enter_values`.
    """
    # In a subquery, it is evaluated once.
    started = sql.SQL("(SELECT age({}::xid8::xid))").format(str(ledger.started_xid))
    # In a transaction, the age of an even newer row is negative.
    is_newer: LiteralString = "age({xmin}) <= {started}"
    if table.is_partitioned:
        # Or its leaf, or a parent of that, was attached since then.
        is_newer = (
            "(age({xmin}) <= {started} OR {leaf} = ANY (ARRAY(SELECT leaf.oid FROM {partitions} AS leaf,"
            " pg_partition_ancestors(leaf.oid) AS ancestor JOIN pg_inherits i ON i.inhrelid = ancestor.relid"
            " WHERE age(i.xmin) <= {started})))"
        )
    newer_rows = sql.SQL("{} AND {}").format(rows, table.compose(is_newer, started=started))
    return sql.SQL(
        "{} AND NOT EXISTS (SELECT FROM {} AS entry WHERE entry.digest = rotator_values.digest) RETURNING 1"
    ).format(_insert(ledger, table, newer_rows), ledger.name)


def _insert(ledger: Ledger, table: TargetTable, rows: sql.Composable) -> sql.Composed:
    return sql.SQL(
        "INSERT INTO {} SELECT rotator_values.digest FROM (SELECT {row}.* FROM {}) AS {row}, LATERAL {}"
        " WHERE rotator_values.is_rotated"
    ).format(ledger.name, rows, ledger.digests(table), row=identifier(ROW))


async def index_ledger(connection: AsyncConnection, lease: Lease, ledger: Ledger) -> None:
    """Index a ledger that is loaded; raise RowsLockedError while another session has locked it.

    The index is built now because a new index is smaller than one that has grown.
    """
    index = identifier(f"rotator_ledger_{ledger.rotation}_digest")
    async with rolled_back_on_error(connection, seconds=None):
        await begin_fenced(connection, lease, INDEX_LIMITS)
        await connection.execute(
            sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} (digest)").format(index, ledger.name), {}
        )
        await connection.execute("COMMIT")


async def finish_ledger(connection: AsyncConnection, ledger: Ledger, control_rows: int) -> Ledger:
    """Mark a ledger that is loaded and indexed as ready, and return it.

    ``control_rows`` is the number of rows of a sample that were found in it.
    """
    await execute(
        connection,
        "UPDATE rotator_ledger SET control_rows = %s, state = 'ready', ready_at = clock_timestamp()"
        " WHERE rotation_id = %s AND state = 'loading'",
        (control_rows, ledger.rotation),
    )
    return replace(ledger, is_ready=True, control_rows=control_rows)


async def forget_ledger(connection: AsyncConnection, ledger: Ledger) -> None:
    """Drop the table of a ledger and its salt; only the counts are left."""
    async with transaction_with(connection, {"lock_timeout": FORGET_LOCK_TIMEOUT}):
        await connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(ledger.name), {})
        await connection.execute(
            "UPDATE rotator_ledger SET state = 'forgotten', salt = ''::bytea,"
            " forgotten_at = clock_timestamp() WHERE rotation_id = %s",
            (ledger.rotation,),
        )


async def count_known(connection: AsyncConnection, ledger: Ledger) -> tuple[int, int, bool]:
    """Return the entries that were recorded, those in the table, and whether the first one is right.

    It is wrong where the salt is not the one that the entries were made with.
    """
    query = sql.SQL(
        "SELECT (SELECT entries FROM {ledgers} WHERE rotation_id = {rotation}),"
        " (SELECT count(*) FROM {name}),"
        " EXISTS (SELECT FROM {name} WHERE digest = {known})"
    ).format(
        ledgers=identifier(ledger.schema, "rotator_ledger"),
        rotation=ledger.rotation,
        name=ledger.name,
        known=ledger.known,
    )
    ((recorded, found, is_known),) = await fetch_rows(connection, query, seconds=None)
    return recorded, found, is_known


async def check_not_guessable(connection: AsyncConnection, table: TargetTable) -> None:
    """Raise TargetError for a column with fewer than 2^64 possible values, by its type and by a sample."""
    for column in table.columns:
        reason = await _reason(connection, table, column)
        if reason:
            raise TargetError(
                f"Cannot prove a rotation of the column {column.name} of {table.found_name}: {reason}. A "
                "user who can read the ledger could try all values. Rotate it without --prove."
            )


async def _reason(connection: AsyncConnection, table: TargetTable, column: Column) -> str:
    """Return why the values of a column can be guessed; an empty text where they cannot."""
    if column.type_name not in _TYPES:
        return f"its type {column.type_name} has too few possible values"
    value = identifier(ROW, column.name)
    text = "encode({}, 'hex')" if column.type_name == "bytea" else "{}::text"
    query = table.compose(
        _SAMPLE,
        text=sql.SQL(text).format(value),
        is_rotated=column.is_rotated(value) or sql.SQL("{} IS NOT NULL").format(value),
        rows=SAMPLE_ROWS,
        bits=MIN_BITS,
    )
    percent = min(100.0, 100 * _ROWS_READ / max(await estimate_rows(connection, table), 1))
    ((rows, distinct, weak, bits),) = await fetch_rows(connection, query, {"percent": percent})
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
