"""Finds the rows that no session has written since the rotation began, and rotates them by their places.

These are rows of transactions that committed late, of partitions that were attached, and rows whose keys are
missing from the index. Therefore they are found by reading the heap, never by the key. A row version has a
leaf, a ``ctid`` and an ``xmin``; a session that writes the row makes another row version.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.options import WaitLimits
from rotator.postgres.connection import fetch_row, fetch_rows
from rotator.postgres.fence import Lease, rolled_back_on_error
from rotator.postgres.last_writers import ATTACHED, RECORDED, is_older
from rotator.postgres.ledger import Ledger
from rotator.postgres.table import PARTITIONS, ROW, TargetTable, identifier
from rotator.postgres.values import Place, ValueSource
from rotator.postgres.writer import OlderRow, RangeUpdate
from rotator.ranges import Key, Written

# 16 MB: little to read again for each batch of rows, and no snapshot that blocks VACUUM for long.
CHUNK_BLOCKS: Final = 2048


class OlderRows:
    """The older rows of the whole table, including those above the bound."""

    def __init__(
        self,
        connection: AsyncConnection,
        table: TargetTable,
        lease: Lease,
        *,
        started_xid: int,
        source: ValueSource,
        limits: WaitLimits,
        ledger: Ledger | None = None,
    ) -> None:
        """Take a connection in autocommit mode, for this object's use alone."""
        self._connection = connection
        self._table = table
        self._lease = lease
        self._started_xid = started_xid
        self._update = RangeUpdate(table, source, limits, ledger)

    @property
    def rotation(self) -> int:
        """The rotation's id."""
        return self._lease.rotation

    async def find(self, batch: int) -> AsyncGenerator[list[OlderRow], None]:
        """Read the table once, in the order of its blocks, and yield at most ``batch`` rows at a time.

        A row that any session writes in the meantime moves to a place where it is not found again.
        """
        leaves = await fetch_rows(
            self._connection,
            sql.SQL(
                "SELECT n.nspname, c.relname, c.oid::bigint, a.xid::text FROM pg_class c"
                " JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN ({}) AS a ON a.leaf = c.oid"
                " WHERE c.oid IN {} AND c.relkind = 'r' ORDER BY c.oid"
            ).format(ATTACHED, PARTITIONS),
            {"table": self._table.regclass, "started_xid": self._started_xid},
        )
        for schema, name, leaf, attached_xid in leaves:
            query = self._query(identifier(schema, name), is_attached=attached_xid is not None)
            block, after = 0, "(0,0)"
            while block < await self._blocks(leaf):
                block += CHUNK_BLOCKS
                parameters = {
                    "end": f"({block},0)",
                    "started_xid": self._started_xid,
                    "attached_xid": attached_xid,
                    "rotation": self._lease.rotation,
                    "batch": batch,
                }
                while True:
                    rows = await fetch_rows(self._connection, query, {"after": after, **parameters})
                    found = [
                        OlderRow(place=Place(leaf=leaf, ctid=ctid), xid=xid, key=Key(key))
                        for ctid, xid, key in rows
                    ]
                    if found:
                        after = found[-1].place.ctid
                        yield found
                    if len(found) < batch:
                        break
                after = f"({block},0)"

    async def _blocks(self, leaf: int) -> int:
        query: Final = "SELECT pg_relation_size(%s::oid::regclass) / current_setting('block_size')::integer"
        row = await fetch_row(self._connection, query, (leaf,))
        # A partition that was dropped in the meantime has no size.
        return int(row[0] or 0) if row else 0

    def _query(self, leaf: sql.Composable, *, is_attached: bool) -> sql.Composed:
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
        ).format(xmin, self._table.key_json, leaf, identifier(ROW), older, self._table.and_matches)

    async def rotate(self, rows: Sequence[OlderRow]) -> Written:
        """Give rows of one leaf new values, and record the transaction in itself.

        Rows that were deleted, or written by another session since they were found, are left out.

        Raises:
            RotatorError: An error of :meth:`RangeUpdate.write`; nothing was written.
        """
        connection, rotation = self._connection, self._lease.rotation
        written = await self._update.write(connection, self._lease, rows)
        async with rolled_back_on_error(connection), connection.pipeline():
            await connection.execute(
                "UPDATE rotator_rotation SET late_rows = late_rows + %s WHERE id = %s",
                (written.rows, rotation),
            )
            # Where triggers wrote too, their rows and these have the same xmin: none is confirmed.
            if not written.has_other_writes:
                await connection.execute(
                    "INSERT INTO rotator_latetransaction (rotation_id, xid, rows)"
                    " VALUES (%s, pg_current_xact_id()::text::bigint, %s)",
                    (rotation, written.rows),
                )
            await connection.execute("COMMIT")
        return written
