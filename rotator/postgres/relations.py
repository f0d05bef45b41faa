"""The tables that hold the rows: the target's own, or the leaves of its tree of partitions."""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.postgres.failures import answered
from rotator.postgres.table import TargetTable, identifier

LEAVES: Final = sql.SQL(
    "(SELECT COALESCE(tree.relid, root.oid::regclass)::oid AS oid"
    " FROM (SELECT %(table)s::regclass::oid AS oid) AS root"
    # Without a row for what has no partitions.
    " LEFT JOIN LATERAL pg_partition_tree(root.oid) AS tree ON tree.isleaf)"
)
"""A subquery: the ``oid`` of each of them; takes the parameter ``table``."""


async def read_leaves(connection: AsyncConnection, table: TargetTable) -> list[sql.Composable]:
    """The quoted names of the tables that hold the rows now.

    Args:
        connection: In autocommit mode.
        table: The target's table.
    """
    async with answered(connection):
        cursor = await connection.execute(
            sql.SQL(
                "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE c.oid IN {} AND c.relkind = 'r' ORDER BY c.oid"
            ).format(LEAVES),
            {"table": table.regclass},
        )
        return [identifier(schema, name) async for schema, name in cursor]
