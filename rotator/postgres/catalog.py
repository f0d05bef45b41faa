"""The target's table, triggers and privileges, as the system catalogs describe them."""

from collections.abc import Mapping
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from rotator.exceptions import OptionError, TargetError
from rotator.postgres.connection import APPLICATION_NAME
from rotator.postgres.errors import read_only, translate_errors
from rotator.postgres.table import PARTITIONS, Column, Condition, TargetTable

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
    # Bit 2 of ev_type is UPDATE.
    " (SELECT string_agg(r.rulename, ', ' ORDER BY r.rulename) FROM pg_rewrite r"
    " WHERE r.ev_class = c.oid AND r.ev_type = '2' AND r.ev_enabled NOT IN ('D', 'R')) AS update_rules,"
    " EXISTS (SELECT FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid"
    " JOIN pg_am am ON am.oid = ic.relam WHERE i.indrelid = c.oid AND am.amname = 'btree'"
    # A deferred one lets a transaction see two rows with one key.
    " AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL"
    " AND i.indnkeyatts = cardinality(%(key)s::text[])"
    " AND (SELECT array_agg(a.attname::text ORDER BY k.place)"
    " FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, place)"
    " JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number"
    " WHERE k.place <= i.indnkeyatts"
    # The order and the equality of the index are those of the comparisons: the column's own collation, and
    # the operators of the type's default class.
    " AND i.indcollation[k.place - 1] = a.attcollation"
    " AND EXISTS (SELECT FROM pg_opclass o JOIN pg_opclass d ON d.opcmethod = o.opcmethod"
    " AND d.opcintype = o.opcintype AND d.opcfamily = o.opcfamily AND d.opcdefault"
    " WHERE o.oid = i.indclass[k.place - 1])) = %(key)s::text[]) AS is_indexed"
    " FROM pg_class c WHERE c.oid = to_regclass(%(table)s)"
)
_COLUMNS: Final = (
    # A domain's base type is what its values are sent as; a domain may be over another one.
    "WITH RECURSIVE base AS (SELECT a.attnum, t.oid, t.typtype, t.typbasetype FROM pg_attribute a"
    " JOIN pg_type t ON t.oid = a.atttypid WHERE a.attrelid = to_regclass(%(table)s)"
    " UNION ALL SELECT b.attnum, t.oid, t.typtype, t.typbasetype FROM base b"
    " JOIN pg_type t ON t.oid = b.typbasetype WHERE b.typtype = 'd')"
    " SELECT a.attname AS name, t.typname AS type_name, n.nspname AS type_schema,"
    " ln.nspname AS collation_schema, l.collname AS collation,"
    # What the server recorded when the indexes were built, and what it would compare with now; the
    # database's own collation has both elsewhere.
    " CASE WHEN l.collprovider = 'd' THEN d.datcollversion ELSE l.collversion END AS recorded_version,"
    " CASE WHEN l.collprovider = 'd' THEN pg_database_collation_actual_version(d.oid)"
    " ELSE pg_collation_actual_version(l.oid) END AS actual_version,"
    " a.attnotnull AS not_null, a.attgenerated <> '' OR a.attidentity = 'a' AS is_generated,"
    " format_type(a.atttypid, a.atttypmod) AS stored_type,"
    " t.typcategory = 'S' OR t.typname = 'bytea' AS can_be_blank,"
    " t.typcategory = 'A' AS is_array, t.typtype = 'c' OR t.typname IN ('json', 'jsonb', 'xml')"
    " AS is_composite,"
    " EXISTS (SELECT FROM pg_partitioned_table p WHERE p.partrelid = a.attrelid"
    " AND a.attnum = ANY (p.partattrs)) AS is_partition_key,"
    " (SELECT min(f.conrelid::regclass::text) FROM pg_constraint f WHERE f.contype = 'f'"
    " AND f.confrelid = a.attrelid AND a.attnum = ANY (f.confkey)) AS referrer"
    " FROM pg_attribute a JOIN base b ON b.attnum = a.attnum AND b.typtype <> 'd'"
    " JOIN pg_type t ON t.oid = b.oid"
    " JOIN pg_namespace n ON n.oid = t.typnamespace"
    " JOIN pg_database d ON d.datname = current_database()"
    " LEFT JOIN pg_collation l ON l.oid = a.attcollation"
    " LEFT JOIN pg_namespace ln ON ln.oid = l.collnamespace"
    " WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped"
)
# Bit 4 of tgtype is UPDATE; 'D' is disabled and 'R' fires on replicas alone.
_UPDATE_TRIGGERS: Final = sql.SQL(
    "SELECT DISTINCT tgname FROM pg_trigger"
    " WHERE tgrelid IN (SELECT oid FROM {} AS leaf UNION SELECT %(table)s::regclass) AND NOT tgisinternal"
    " AND tgtype & 16 <> 0 AND tgenabled NOT IN ('D', 'R') ORDER BY 1"
).format(PARTITIONS)


