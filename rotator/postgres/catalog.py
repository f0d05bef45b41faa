"""The target's table, triggers and privileges, as the system catalogs describe them."""

from collections.abc import Mapping
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from rotator.exceptions import OptionError, TargetError
from rotator.postgres.connection import IS_OWN_SESSION, fetch_as, fetch_column, fetch_rows, first
from rotator.postgres.errors import read_only
from rotator.postgres.table import Column, Condition, TargetTable

OLDEST_VERSION: Final = 150_000
_NAME_BYTES: Final = 63
_OTHER_KINDS: Final = {"v": "view", "m": "materialized view", "f": "foreign table"}
# 'D' is disabled, 'O' fires in ordinary sessions alone, and 'R' in those of replicas.
TRIGGER_FIRES: Final = (
    "tgenabled NOT IN ('D', CASE current_setting('session_replication_role') WHEN 'replica' THEN 'O'"
    " ELSE 'R' END)"
)
"""A condition about pg_trigger: an update by this session fires the trigger."""

_RELATION: Final = (
    "SELECT (SELECT format('%%I.%%I', nspname, c.relname) FROM pg_namespace WHERE oid = c.relnamespace)"  # noqa: S608 - our own text
    " AS found_name, c.oid::bigint AS oid,"
    # Bits 1 and 4 of tgtype are BEFORE and UPDATE.
    " EXISTS (SELECT FROM pg_trigger WHERE NOT tgisinternal AND tgtype & 2 <> 0 AND tgtype & 16 <> 0"
    f" AND {TRIGGER_FIRES} AND (tgrelid = c.oid"
    " OR tgrelid IN (SELECT relid FROM pg_partition_tree(c.oid)))) AS has_before_triggers,"
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
    # The index orders and compares as the statements do: by the column's own collation and the operators of
    # the type's default class.
    " AND i.indcollation[k.place - 1] = a.attcollation"
    " AND EXISTS (SELECT FROM pg_opclass o JOIN pg_opclass d ON d.opcmethod = o.opcmethod"
    " AND d.opcintype = o.opcintype AND d.opcfamily = o.opcfamily AND d.opcdefault"
    " WHERE o.oid = i.indclass[k.place - 1])) = %(key)s::text[]) AS is_indexed"
    " FROM pg_class c WHERE c.oid = to_regclass(%(table)s)"
)
_COLUMNS: Final = (
    # A domain's values are sent as its base type; the base of a domain may be another domain.
    "WITH RECURSIVE base AS (SELECT a.attnum, t.oid, t.typtype, t.typbasetype FROM pg_attribute a"
    " JOIN pg_type t ON t.oid = a.atttypid WHERE a.attrelid = to_regclass(%(table)s)"
    " UNION ALL SELECT b.attnum, t.oid, t.typtype, t.typbasetype FROM base b"
    " JOIN pg_type t ON t.oid = b.typbasetype WHERE b.typtype = 'd')"
    " SELECT a.attname AS name, t.typname AS type_name, n.nspname AS type_schema,"
    " ln.nspname AS collation_schema, l.collname AS collation,"
    # The version when the indexes were built, and the present one; the database's own collation has both in
    # pg_database.
    " CASE WHEN l.collprovider = 'd' THEN d.datcollversion ELSE l.collversion END AS recorded_version,"
    " CASE WHEN l.collprovider = 'd' THEN pg_database_collation_actual_version(d.oid)"
    " ELSE pg_collation_actual_version(l.oid) END AS actual_version,"
    # Since PostgreSQL 18, attnotnull is also true for NOT NULL ... NOT VALID: older rows may have NULL.
    " a.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint v WHERE v.conrelid = a.attrelid"
    " AND v.contype = 'n' AND NOT v.convalidated AND v.conkey = ARRAY[a.attnum]) AS not_null,"
    " a.attgenerated <> '' OR a.attidentity = 'a' AS is_generated,"
    " format_type(a.atttypid, a.atttypmod) AS stored_type,"
    " t.typcategory = 'S' OR t.typname = 'bytea' AS can_be_blank,"
    " t.typcategory = 'A' AS is_array, t.typtype = 'c' OR t.typname IN ('json', 'jsonb', 'xml')"
    " AS is_composite,"
    " EXISTS (SELECT FROM pg_partitioned_table p WHERE p.partrelid = a.attrelid"
    " AND a.attnum = ANY (p.partattrs)) AS is_partition_key,"
    # The column has another number in a partition whose columns have another order.
    " (SELECT min(f.conrelid::regclass::text) FROM pg_constraint f JOIN pg_attribute r"
    " ON r.attrelid = f.confrelid AND r.attnum = ANY (f.confkey) WHERE f.contype = 'f'"
    " AND r.attname = a.attname AND f.confrelid IN (SELECT a.attrelid UNION ALL"
    " SELECT relid FROM pg_partition_tree(a.attrelid))) AS referrer"
    " FROM pg_attribute a JOIN base b ON b.attnum = a.attnum AND b.typtype <> 'd'"
    " JOIN pg_type t ON t.oid = b.oid"
    " JOIN pg_namespace n ON n.oid = t.typnamespace"
    " JOIN pg_database d ON d.datname = current_database()"
    " LEFT JOIN pg_collation l ON l.oid = a.attcollation"
    " LEFT JOIN pg_namespace ln ON ln.oid = l.collnamespace"
    " WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped"
)


