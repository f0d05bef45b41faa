"""Columns and small samples of their values, which the server judges: no value leaves it.

Every function reads in read-only transactions.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import BaseRowFactory, class_row, tuple_row

from rotator.postgres.connection import Query, Server, T, fetch_as, first, set_local
from rotator.postgres.errors import condition, connection_lost, translate_errors
from rotator.postgres.table import identifier

STATEMENT_SECONDS: Final = 5.0
LOCK_SECONDS: Final = 0.5
MOST_VALUES: Final = 300
"""The number of values in a sample."""
_PAGES: Final = 64
_POSITIONS: Final = 64
_JSON_CHARACTERS: Final = 4000
_COUNTED_ROWS: Final = 10_000
_MOST_PAUSE_SECONDS: Final = 1.0

# The regular expressions, in PostgreSQL's syntax, that the starts of sampled values are compared with ...
_FORMATS: Final = {
    "a GitHub token": r"(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})",
    "a GitLab token": r"gl(pat|dt|rt|ptt|cbt)-[A-Za-z0-9_-]{20}",
    "a Slack token": r"(xox[abeoprs]-[0-9A-Za-z-]{10}|xapp-\d|https://hooks\.slack\.com/services/)",
    "a Stripe key": r"((sk|rk)_(live|test)_[0-9A-Za-z]{16}|whsec_[0-9A-Za-z]{16})",
    "an AWS key": r"(AKIA|ASIA)[A-Z2-7]{16}",
    "a Google key": r"(AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{20}|GOCSPX-[0-9A-Za-z_-]{20})",
    "an OpenAI or Anthropic key": r"sk-(ant-|proj-)?[0-9A-Za-z_-]{20}",
    "a SendGrid key": r"SG\.[0-9A-Za-z_-]{16}",
    "a Mailgun key": r"key-[0-9a-f]{32}",
    "a Twilio key": r"SK[0-9a-f]{32}",
    "a Shopify token": r"shp(at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "an npm, PyPI or Docker token": r"(npm_[0-9A-Za-z]{36}|pypi-AgE|dckr_pat_[0-9A-Za-z_-]{20})",
    "a Hugging Face token": r"hf_[0-9A-Za-z]{30}",
    "a Vault token": r"hv[sb]\.[0-9A-Za-z_-]{20}",
    "a DigitalOcean token": r"do[opr]_v1_[0-9a-f]{40}",
    "a JSON web token": r"eyJ[0-9A-Za-z_-]{10,}\.eyJ",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a Fernet ciphertext": r"gAAAA[0-9A-Za-z_-]{30}",
}
_HASH_FORMAT: Final = (
    r"(pbkdf2_[a-z0-9]+\$|argon2|scrypt\$|bcrypt|\$2[abxy]\$|\$argon2|\$[156]\$"
    r"|(md5|sha1|sha256|sha512)\$)"
)
# ... and documents.
_JSON_KEY: Final = (
    r'"[^"]*(secret|passw|token|api_?key|private_?key|credential|recovery_codes)[^"]*"\s*:\s*["\[{]'
)

BEGIN_READING: Final = (
    "SELECT set_config('transaction_read_only', 'on', true),"
    " set_config('statement_timeout', %s, true), set_config('lock_timeout', %s, true)"
)
"""Makes the open transaction read-only; takes the time limits of statements and locks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTable:
    """A table as the server has it.

    Attributes:
        path: The table's schema and name, unquoted.
        name: The same, quoted by the server.
        rows: The number of rows; an estimate of the server where there are many.
        categories: The category of the type of each column: ``text``, ``bytea``, ``json``, or another one.
    """

    path: Sequence[str]
    name: str
    rows: int
    rows_is_exact: bool = False
    pages: int
    categories: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnSample:
    """The properties of a sample of a column's values, without NULL and blanks.

    Attributes:
        mean_length: The mean length: characters, or bytes of binary values.
        bits: The Shannon entropy at each position, summed over the first 64.
        digit_changes: The mean number of changes between digits and other characters, for each character.
        spaced: The number of values with a space, ``@`` or ``://``.
        hashes: The number of values with the format of a hash.
        json_keys: The number of JSON documents with a key that suggests a secret.
        formats: The number of values with each known format.
    """

    values: int
    distinct: int = 0
    mean_length: float = 0.0
    bits: float = 0.0
    digit_changes: float = 0.0
    spaced: int = 0
    hashes: int = 0
    json_keys: int = 0
    formats: Mapping[str, int]


