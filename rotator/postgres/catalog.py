"""What the server's catalogue says of a target."""

from collections.abc import Mapping
from typing import Any, Final

from psycopg import AsyncConnection, errors, sql
from psycopg.rows import dict_row

from rotator.errors import OptionError, TargetError
from rotator.postgres.connections import APPLICATION_NAME
from rotator.postgres.failures import answered, refused_for_good
from rotator.postgres.table import Column, Condition, TargetTable

OLDEST_VERSION: Final = 150_000
_KINDS: Final = ("r", "p")
_OTHER_KINDS: Final = {"v": "view", "m": "materialized view", "f": "foreign table"}
_RELATION: Final = (
    "SELECT (SELECT format('%%I.%%I', nspname, c.relname) FROM pg_namespace WHERE oid = c.relnamespace)"
    " AS found_name,"
    " c.relkind AS kind, c.relhassubclass AS has_children,"
    " EXISTS (SELECT FROM pg_partition_tree(c.oid) tree JOIN pg_class leaf ON leaf.oid = tree.relid"
    " WHERE leaf.relkind = 'f') AS has_foreign_partitions,"
    " row_security_active(c.oid) AS hides_rows,"
    " EXISTS (SELECT FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid"
    " JOIN pg_am am ON am.oid = ic.relam WHERE i.indrelid = c.oid AND am.amname = 'btree'"
    " AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = "
    "cardinality(%(key)s::text[]) AND (SELECT array_agg(a.attname::text ORDER BY k.place)"
    " FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, place)"
    " JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number"
    " WHERE k.place <= i.indnkeyatts) = %(key)s::text[]) AS is_indexed"
    " FROM pg_class c WHERE c.oid = to_regclass(%(table)s)"
)
_COLUMNS: Final = (
    "SELECT a.attname AS name, t.typname AS type_name, n.nspname AS type_schema,"
    " ln.nspname AS collation_schema, l.collname AS collation,"
    # The database's own has its version there.
    " CASE WHEN l.collname = 'default' THEN (SELECT pg_database_collation_actual_version(oid)"
    " FROM pg_database WHERE datname = current_database())"
    " ELSE pg_collation_actual_version(l.oid) END AS collation_version,"
    " a.attnotnull AS not_null, a.attgenerated <> '' OR a.attidentity = 'a' AS is_generated,"
    " t.typcategory = 'A' AS is_array,"
    " EXISTS (SELECT FROM pg_partitioned_table p WHERE p.partrelid = a.attrelid"
    " AND a.attnum = ANY (p.partattrs)) AS is_partition_key,"
    " (SELECT min(f.conrelid::regclass::text) FROM pg_constraint f WHERE f.contype = 'f'"
    " AND f.confrelid = a.attrelid AND a.attnum = ANY (f.confkey)) AS referrer"
    " FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid"
    " JOIN pg_namespace n ON n.oid = t.typnamespace"
    " LEFT JOIN pg_collation l ON l.oid = a.attcollation"
    " LEFT JOIN pg_namespace ln ON ln.oid = l.collnamespace"
    " WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped"
)


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
    connection: AsyncConnection,
    *,
    path: tuple[str, ...],
    key: tuple[str, ...],
    columns: tuple[str, ...],
    condition: Condition | None = None,
    include_null: bool = False,
) -> TargetTable:
    """Look a target up where it lives.

    Args:
        connection: In autocommit mode.
        path: The table's name, with its schema before it where it has one; unquoted.
        key: The names of the primary key's columns, in its order.
        columns: The names of the rotated columns.
        condition: Which rows are rotated; None for all.
        include_null: Whether a NULL gets a value, too.

    Raises:
        TargetError: The table or one of the columns is missing, rows cannot be found by the key, a column
        cannot
            be given a value, other rows refer to it, or row-level security hides rows.
    """
    name = sql.Identifier(*path).as_string()
    named = ".".join(path)
    async with answered(connection):
        rows = connection.cursor(row_factory=dict_row)
        await rows.execute(_RELATION, {"table": name, "key": list(key)})
        relation = await rows.fetchone()
        if relation is None:
            raise TargetError(
                f"The table {named} does not exist in this database: run `manage.py migrate`, or choose "
                "another with --database."
            )
        await rows.execute(_COLUMNS, {"table": name})
        found = {row["name"]: row async for row in rows}
    _check_relation(named, relation)
    for wanted in (*key, *columns):
        if wanted not in found:
            raise TargetError(f"The table {named} has no column {wanted}: run `manage.py migrate`.")
    for wanted in columns:
        _check_column(named, found[wanted])

    def column(wanted: str) -> Column:
        row = found[wanted]
        return Column(
            name=wanted,
            type_name=row["type_name"],
            type_schema=row["type_schema"],
            collation=(row["collation_schema"], row["collation"]) if row["collation"] else None,
            keeps_null=not (row["not_null"] or include_null),
        )

    return TargetTable(
        path=path,
        key=tuple(column(wanted) for wanted in key),
        columns=tuple(column(wanted) for wanted in columns),
        condition=condition,
        found_name=relation["found_name"],
        collation_versions={
            wanted: found[wanted]["collation_version"] for wanted in key if found[wanted]["collation_version"]
        },
    )


def _check_relation(named: str, relation: Mapping[str, Any]) -> None:
    kind = relation["kind"]
    if kind not in _KINDS:
        raise TargetError(
            f"{named} is a {_OTHER_KINDS.get(kind, 'relation of another kind')}: rotate the table that holds "
            "its rows."
        )
    if kind == "r" and relation["has_children"]:
        raise TargetError(
            f"Other tables inherit from {named}, and no index of it says which keys they hold: rotate each "
            "of them by a model of its own."
        )
    if relation["has_foreign_partitions"]:
        raise TargetError(
            f"Partitions of {named} are on other servers, where no checkpoint can be committed with them: "
            "rotate them there."
        )
    if relation["hides_rows"]:
        raise TargetError(
            f"Row-level security hides rows of {named} from this role, and they would keep their values: "
            "use a role that owns the table or has BYPASSRLS."
        )
    if not relation["is_indexed"]:
        raise TargetError(
            f"{named} has no unique index on its primary key, by which rows are found: create one, as "
            "`CREATE UNIQUE INDEX CONCURRENTLY` does."
        )


def _check_column(named: str, row: Mapping[str, Any]) -> None:
    where = f"The column {row['name']} of {named}"
    if row["is_generated"]:
        raise TargetError(f"{where} is generated by the server: rotate the columns that it is made from.")
    if row["is_array"]:
        raise TargetError(f"{where} is an array, of which no single secret can be made anew.")
    if row["is_partition_key"]:
        raise TargetError(
            f"{where} decides which partition a row is in, so that new values would move rows past the "
            "planner: add a column for the secret, and rotate that."
        )
    if row["referrer"]:
        raise TargetError(
            f"{where} is what {row['referrer']} refers to: new values would break these references; add a "
            "column for the secret, and rotate that."
        )