async def check_server(connection: AsyncConnection, *, connections: int, concurrency: int) -> None:
    """Refuse a server that is too old or read-only, or has not enough connections left.

    Args:
        connection: In autocommit mode.
        connections: How many there are to be.
        concurrency: How many workers that is for.

    Raises:
        TargetError: It is older than PostgreSQL 15.
        ServerLostError: It is a replica, or read-only for another reason.
        OptionError: It has not that many connections left.
    """
    async with translate_errors(connection):
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
    if is_read_only:
        raise read_only()
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
    include_blank: bool = False,
) -> TargetTable:
    """Look a target up where it lives.

    Args:
        connection: In autocommit mode.
        path: The table's name, with its schema before it where it has one; unquoted.
        key: The names of the primary key's columns, in its order.
        columns: The names of the rotated columns.
        condition: Which rows are rotated; None for all.
        include_null: Whether a NULL gets a value, too.
        include_blank: Whether an empty text gets a value, too.

    Raises:
        TargetError: The table or one of the columns is missing, rows cannot be found by the key, a column
            cannot be given a value, other rows refer to it, or row-level security hides rows.
    """
    name = sql.Identifier(*path).as_string()
    named = ".".join(path)
    async with translate_errors(connection):
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
    for wanted in key:
        _check_key_column(named, found[wanted])
    _check_key_index(named, relation)
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
            stored_type=row["stored_type"],
            keeps_blank=row["can_be_blank"] and not include_blank,
        )

    return TargetTable(
        path=path,
        key=tuple(column(wanted) for wanted in key),
        columns=tuple(column(wanted) for wanted in columns),
        condition=condition,
        found_name=relation["found_name"],
        is_partitioned=relation["kind"] == "p",
    )


async def read_update_triggers(connection: AsyncConnection, table: TargetTable) -> tuple[str, ...]:
    """The names of the enabled triggers that an update of the table fires.

    Args:
        connection: In autocommit mode, or in a transaction.
        table: The target's table.
    """
    async with translate_errors(connection):
        cursor = await connection.execute(_UPDATE_TRIGGERS, {"table": table.regclass})
        return tuple([name async for (name,) in cursor])


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
    if relation["update_rules"]:
        raise TargetError(
            f"The rule {relation['update_rules']} of {named} rewrites each UPDATE, so the rotation could not "
            "tell which rows were updated: disable it with ALTER TABLE ... DISABLE RULE during the rotation."
        )


def _check_key_index(named: str, relation: Mapping[str, Any]) -> None:
    if not relation["is_indexed"]:
        raise TargetError(
            f"{named} has no index on its primary key that finds each row by it: the index must be unique, "
            "valid, not deferrable and not partial, and have the columns' own collation and default operator "
            "class. Create one with `CREATE UNIQUE INDEX CONCURRENTLY`."
        )


def _check_key_column(named: str, row: Mapping[str, Any]) -> None:
    name = row["name"]
    if not row["not_null"]:
        raise TargetError(
            f"The key column {name} of {named} allows NULL, and a row without a key cannot be found by it: "
            f"run ALTER TABLE ... ALTER COLUMN {name} SET NOT NULL."
        )
    if row["is_array"] or row["is_composite"]:
        raise TargetError(
            f"The key column {name} of {named} has the type {row['type_name']}, whose values are not written "
            "as one text: rotate by a model whose key has a simple type."
        )
    recorded, actual = row["recorded_version"], row["actual_version"]
    if recorded and actual and recorded != actual:
        refresh = (
            "ALTER DATABASE ... REFRESH COLLATION VERSION"
            if row["collation"] == "default"
            else f"ALTER COLLATION {row['collation_schema']}.{row['collation']} REFRESH VERSION"
        )
        raise TargetError(
            f"The indexes on the key column {name} of {named} were built with version {recorded} of its "
            f"collation, and the server compares with version {actual}, so rows may be missing from them: "
            f"run REINDEX TABLE, then {refresh}."
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


_OWN_TABLES: Final = {
    "rotator_rotation": ("SELECT", "INSERT", "UPDATE"),
    "rotator_completedrange": ("SELECT", "INSERT"),
    "rotator_latetransaction": ("SELECT", "INSERT"),
}
_HAS: Final = (
    "SELECT COALESCE(has_table_privilege(to_regclass(%(table)s)::oid, %(privilege)s), true)"
    " OR %(column)s::text IS NOT NULL"
    " AND has_column_privilege(to_regclass(%(table)s)::oid, %(column)s, %(privilege)s)"
)


async def missing_grants(connection: AsyncConnection, table: TargetTable) -> tuple[str, ...]:
    """Return the GRANT statements that the role still needs; empty where it has all privileges.

    Args:
        connection: In autocommit mode.
        table: The target's table.
    """
    async with translate_errors(connection):
        cursor = await connection.execute("SELECT quote_ident(current_user)")
        ((role,),) = await cursor.fetchall()
    needed: dict[str, list[tuple[str, str | None]]] = {
        table.regclass: [("SELECT", None), *(("UPDATE", column.name) for column in table.columns)]
    }
    for name, privileges in _OWN_TABLES.items():
        needed[name] = [(privilege, None) for privilege in privileges]
    grants = []
    for name, wanted in needed.items():
        missing = [
            _written(privilege, column)
            for privilege, column in wanted
            if not await _has(connection, name, privilege, column)
        ]
        if missing:
            grants.append(f"GRANT {', '.join(missing)} ON {name} TO {role};")
    return tuple(grants)


async def _has(connection: AsyncConnection, name: str, privilege: str, column: str | None) -> bool:
    async with translate_errors(connection):
        cursor = await connection.execute(_HAS, {"table": name, "privilege": privilege, "column": column})
        row = await cursor.fetchone()
    return bool(row and row[0])


def _written(privilege: str, column: str | None) -> str:
    return privilege if column is None else f"{privilege} ({sql.Identifier(column).as_string()})"
