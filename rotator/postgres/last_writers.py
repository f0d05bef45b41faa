"""Which transaction wrote each row last: this rotation's, another one since its start, or an older one.

A row's ``xmin`` names the transaction that wrote it last, without its epoch. Each checkpoint and each late
transaction records its own id. One scan of the table counts rows by ``xmin`` and joins these counts, never
the rows, with the recorded ids. See docs/decisions/0008.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from rotator.postgres.errors import translate_errors
from rotator.postgres.table import PARTITIONS, ROW, TargetTable, identifier

_STARTED: Final = sql.SQL("%(started_xid)s::text::xid8::xid")
RECORDED: Final = sql.SQL(
    "SELECT xid::text::xid8::xid AS xid, bool_or(has_other_writes) AS has_other_writes FROM"
    " (SELECT xid, has_other_writes FROM rotator_completedrange"
    " WHERE rotation_id = %(rotation)s AND xid IS NOT NULL"
    " UNION ALL SELECT xid, false FROM rotator_latetransaction WHERE rotation_id = %(rotation)s) AS written"
    " GROUP BY 1"
)
"""The transactions that recorded what they wrote for the rotation; takes the parameter ``rotation``."""

ATTACHED: Final = sql.SQL(
    # The latest of the transactions that attached the leaf, or a partition that it is part of.
    "SELECT leaf.oid AS leaf, (array_agg(i.xmin ORDER BY age(i.xmin)))[1] AS xid FROM {} AS leaf,"
    " pg_partition_ancestors(leaf.oid) AS ancestor"
    " JOIN pg_partition_tree(%(table)s::regclass) AS tree ON tree.relid = ancestor.relid AND tree.level > 0"
    " JOIN pg_inherits i ON i.inhrelid = ancestor.relid"
    " WHERE age(i.xmin) BETWEEN 0 AND age({}) GROUP BY leaf.oid"
).format(PARTITIONS, _STARTED)
"""The transaction that made each leaf a partition, if that was since the rotation's start.

Takes the parameters ``table`` and ``started_xid``.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWriters:
    """The rows that the rotation is for, by who wrote them last.

    Attributes:
        confirmed: The rows that this rotation wrote last: they have their new values.
        others: The rows that another session, or a trigger, has written since the rotation's start.
        older: The rows that nothing has written since the rotation's start: they have their old values.
        renewed: The leaves' oids of which another session seems to have rewritten every row.
    """

    confirmed: int
    others: int
    older: int
    renewed: tuple[int, ...]


def is_older(xid: sql.Composable, attached_xid: sql.Composable) -> sql.Composable:
    """A condition: this transaction cannot have written a row of the target since the start.

    It has to be evaluated in autocommit mode: within a transaction, newer rows have a negative age. A
    negative age is that of a row of an earlier epoch. A row that is older than the attachment of its
    partition was written while the rotation did not know of it.

    Args:
        xid: The row's ``xmin``.
        attached_xid: The transaction in :data:`ATTACHED`, or NULL. Its age is read by the same query as that
            of the row's, since both grow.
    """
    return sql.SQL(
        "(age({xid}) NOT BETWEEN 0 AND age({started}) OR COALESCE(age({xid}) >= age({attached_xid}), false))"
    ).format(xid=xid, started=_STARTED, attached_xid=attached_xid)