@asynccontextmanager
async def connected_for_reading(server: Server) -> AsyncIterator[AsyncConnection]:
    """Open a read-only connection in autocommit mode, or raise ServerLostError; replicas accept it too."""
    async with translate_errors():
        connection = await AsyncConnection.connect(**await server.read_arguments())
    async with connection:
        await connection.set_read_only(True)
        yield connection


@asynccontextmanager
async def reading(connection: AsyncConnection, server: Server) -> AsyncIterator[None]:
    """Open a read-only transaction with time limits."""
    settings = {
        "statement_timeout": f"{STATEMENT_SECONDS * 1000:.0f}ms",
        "lock_timeout": f"{LOCK_SECONDS * 1000:.0f}ms",
        **server.settings,
    }
    async with connection.transaction():
        await set_local(connection, settings)
        yield


class Pauses:
    """Makes a series of statements use at most half of the time."""

    def __init__(self) -> None:
        self._worked_until = time.monotonic()

    async def pause(self) -> None:
        """Wait for as long as the work since the last pause took."""
        seconds = min(time.monotonic() - self._worked_until, _MOST_PAUSE_SECONDS)
        await asyncio.sleep(seconds)
        self._worked_until = time.monotonic()


_TABLE: Final = (
    "SELECT ARRAY[n.nspname, c.relname]::text[] AS path, format('%%I.%%I', n.nspname, c.relname) AS name,"
    " GREATEST(0, CASE WHEN c.relkind = 'p' THEN (SELECT sum(GREATEST(l.reltuples, 0))"
    " FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid WHERE t.isleaf)"
    " ELSE c.reltuples END)::bigint AS rows, GREATEST(c.relpages, (SELECT COALESCE(sum(l.relpages), 0)"
    " FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid WHERE t.isleaf))::bigint AS pages,"
    " (SELECT COALESCE(jsonb_object_agg(a.attname, CASE WHEN b.typname = 'bytea' THEN 'bytea'"
    " WHEN b.typname IN ('json', 'jsonb') THEN 'json' WHEN b.typcategory = 'S' THEN 'text'"
    " ELSE 'other' END), '{}') FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid"
    " JOIN pg_type b ON b.oid = COALESCE(NULLIF(d.typbasetype, 0), d.oid)"
    " WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS categories"
    " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)"
)


async def read_stored_table(
    connection: AsyncConnection, server: Server, path: Sequence[str]
) -> StoredTable | None:
    """Return a table or a view; None where the database has none of that name."""
    async with translate_errors(connection), reading(connection, server):
        name = sql.Identifier(*path).as_string()
        table = first(await fetch_as(connection, class_row(StoredTable), _TABLE, (name,)))
    # The server has no estimate for views and for tables that were never analyzed.
    if table is not None and table.rows <= _COUNTED_ROWS:
        query = sql.SQL("SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS counted").format(
            identifier(*table.path), _COUNTED_ROWS + 1
        )
        with suppress(UnreadableError):
            ((rows,),) = await fetch_reading(connection, server, tuple_row, query)
            return replace(table, rows=rows, rows_is_exact=rows <= _COUNTED_ROWS)
    return table


class UnreadableError(Exception):
    """The server reported an error, whose name is the text, and the connection can be used again."""


