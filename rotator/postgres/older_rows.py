"""Finds the rows that no session has written since the rotation began, by their places.

These are rows of transactions that committed late, of partitions that were attached, and rows whose keys are
missing from the index. Therefore they are found by reading the heap, never by the key. A row version has a
leaf, a ``ctid`` and an ``xmin``; a session that writes the row makes another row version.
"""

from collections.abc import AsyncGenerator
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.postgres.connection import fetch_column, fetch_rows
from rotator.postgres.last_writers import ATTACHED, RECORDED, is_older
from rotator.postgres.table import PARTITIONS, ROW, TargetTable, identifier
from rotator.postgres.values import Place
from rotator.postgres.writer import OlderRow
from rotator.ranges import Key

# 16 MB: little to read again for each batch of rows, and no snapshot that blocks VACUUM for long.
CHUNK_BLOCKS: Final = 2048
_LEAVES: Final = sql.SQL(
    "SELECT n.nspname, c.relname, c.oid::bigint, a.xid::text FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN ({}) AS a ON a.leaf = c.oid"
    " WHERE c.oid IN {} AND c.relkind = 'r' ORDER BY c.oid"
).format(ATTACHED, PARTITIONS)
_BLOCKS: Final = "SELECT pg_relation_size(%s::oid::regclass) / current_setting('block_size')::integer"


async def find_older_rows(
    connection: AsyncConnection, table: TargetTable, *, rotation: int, started_xid: int, batch: int
) -> AsyncGenerator[list[OlderRow], None]:
    """Read the table once, in the order of its blocks, and yield at most ``batch`` rows of a leaf at a time.

    Rows above the bound are older rows, too. A row that any session writes in the meantime moves to a place
    where it is not found again. What writes the rows may use the same connection.
    """
    leaves = await fetch_rows(connection, _LEAVES, {"table": table.regclass, "started_xid": started_xid})
    for schema, name, leaf, attached_xid in leaves:
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
    xmin = identifier(ROW, "xmin")
    older = is_older(xmin, sql.SQL("%(attached_xid)s::xid"))
    if is_attached:
        # Rows that the rotation wrote before the partition was attached again are as old as these.
        older = sql.SQL("{} AND NOT EXISTS (SELECT FROM ({}) AS r WHERE r.xid = {})").format(
            older, RECORDED, xmin
        )
    return sql.SQL(
        # Under another name, or ORDER BY would mean the text, in which (0,10) comes before (0,2).
        "SELECT ctid::text AS place, {}::text, {} FROM ONLY {} AS {}"
        " WHERE ctid > %(after)s::tid AND ctid < %(end)s::tid AND {}{} ORDER BY ctid LIMIT %(batch)s"
    ).format(xmin, table.key_json(), leaf, identifier(ROW), older, table.and_matches)