async def check_server(connection: AsyncConnection, *, connections: int, concurrency: int) -> None:
    """Refuse a server that is too old or read-only, or has too few free connections.

    Raises:
        TargetError: The server is older than PostgreSQL 15.
        ServerLostError: The server is a replica, or read-only for another reason.
        OptionError: The server has too few free connections.
    """
    ((number, version, is_read_only, is_standby, allowed, others),) = await fetch_rows(
        connection,
        "SELECT current_setting('server_version_num')::integer, current_setting('server_version'),"  # noqa: S608 - our own text
        " current_setting('transaction_read_only')::boolean, pg_is_in_recovery(),"
        " current_setting('max_connections')::integer"
        " - current_setting('superuser_reserved_connections')::integer,"
        # A previous owner's are closed when this run needs them.
        " (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        f" AND pid <> pg_backend_pid() AND ({IS_OWN_SESSION}) IS NOT TRUE)",
    )
    if number < OLDEST_VERSION:
        raise TargetError(f"Cannot rotate on PostgreSQL {version}: version 15 or later is required.")
    if is_read_only:
        raise read_only(is_standby=is_standby)
    if connections > allowed - others:
        most = allowed - others - connections + concurrency
        advice = f"Use at most --concurrency {most}" if most > 0 else "Close some, or raise max_connections"
        raise OptionError(
            f"Cannot open {connections} connections for --concurrency {concurrency}: the server allows "
            f"{allowed}, and other sessions use {others} of them. {advice}."
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
    """Read the target's table from the system catalogs.

    ``path`` is that of :class:`TargetTable`; ``key`` and ``columns`` are the names of these columns.

    Raises:
        TargetError: The table cannot be rotated.
    """
    name = sql.Identifier(*path).as_string()
    named = ".".join(path)
    relation = first(await fetch_as(connection, dict_row, _RELATION, {"table": name, "key": list(key)}))
    if relation is None:
        raise TargetError(
            f"Cannot rotate {named}: the table does not exist in this database. Run `manage.py migrate`, or "
            "choose another database with --database."
        )
    found = {row["name"]: row for row in await fetch_as(connection, dict_row, _COLUMNS, {"table": name})}
    _check_relation(named, relation)
    for wanted in (*key, *columns):
        short = wanted.encode()[:_NAME_BYTES].decode(errors="ignore")
        if wanted not in found and short in found:
            raise TargetError(
                f"PostgreSQL has shortened the name of the column {wanted} of {named} to {_NAME_BYTES} "
                f"bytes. Set db_column = '{short}' in the model, then run the same command again."
            )
    if missing := [wanted for wanted in (*key, *columns) if wanted not in found]:
        raise TargetError(
            f"The table {named} has no column {' and no column '.join(missing)}. Run `manage.py migrate`."
        )
    if nullable := [wanted for wanted in key if not found[wanted]["not_null"]]:
        changes = ", ".join(f"ALTER COLUMN {wanted} SET NOT NULL" for wanted in nullable)
        raise TargetError(
            f"Cannot find rows of {named} by the key, because these columns of it allow NULL: "
            f"{', '.join(nullable)}. Run ALTER TABLE ... {changes}."
        )
    for wanted in key:
        _check_key_column(named, found[wanted])
    if not relation["is_indexed"]:
        raise TargetError(
            f"{named} has no index on its primary key that finds every row: the index must be unique, valid, "
            "not deferrable and not partial, and have the columns' own collation and default operator class. "
            "Create one with `CREATE UNIQUE INDEX CONCURRENTLY`."
        )
    if faults := [fault for wanted in columns for fault in _column_faults(named, found[wanted])]:
        raise TargetError(" ".join(faults))

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
        oid=relation["oid"],
        has_before_triggers=relation["has_before_triggers"],
        is_partitioned=relation["kind"] == "p",
    )


