"""The tables that hold the rows: the target's own, or the leaves of its tree of partitions."""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.postgres.failures import answered
from rotator.postgres.table import TargetTable

LEAVES: Final = sql.SQL(
    "(SELECT COALESCE(tree.relid, root.oid::regclass)::oid AS oid"
    " FROM (SELECT %(table)s::regclass::oid AS oid) AS root"
    # Without a row for what has no partitions.
    " LEFT JOIN LATERAL pg_partition_tree(root.oid) AS tree ON tree.isleaf)"
)
"""A subquery: the ``oid`` of each of them; takes the parameter ``table``."""


def rows_written_so_far(table: TargetTable) -> sql.Composed:
    """The number of row versions that this session has written to the table, within and since any time.

    Only its change within a transaction means anything; takes the parameter ``table``.
    """
    writes = sql.SQL("pg_stat_get_xact_tuples_inserted({0}) + pg_stat_get_xact_tuples_updated({0})")
    if not table.is_partitioned:
        return sql.SQL("SELECT {}").format(writes.format(sql.SQL("%(table)s::regclass")))
    return sql.SQL("SELECT COALESCE(sum({}), 0)::bigint FROM {} AS leaf").format(
        writes.format(sql.SQL("oid")), LEAVES
    )


async def count_leaves(connection: AsyncConnection, table: TargetTable) -> int:
    """Return the number of tables that hold the rows."""
    async with answered(connection):
        cursor = await connection.execute(
            sql.SQL("SELECT count(*) FROM {} AS leaf").format(LEAVES), {"table": table.regclass}
        )
        row = await cursor.fetchone()
    return int(row[0]) if row else 0
