"""What the server's catalogue says of a target."""

from typing import Final

from psycopg import AsyncConnection, errors, sql

from rotator.errors import OptionError, TargetError
from rotator.postgres.connections import APPLICATION_NAME
from rotator.postgres.failures import answered, refused_for_good
from rotator.postgres.table import Column, TargetTable

OLDEST_VERSION: Final = 150_000
_BUILTIN_SCHEMA = "pg_catalog"


async def check_server(connection: AsyncConnection, *, connections: int, concurrency: int) -> None:
    """Refuse a server that is too old or read-only, or has not enough connections left.

    Args:
        connection: In autocommit mode.
        connections: How many there are to be.
        concurrency: How many workers that is for.

    Raises:
        TargetError: It is older than PostgreSQL 15.
        ServerRefusedError: It is a replica, or read-only for another reason.
        OptionError: It has not that many connections left.
    """
    async with answered(connection):
        cursor = await connection.execute(
            "SELECT current_setting('server_version_num')::integer, current_setting('server_version'),"
            " current_setting('transaction_read_only')::boolean,"
            " current_setting('max_connections')::integer"
            " - current_setting('superuser_reserved_connections')::integer,"
            # A former owner's are gone when this run needs them.
            " (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid <> pg_backend_pid() AND application_name IS DISTINCT FROM %s)",
            (APPLICATION_NAME,),
        )
        row = await cursor.fetchone()
    number, version, is_read_only, allowed, others = row or (0, "unknown", False, 0, 0)
    if number < OLDEST_VERSION:
        raise TargetError(f"PostgreSQL 15 or later is needed; this server is {version}.")
    if is_read_only and (refused := refused_for_good(errors.ReadOnlySqlTransaction)):
        raise refused
    if connections > allowed - others:
        most = allowed - others - connections + concurrency
        advice = f"ask for at most {most}" if most > 0 else "free some, or raise max_connections"
        raise OptionError(
            f"--concurrency {concurrency} needs {connections} connections; the server allows {allowed}, and "
            f"others use {others} of them: {advice}."
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
        TargetError: The table or one of the columns is missing, its type is not one of the server's own, the
            table is none of the ordinary kind, or row-level security hides rows.
    """
    async with answered(connection):
        cursor = await connection.execute(
            "SELECT c.relkind = 'r' AND NOT c.relhassubclass, row_security_active(c.oid)"
            " FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass(%s)",
            (sql.Identifier(*path).as_string(),),
        )
        relation = await cursor.fetchone()
        cursor = await connection.execute(
            "SELECT a.attname, t.typname, n.nspname, ln.nspname, l.collname"
            " FROM pg_catalog.pg_attribute a"
            " JOIN pg_catalog.pg_type t ON t.oid = a.atttypid"
            " JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace"
            " LEFT JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation"
            " LEFT JOIN pg_catalog.pg_namespace ln ON ln.oid = l.collnamespace"
            " WHERE a.attrelid = pg_catalog.to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped",
            (sql.Identifier(*path).as_string(),),
        )
        columns = {name: found async for name, *found in cursor}
    named = ".".join(path)
    if relation is None:
        raise TargetError(
            f"The table {named} does not exist in this database: run `manage.py migrate`, or choose another "
            "with --database."
        )
    is_plain_table, hides_rows = relation
    if not is_plain_table:
        raise TargetError(
            f"{named} is no ordinary table, or has partitions or children: those cannot be rotated yet."
        )
    if hides_rows:
        raise TargetError(
            f"Row-level security hides rows of {named} from this role, and they would keep their values: "
            "use a role that owns the table or has BYPASSRLS."
        )

    def look_up(name: str) -> Column:
        if name not in columns:
            raise TargetError(f"The table {named} has no column {name}: run `manage.py migrate`.")
        type_name, schema, *collation = columns[name]
        if schema != _BUILTIN_SCHEMA:
            raise TargetError(
                f"The column {name} of {named} has the type {schema}.{type_name}, and only the server's own "
                "types can be rotated or be keys."
            )
        return Column(name=name, type_name=type_name, collation=tuple(collation) if collation[1] else None)

    return TargetTable(path=path, key=tuple(look_up(name) for name in key), column=look_up(column))