async def read_update_triggers(
    connection: AsyncConnection, table: TargetTable, *, skipped: bool = False
) -> tuple[str, ...]:
    """Return the names of the enabled triggers that an update of the table by this session fires.

    With ``skipped``, return those that only updates by other sessions fire.
    """
    query = table.compose(
        "SELECT DISTINCT tgname FROM pg_trigger"
        " WHERE tgrelid IN (SELECT oid FROM {partitions} AS leaf UNION SELECT {regclass})"
        # Bit 4 of tgtype is UPDATE.
        " AND NOT tgisinternal AND tgtype & 16 <> 0 AND {fires} ORDER BY 1",
        fires=sql.SQL(f"tgenabled = 'O' AND NOT {TRIGGER_FIRES}" if skipped else TRIGGER_FIRES),
    )
    return await fetch_column(connection, query)


async def count_partitions(connection: AsyncConnection, table: TargetTable) -> int:
    """Return the number of tables that hold the rows."""
    query = table.compose("SELECT count(*)::integer FROM {partitions} AS leaf")
    (partitions,) = await fetch_column(connection, query)
    return int(partitions)


def _check_relation(named: str, relation: Mapping[str, Any]) -> None:
    kind = relation["kind"]
    reasons = {
        f"it is a {_OTHER_KINDS.get(kind, 'relation of another kind')}. Rotate the table that holds its "
        "rows.": kind not in {"r", "p"},
        "other tables inherit from it, and its index does not have their keys. Define a model for each of "
        "them, and rotate those.": kind == "r" and relation["has_children"],
        "some of its partitions are on other servers, where no checkpoint can be committed with them. Rotate "
        "them there.": relation["has_foreign_partitions"],
        "row-level security hides rows from this role, and they would keep their values. Use a role that "
        "owns the table or has BYPASSRLS.": relation["hides_rows"],
        f"the rule {relation['update_rules']} rewrites each UPDATE, so updated rows cannot be counted. "
        "Disable it with ALTER TABLE ... DISABLE RULE during the rotation.": relation["update_rules"],
    }
    for reason, applies in reasons.items():
        if applies:
            raise TargetError(f"Cannot rotate {named}: {reason}")