_COUNT: Final = (
    "WITH counted AS MATERIALIZED (SELECT {row_name}.tableoid AS leaf, {row_name}.xmin AS xid,"
    " count(*) AS rows FROM {row} WHERE true{and_matches} GROUP BY 1, 2),"
    " recorded AS ({recorded}), attached AS ({attached}),"
    " classified AS (SELECT c.leaf, c.rows, age(c.xid) AS age,"
    " CASE WHEN r.has_other_writes THEN 'mixed' WHEN r.xid IS NOT NULL THEN 'confirmed'"
    " WHEN {is_older} THEN 'older' ELSE 'others' END AS writer"
    " FROM counted c LEFT JOIN recorded r ON r.xid = c.xid LEFT JOIN attached a ON a.leaf = c.leaf)"
    " SELECT leaf::bigint AS leaf,"
    " COALESCE(sum(rows) FILTER (WHERE writer = 'confirmed'), 0)::bigint AS confirmed,"
    " COALESCE(sum(rows) FILTER (WHERE writer = 'mixed'), 0)::bigint AS mixed,"
    " COALESCE(sum(rows) FILTER (WHERE writer = 'others'), 0)::bigint AS others,"
    " COALESCE(sum(rows) FILTER (WHERE writer = 'older'), 0)::bigint AS older,"
    # All rows were rewritten: none is older than the first of the others, though checkpoints are.
    " leaf::bigint = ANY (%(rewritten)s::bigint[])"
    " AND COALESCE(max(age) FILTER (WHERE writer = 'others')"
    " > COALESCE(max(age) FILTER (WHERE writer IN ('confirmed', 'mixed')), -1), false)"
    " AND count(*) FILTER (WHERE writer = 'older') = 0"
    " AND EXISTS (SELECT FROM recorded WHERE age(xid) > (SELECT max(o.age) FROM classified o"
    " WHERE o.leaf = classified.leaf AND o.writer = 'others')) AS is_renewed"
    " FROM classified GROUP BY leaf"
)
# Of a transaction in which triggers wrote, too, only the rows of the range are known to be the rotation's.
_MIXED: Final = (
    "SELECT COALESCE(sum(found.rows), 0)::bigint FROM rotator_completedrange c, LATERAL"
    " (SELECT count(*) AS rows FROM {row} WHERE {within} AND {row_name}.xmin = c.xid::text::xid8::xid"
    "{and_matches}) AS found WHERE c.rotation_id = %(rotation)s AND c.has_other_writes AND c.after IS {null}"
)


async def count_last_writers(
    connection: AsyncConnection,
    table: TargetTable,
    *,
    rotation: int,
    started_xid: int,
    rewritten: Sequence[int] = (),
) -> LastWriters:
    """Count the rows that the rotation is for by who wrote them last; reads the whole table once.

    Args:
        connection: In autocommit mode, for this query's use alone.
        table: The target's table.
        rotation: The rotation's id.
        started_xid: The transaction that began it.
        rewritten: The oids of the leaves whose rows are in other files than at the start.
    """
    parameters = {
        "rotation": rotation,
        "started_xid": started_xid,
        "table": table.regclass,
        "rewritten": list(rewritten),
    }
    query = sql.SQL(_COUNT).format(
        row_name=identifier(ROW),
        row=table.row,
        and_matches=table.and_matches,
        recorded=RECORDED,
        attached=ATTACHED,
        is_older=is_older(sql.SQL("c.xid"), sql.SQL("a.xid")),
    )
    # It takes as long as the table is large.
    async with translate_errors(connection, seconds=None):
        cursor = connection.cursor(row_factory=dict_row)
        await cursor.execute(query, parameters)
        leaves = await cursor.fetchall()
    mixed = sum(leaf["mixed"] for leaf in leaves)
    confirmed_of_mixed = min(mixed, await _count_mixed(connection, table, parameters)) if mixed else 0
    return LastWriters(
        confirmed=sum(leaf["confirmed"] for leaf in leaves) + confirmed_of_mixed,
        others=sum(leaf["others"] for leaf in leaves) + mixed - confirmed_of_mixed,
        older=sum(leaf["older"] for leaf in leaves),
        renewed=tuple(leaf["leaf"] for leaf in leaves if leaf["is_renewed"]),
    )


async def _count_mixed(
    connection: AsyncConnection, table: TargetTable, parameters: Mapping[str, object]
) -> int:
    """The rows that checkpoints with other writes have in their own ranges."""
    key = sql.SQL("({})").format(table.key_columns_of(ROW))
    through = sql.SQL("{} <= ({})").format(key, table.decoded(sql.SQL("c.through")))
    after = sql.SQL("{} > ({}) AND {}").format(key, table.decoded(sql.SQL("c.after")), through)
    rows = 0
    async with translate_errors(connection, seconds=None), connection.transaction():
        await connection.execute("SELECT set_config('enable_seqscan', 'off', true)")
        for within, null in ((through, sql.SQL("NULL")), (after, sql.SQL("NOT NULL"))):
            cursor = await connection.execute(
                sql.SQL(_MIXED).format(
                    row=table.row,
                    row_name=identifier(ROW),
                    within=within,
                    and_matches=table.and_matches,
                    null=null,
                ),
                parameters,
            )
            row = await cursor.fetchone()
            rows += row[0] if row else 0
    return rows
