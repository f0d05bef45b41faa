"""Counts rows by the transaction that wrote them last: the rotation's, another one since, or an older one.

A row's ``xmin`` is the transaction that wrote it last, without its epoch. Each checkpoint and each late
transaction records its own id. One scan of the table counts rows by ``xmin`` and joins these counts, not the
rows, with the recorded ids. See docs/decisions/0008.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from rotator.postgres.connection import fetch_as, fetch_rows, set_local
from rotator.postgres.errors import translate_errors
from rotator.postgres.identity import REWRITTEN, TargetIdentity, read_identity
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
    # The latest of the transactions that attached the leaf, or a partition that contains it.
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
    """The number of rows to rotate, by the session that wrote them last.

    Attributes:
        confirmed: The rows that this rotation wrote last: they have their new values.
        others: The rows that another session, or a trigger, has written since the rotation's start.
        older: The rows that no session has written since the rotation's start: they have their old values.
        renewed: The oids of the leaves whose rows another session has probably all rewritten.
    """

    confirmed: int
    others: int
    older: int
    renewed: tuple[int, ...]


def is_older(xid: sql.Composable, attached_xid: sql.Composable) -> sql.Composable:
    """Return a condition: a row with this ``xmin`` was written before the start, or before its attachment.

    Evaluate it in autocommit mode: a negative age is that of a row of an earlier epoch, but within a
    transaction newer rows have a negative age, too. The ages of the row and of ``attached_xid`` (the
    transaction in :data:`ATTACHED`, or NULL) must be read by the same query, since both grow.
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
    # All rows were rewritten: no row is older than the first of the others, but checkpoints are.
    " leaf::bigint = ANY (%(rewritten)s::bigint[])"
    " AND COALESCE(max(age) FILTER (WHERE writer = 'others')"
    " > COALESCE(max(age) FILTER (WHERE writer IN ('confirmed', 'mixed')), -1), false)"
    " AND count(*) FILTER (WHERE writer = 'older') = 0"
    " AND EXISTS (SELECT FROM recorded WHERE age(xid) > (SELECT max(o.age) FROM classified o"
    " WHERE o.leaf = classified.leaf AND o.writer = 'others')) AS is_renewed"
    " FROM classified GROUP BY leaf"
)
# Where triggers wrote in the same transaction, only the rows of the range are certainly the rotation's.
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
    """Count the rows to rotate by the session that wrote them last; read the whole table once.

    ``rewritten`` are the oids of the leaves whose files have changed since the start.
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
    leaves = await fetch_as(connection, dict_row, query, parameters, seconds=None)
    mixed = sum(leaf["mixed"] for leaf in leaves)
    confirmed_of_mixed = min(mixed, await _count_mixed(connection, table, parameters)) if mixed else 0
    return LastWriters(
        confirmed=sum(leaf["confirmed"] for leaf in leaves) + confirmed_of_mixed,
        others=sum(leaf["others"] for leaf in leaves) + mixed - confirmed_of_mixed,
        older=sum(leaf["older"] for leaf in leaves),
        renewed=tuple(leaf["leaf"] for leaf in leaves if leaf["is_renewed"]),
    )


async def count_unless_changed(
    connection: AsyncConnection,
    table: TargetTable,
    *,
    rotation: int,
    started_xid: int,
    identity: Mapping[str, Any],
) -> LastWriters | str:
    """Return the counts of :func:`count_last_writers`; or, as a phrase, how the target has changed.

    The identity at the start has JSON types.
    """
    saved, now = TargetIdentity.from_json(identity), await read_identity(connection, table)
    if saved and (difference := saved.difference(now)):
        return difference
    rewritten = saved.rewritten(now) if saved else ()
    writers = await count_last_writers(
        connection, table, rotation=rotation, started_xid=started_xid, rewritten=rewritten
    )
    return REWRITTEN if writers.renewed else writers


async def _count_mixed(
    connection: AsyncConnection, table: TargetTable, parameters: Mapping[str, object]
) -> int:
    """Count the rows that checkpoints with other writes have in their own ranges."""
    key = sql.SQL("({})").format(table.key_columns(ROW))
    through = sql.SQL("{} <= ({})").format(key, table.decoded(sql.SQL("c.through")))
    after = sql.SQL("{} > ({}) AND {}").format(key, table.decoded(sql.SQL("c.after")), through)
    rows = 0
    async with translate_errors(connection, seconds=None), connection.transaction():
        await set_local(connection, {"enable_seqscan": "off"})
        for within, null in ((through, sql.SQL("NULL")), (after, sql.SQL("NOT NULL"))):
            query = sql.SQL(_MIXED).format(
                row=table.row,
                row_name=identifier(ROW),
                within=within,
                and_matches=table.and_matches,
                null=null,
            )
            ((found,),) = await fetch_rows(connection, query, parameters, seconds=None)
            rows += int(found)
    return rows