def _check_key_column(named: str, row: Mapping[str, Any]) -> None:
    name = row["name"]
    if row["is_array"] or row["is_composite"]:
        raise TargetError(
            f"Cannot find rows of {named} by the key column {name}: values of type {row['type_name']} are "
            "not written as one text. Rotate by a model whose key has a simple type."
        )
    recorded, actual = row["recorded_version"], row["actual_version"]
    if recorded and actual and recorded != actual:
        refresh = (
            "ALTER DATABASE ... REFRESH COLLATION VERSION"
            if row["collation"] == "default"
            else f"ALTER COLLATION {row['collation_schema']}.{row['collation']} REFRESH VERSION"
        )
        raise TargetError(
            f"Cannot find all rows of {named} by the key column {name}: its indexes were built with version "
            f"{recorded} of its collation, and the server compares with version {actual}. Run REINDEX TABLE, "
            f"then {refresh}."
        )


def _column_faults(named: str, row: Mapping[str, Any]) -> list[str]:
    reasons = {
        "is generated by the server. Rotate the columns that it is made from.": row["is_generated"],
        "is an array: its secrets cannot be replaced one by one.": row["is_array"],
        "is part of the partition key: new values would move rows between partitions. Add a column for the "
        "secret, and rotate that.": row["is_partition_key"],
        f"is referenced by {row['referrer']}: new values would break these references. Add a column for the "
        "secret, and rotate that.": row["referrer"],
    }
    return [f"The column {row['name']} of {named} {reason}" for reason, applies in reasons.items() if applies]


_OWN_TABLES: Final = {
    "rotator_rotation": ("SELECT", "INSERT", "UPDATE"),
    "rotator_completedrange": ("SELECT", "INSERT"),
    "rotator_latetransaction": ("SELECT", "INSERT"),
    "rotator_control": ("SELECT", "INSERT", "UPDATE"),
    "rotator_action": ("SELECT", "INSERT"),
    "rotator_ledger": ("SELECT",),
    "rotator_measurement": ("SELECT", "INSERT"),
}
_PROOF_TABLES: Final = {
    "rotator_ledger": ("SELECT", "INSERT", "UPDATE"),
    "rotator_verification": ("SELECT", "INSERT", "UPDATE"),
}
# The tables of ledgers are made next to it.
_SCHEMA: Final = (
    "SELECT quote_ident(n.nspname), has_schema_privilege(n.oid, 'CREATE') FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass('rotator_ledger')"
)
_MISSING: Final = (
    "SELECT name, string_agg(privilege || COALESCE(' (\"' || replace(field, '\"', '\"\"') || '\")', ''), ', '"
    " ORDER BY place) FROM unnest(%(tables)s::text[], %(privileges)s::text[], %(columns)s::text[])"
    " WITH ORDINALITY AS needed (name, privilege, field, place)"
    " WHERE NOT COALESCE(has_table_privilege(to_regclass(name)::oid, privilege), true)"
    " AND (field IS NULL OR NOT has_column_privilege(to_regclass(name)::oid, field, privilege))"
    " GROUP BY name ORDER BY min(place)"
)


async def missing_grants(
    connection: AsyncConnection, table: TargetTable, *, proves: bool = False, guards: bool = False
) -> tuple[str, ...]:
    """Return the GRANT statements that the role still needs; empty where it has all privileges."""
    ((role,),) = await fetch_rows(connection, "SELECT quote_ident(current_user)")
    needed: list[tuple[str, str, str | None]] = [(table.quoted_name, "SELECT", None)]
    needed += [(table.quoted_name, "UPDATE", name) for name in table.column_names]
    if guards:
        needed.append((table.quoted_name, "TRIGGER", None))
    for name, privileges in (_OWN_TABLES | (_PROOF_TABLES if proves else {})).items():
        needed += [(name, privilege, None) for privilege in privileges]
    tables, rights, columns = map(list, zip(*needed, strict=True))
    parameters = {"tables": tables, "privileges": rights, "columns": columns}
    missing = await fetch_rows(connection, _MISSING, parameters)
    grants = [f"GRANT {privileges} ON {name} TO {role};" for name, privileges in missing]
    if proves:
        grants += [
            f"GRANT CREATE ON SCHEMA {schema} TO {role};"
            for schema, can_create in await fetch_rows(connection, _SCHEMA)
            if not can_create
        ]
    return tuple(grants)
