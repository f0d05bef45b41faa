"""What the server's catalogue says of a target."""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.errors import OptionError, TargetError
from rotator.postgres.failures import answered
from rotator.postgres.table import Column, TargetTable

OLDEST_VERSION: Final = 150_000
_BUILTIN_SCHEMA = "pg_catalog"


async def check_server(connection: AsyncConnection, *, connections: int, concurrency: int) -> None:
    """Refuse a server that is too old, or does not allow enough connections.

    Raises:
        TargetError: It is older than PostgreSQL 15.
        OptionError: It does not allow this many connections.
    """
    async with answered(connection):
        cursor = await connection.execute(
            "SELECT current_setting('server_version_num')::integer, current_setting('server_version'),"
            " current_setting('max_connections')::integer"
            " - current_setting('superuser_reserved_connections')::integer"
        )
        row = await cursor.fetchone()
    number, version, allowed = row or (0, "unknown", 0)
    if number < OLDEST_VERSION:
        raise TargetError(f"PostgreSQL 15 or later is needed; this server is {version}.")
    if connections > allowed:
        raise OptionError(
            f"--concurrency {concurrency} needs {connections} connections and the server allows {allowed}: "
            f"ask for at most {allowed - connections + concurrency}."
        )


async def read_table(
    connection: AsyncConnection, *, path: tuple[str, ...], key: tuple[str, ...], column: str
) -> TargetTable:
    """Look a target up where it lives.

    Args:
        connection: In autocommit mode.
        path: The table's name, with its schema before it where it has one; unquoted.
        key: The names of the primary key's columns, in its order.
        column: The name of the rotated column.

    Raises:
        TargetError: The table or one of the columns is missing, its type is not one of the server's own, or
            row-level security hides rows.
    """
    async with answered(connection):
        cursor = await connection.execute(
            "SELECT a.attname, t.typname, n.nspname, row_security_active(a.attrelid)"
            " FROM pg_catalog.pg_attribute a"
            " JOIN pg_catalog.pg_type t ON t.oid = a.atttypid"
            " JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace"
            " WHERE a.attrelid = pg_catalog.to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped",
            (sql.Identifier(*path).as_string(),),
        )
        columns = await cursor.fetchall()
    types = {name: (type_name, schema) for name, type_name, schema, _ in columns}
    named = ".".join(path)
    if not types:
        raise TargetError(
            f"The table {named} does not exist in this database: run `manage.py migrate`, or choose another "
            "with --database."
        )

    if any(hides_rows for *_, hides_rows in columns):
        raise TargetError(
            f"Row-level security hides rows of {named} from this role, and they would keep their values: "
            "use a role that owns the table or has BYPASSRLS."
        )

    def look_up(name: str) -> Column:
        if name not in types:
            raise TargetError(f"The table {named} has no column {name}: run `manage.py migrate`.")
        type_name, schema = types[name]
        if schema != _BUILTIN_SCHEMA:
            raise TargetError(
                f"The column {name} of {named} has the type {schema}.{type_name}, and only the server's own "
                "types can be rotated or be keys."
            )
        return Column(name=name, type_name=type_name)

    return TargetTable(path=path, key=tuple(look_up(name) for name in key), column=look_up(column))
