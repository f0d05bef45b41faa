"""Counts rows by the transaction that wrote them last: the rotation's, another one since, or an older one.

A row's ``xmin`` is the transaction that wrote it last, without its epoch. Each checkpoint and each late
transaction records its own id. One scan of the table counts rows by ``xmin`` and joins these counts, not the
rows, with the recorded ids. See docs/decisions/0008.

Older rows are those of transactions that committed late, of partitions that were attached, and rows whose
keys are missing from the index. Therefore they are found by reading the heap, never by the key. A row version
has a leaf, a ``ctid`` and an ``xmin``; a session that writes the row makes another row version.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row

from rotator.postgres.connection import fetch_as, fetch_column, fetch_rows, transaction_with
from rotator.postgres.identity import REWRITTEN, TargetIdentity, read_identity
from rotator.postgres.table import ROW, TargetTable, identifier
from rotator.postgres.values import Place
from rotator.postgres.writer import OlderRow
from rotator.ranges import Key

# 16 MB: little to read again for each batch of rows, and no snapshot that blocks VACUUM for long.
CHUNK_BLOCKS: Final = 2048
_STARTED: Final = sql.SQL("%(started_xid)s::text::xid8::xid")
_RECORDED: Final = sql.SQL(
    "SELECT xid::text::xid8::xid AS xid, bool_or(has_other_writes) AS has_other_writes FROM"
    " (SELECT xid, has_other_writes FROM rotator_completedrange"
    " WHERE rotation_id = %(rotation)s AND xid IS NOT NULL"
    " UNION ALL SELECT xid, false FROM rotator_latetransaction WHERE rotation_id = %(rotation)s) AS written"
    " GROUP BY 1"
)
"""The transactions that recorded what they wrote for the rotation; takes the parameter ``rotation``."""

_ATTACHED: Final = (
    # The latest of the transactions that attached the leaf, or a partition that contains it.
    "SELECT leaf.oid AS leaf, (array_agg(i.xmin ORDER BY age(i.xmin)))[1] AS xid FROM {partitions} AS leaf,"
    " pg_partition_ancestors(leaf.oid) AS ancestor"
    " JOIN pg_partition_tree({regclass}) AS tree ON tree.relid = ancestor.relid AND tree.level > 0"
    " JOIN pg_inherits i ON i.inhrelid = ancestor.relid"
    " WHERE age(i.xmin) BETWEEN 0 AND age({started}) GROUP BY leaf.oid"
)
"""The transaction that made each leaf a partition, if that was since ``started``."""


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


def is_older(
    xid: sql.Composable, attached_xid: sql.Composable, *, started: str = "started_xid"
) -> sql.Composable:
    """Return a condition: a row with this ``xmin`` was written before the start, or before its attachment.

    Evaluate it in autocommit mode: a negative age is that of a row of an earlier epoch, but within a
    transaction newer rows have a negative age, too. The ages of the row and of ``attached_xid`` (the
    transaction in :data:`_ATTACHED`, or NULL) must be read by the same query, since both grow. ``started`` is
    the name of the parameter with the transaction that is the start.
    """
    return sql.SQL(
        "(age({xid}) NOT BETWEEN 0 AND age({started}) OR COALESCE(age({xid}) >= age({attached_xid}), false))"
    ).format(
        xid=xid,
        started=sql.SQL("{}::text::xid8::xid").format(sql.Placeholder(started)),
        attached_xid=attached_xid,
    )


_COUNT: Final = (
    "WITH counted AS MATERIALIZED (SELECT {leaf} AS leaf, {xmin} AS xid,"
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
    " (SELECT count(*) AS rows FROM {row} WHERE {within} AND {xmin} = c.xid::text::xid8::xid{and_matches})"
    " AS found WHERE c.rotation_id = %(rotation)s AND c.has_other_writes AND (c.after IS NULL) = {is_first}"
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
    parameters = {"rotation": rotation, "started_xid": started_xid, "rewritten": list(rewritten)}
    query = table.compose(
        _COUNT,
        recorded=_RECORDED,
        attached=table.compose(_ATTACHED, started=_STARTED),
        is_older=is_older(sql.SQL("c.xid"), sql.SQL("a.xid")),
    )
    # It takes as long as the table is large.
    leaves = await fetch_as(connection, dict_row, query, parameters, seconds=None)
    mixed = sum(leaf["mixed"] for leaf in leaves)
    confirmed_of_mixed = min(mixed, await _count_mixed(connection, table, rotation)) if mixed else 0
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


async def _count_mixed(connection: AsyncConnection, table: TargetTable, rotation: int) -> int:
    """Count the rows that checkpoints with other writes have in their own ranges."""
    through, after = table.decoded(sql.SQL("c.through")), table.decoded(sql.SQL("c.after"))
    to_through = table.compose("({row_key}) <= ({through})", through=through)
    between = table.compose("({row_key}) > ({after}) AND {to_through}", after=after, to_through=to_through)
    rows = 0
    async with transaction_with(connection, {"enable_seqscan": "off"}, seconds=None):
        for within, is_first in ((to_through, True), (between, False)):
            query = table.compose(_MIXED, within=within, is_first=is_first)
            ((found,),) = await fetch_rows(connection, query, {"rotation": rotation}, seconds=None)
            rows += int(found)
    return rows


_LEAVES: Final = (
    "SELECT n.nspname, c.relname, c.oid::bigint, a.xid::text FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN ({attached}) AS a ON a.leaf = c.oid"
    " WHERE c.oid IN {partitions} AND c.relkind = 'r' ORDER BY c.oid"
)
_BLOCKS: Final = "SELECT pg_relation_size(%s::oid::regclass) / current_setting('block_size')::integer"


async def find_older_rows(
    connection: AsyncConnection, table: TargetTable, *, rotation: int, started_xid: int, batch: int
) -> AsyncGenerator[list[OlderRow], None]:
    """Read the table once, in the order of its blocks, and yield at most ``batch`` rows of a leaf at a time.

    Rows above the bound are older rows, too. A row that any session writes in the meantime moves to a place
    where it is not found again. What writes the rows may use the same connection.
    """
    leaves = table.compose(_LEAVES, attached=table.compose(_ATTACHED, started=_STARTED))
    for schema, name, leaf, attached_xid in await fetch_rows(
        connection, leaves, {"started_xid": started_xid}
    ):
        query = _query(table, identifier(schema, name), is_attached=attached_xid is not None)
        block, after = 0, "(0,0)"
        # A partition that was dropped in the meantime has no size.
        while block < ((await fetch_column(connection, _BLOCKS, (leaf,)))[0] or 0):
            block += CHUNK_BLOCKS
            parameters = {
                "end": f"({block},0)",
                "started_xid": started_xid,
                "attached_xid": attached_xid,
                "rotation": rotation,
                "batch": batch,
            }
            while True:
                found = [
                    OlderRow(place=Place(leaf=leaf, ctid=ctid), xid=xid, key=Key(key))
                    for ctid, xid, key in await fetch_rows(connection, query, {"after": after, **parameters})
                ]
                if found:
                    after = found[-1].place.ctid
                    yield found
                if len(found) < batch:
                    break
            after = f"({block},0)"


def _query(table: TargetTable, leaf: sql.Composable, *, is_attached: bool) -> sql.Composed:
    older = is_older(identifier(ROW, "xmin"), sql.SQL("%(attached_xid)s::xid"))
    if is_attached:
        # Rows that the rotation wrote before the partition was attached again are as old as these.
        older = table.compose(
            "{older} AND NOT EXISTS (SELECT FROM ({recorded}) AS r WHERE r.xid = {xmin})",
            older=older,
            recorded=_RECORDED,
        )
    return table.compose(
        # Under another name, or ORDER BY would mean the text, in which (0,10) comes before (0,2).
        "SELECT ctid::text AS place, {xmin}::text, {row_json} FROM ONLY {leaf_name} AS {row_name}"
        " WHERE ctid > %(after)s::tid AND ctid < %(end)s::tid AND {older}{and_matches}"
        " ORDER BY ctid LIMIT %(batch)s",
        leaf_name=leaf,
        older=older,
    )