async def fetch_reading(
    connection: AsyncConnection,
    server: Server,
    row_factory: BaseRowFactory[T],
    query: Query,
    parameters: Mapping[str, object] = {},
) -> list[T]:
    """Return the rows of a query in a read-only transaction, or raise UnreadableError."""
    async with translate_errors(connection):
        try:
            async with reading(connection, server):
                cursor = connection.cursor(row_factory=row_factory)
                return await (await cursor.execute(query, parameters)).fetchall()
        except psycopg.Error as error:
            if connection_lost(error) or connection.closed:
                raise
            raise UnreadableError(condition(error)) from None


async def sample_column(
    connection: AsyncConnection, server: Server, table: StoredTable, column: str
) -> ColumnSample | None:
    """Return a sample of a column; None for a type that is neither text, binary nor JSON.

    Raises:
        UnreadableError: The server reported an error.
    """
    category = table.categories.get(column)
    if category not in ("text", "bytea", "json"):
        return None
    opening = '"' if category == "json" else "^"
    parameters = {
        "names": list(_FORMATS),
        "formats": [opening + pattern for pattern in _FORMATS.values()],
        "hash_format": opening + _HASH_FORMAT,
        "json_key": _JSON_KEY if category == "json" else "^$",
    }
    query = _sample(table, column, category)
    (sample,) = await fetch_reading(connection, server, class_row(ColumnSample), query, parameters)
    return sample


def sampled_part(pages: int) -> sql.SQL:
    """Return the clause that reads about 64 pages of a table with this number of pages."""
    return sql.SQL(f" TABLESAMPLE SYSTEM ({100 * _PAGES / pages:.6f})" if pages > _PAGES else "")


def _sample(table: StoredTable, column: str, category: str) -> sql.Composed:
    name = identifier(column)
    if category == "bytea":
        stored = sql.SQL("encode(substring({}, 1, {}), 'hex')").format(name, _POSITIONS // 2)
    else:
        characters = _JSON_CHARACTERS if category == "json" else _POSITIONS
        stored = sql.SQL("left({}::text, {})").format(name, characters)
    length = sql.SQL("octet_length({})" if category == "bytea" else "length({}::text)").format(name)
    return sql.SQL(
        "WITH sampled AS MATERIALIZED (SELECT v, size FROM (SELECT {stored} AS v, {length} AS size"
        " FROM {table}{part} WHERE {name} IS NOT NULL) AS stored WHERE v <> '' LIMIT {most}),"
        " counts AS (SELECT at, count(*) AS n FROM sampled, generate_series(1, length(v)) AS at"
        " WHERE {has_positions} GROUP BY at, substr(v, at, 1)),"
        " positions AS (SELECT log(2, sum(n)) - sum(n * log(2, n::numeric)) / sum(n) AS bits FROM counts"
        " GROUP BY at)"
        " SELECT count(*) AS values, count(DISTINCT v) AS distinct,"
        " COALESCE(avg(size), 0)::float8 AS mean_length,"
        " COALESCE(avg(2.0 * regexp_count(v, '[0-9]+') / length(v)), 0)::float8 AS digit_changes,"
        " count(*) FILTER (WHERE v ~ '[\\s@]|://') AS spaced,"
        " count(*) FILTER (WHERE v ~ %(hash_format)s) AS hashes,"
        " count(*) FILTER (WHERE v ~ %(json_key)s) AS json_keys,"
        " (SELECT COALESCE(sum(bits), 0)::float8 FROM positions) AS bits,"
        " (SELECT json_object_agg(name, (SELECT count(*) FROM sampled WHERE v ~ pattern) ORDER BY place)"
        " FROM unnest(%(names)s::text[], %(formats)s::text[])"
        " WITH ORDINALITY AS f (name, pattern, place)) AS formats FROM sampled"
    ).format(
        stored=stored,
        length=length,
        table=identifier(*table.path),
        part=sampled_part(table.pages),
        name=name,
        most=MOST_VALUES,
        has_positions=category != "json",
    )
