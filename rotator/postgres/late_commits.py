"""Rows that transactions older than the rotation commit, however late.

A row's ``xmin`` says which transaction wrote it last. The rotation's first transaction is S: rows whose
``xmin`` is older than S have not been written since the rotation began. Before completion there are none.
"""

from collections.abc import AsyncIterator
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.errors import RangeRefusedError
from rotator.keys import Key
from rotator.postgres.arrays import MakeValues
from rotator.postgres.failures import SUPPRESSED, answered
from rotator.postgres.table import TargetTable, identifier
from rotator.postgres.transaction import Claim, WaitLimits, guard

# 16 MB: little to read again for each batch of late rows, and no snapshot that holds vacuum back.
CHUNK_BLOCKS: Final = 2048

_STARTED: Final = sql.SQL("%(started_xid)s::text::xid8::xid")


async def holders(connection: AsyncConnection, table: TargetTable, started_xid: int) -> tuple[str, ...]:
    """The transactions, older than the rotation, that have written to the target and are not over.

    An older one that has not written to it so far cannot commit a value that was in the table when the
    rotation began.

    Returns:
        One phrase for each: its pid or prepared id, user, application, and since when.
    """
    async with answered(connection):
        cursor = await connection.execute(
            "SELECT DISTINCT COALESCE("
            " 'pid ' || a.pid || ', user ' || COALESCE(a.usename, '?')"
            " || COALESCE(', application ' || NULLIF(a.application_name, ''), '')"
            " || COALESCE(', since ' || to_char(a.xact_start AT TIME ZONE 'UTC', 'HH24:MI:SS')"
            " || ' UTC', ''),"
            " 'prepared ' || p.gid || ', user ' || p.owner"
            " || ', since ' || to_char(p.prepared AT TIME ZONE 'UTC', 'HH24:MI:SS') || ' UTC',"
            " 'transaction ' || x.transactionid)"
            " FROM pg_locks x JOIN pg_locks t USING (virtualtransaction)"
            " LEFT JOIN pg_stat_activity a ON a.pid = x.pid"
            " LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid"
            " WHERE x.locktype = 'transactionid' AND x.granted AND x.mode = 'ExclusiveLock'"
            " AND age(x.transactionid) > age(%(started_xid)s::text::xid8::xid)"
            " AND t.locktype = 'relation' AND t.granted AND t.relation = %(table)s::regclass"
            " AND t.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND t.mode NOT IN ('AccessShareLock', 'RowShareLock')"
            " ORDER BY 1",
            {"started_xid": started_xid, "table": table.regclass},
        )
        return tuple([phrase async for (phrase,) in cursor])


class LatePass:
    """One walk over the whole table, above the bound too, that rotates what was committed late."""

    def __init__(
        self,
        connection: AsyncConnection,
        table: TargetTable,
        claim: Claim,
        *,
        started_xid: int,
        make_values: MakeValues,
        limits: WaitLimits,
    ) -> None:
        """Take a connection in autocommit mode, for this pass's use alone."""
        self._connection = connection
        self._table = table
        self._claim = claim
        self._started_xid = started_xid
        self._make_values = make_values
        self._limits = limits

    async def found(self, batch: int) -> AsyncIterator[list[Key]]:
        """Keys of rows that have not been written since the rotation began, at most ``batch`` at a time.

        The table is read once, in the order of its blocks and a chunk at a time; a row that is written
        meanwhile, by whomever, moves to where it is not found again.
        """
        block, after = 0, "(0,0)"
        while block < await self._blocks():
            block += CHUNK_BLOCKS
            end = f"({block},0)"
            while older := await self._older(after, end, batch):
                after = older[-1][1]
                yield [Key(key) for key, _ in older]
                if len(older) < batch:
                    break
            after = end

    async def _blocks(self) -> int:
        async with answered(self._connection):
            cursor = await self._connection.execute(
                "SELECT pg_relation_size(%s::regclass) / current_setting('block_size')::integer",
                (self._table.regclass,),
            )
            row = await cursor.fetchone()
        return int(row[0]) if row else 0

    async def _older(self, after: str, end: str, batch: int) -> list[tuple[str, str]]:
        async with answered(self._connection):
            cursor = await self._connection.execute(
                sql.SQL(
                    # Under another name, or ORDER BY would mean the text, in which (0,10) comes before (0,2).
                    "SELECT {}, ctid::text AS place FROM {}"
                    " WHERE ctid > %(after)s::tid AND ctid < %(end)s::tid"
                    " AND age(xmin) > age({}) ORDER BY ctid LIMIT %(batch)s"
                ).format(self._table.key_json, self._table.name, _STARTED),
                {"after": after, "end": end, "started_xid": self._started_xid, "batch": batch},
            )
            return await cursor.fetchall()

    async def rotate(self, keys: list[Key]) -> int:
        """Give these rows new values, and count them in the rotation's row, in one transaction.

        Returns:
            How many rows got a new value; the others were deleted, or written by somebody else meanwhile.

        Raises:
            RowsLockedError: Somebody else holds some of them; nothing was written.
            RangeRefusedError: The server refused, or a trigger suppressed, the update; nothing was written.
            SupersededError: Another process owns the rotation; nothing was written.
        """
        connection = self._connection
        parameters = {
            "keys": [str(key) for key in keys],
            "values": self._make_values(len(keys)),
            "started_xid": self._started_xid,
        }
        async with answered(connection), connection.transaction():
            await guard(connection, self._claim, self._limits, without=("mergejoin",))
            updated = await connection.execute(self._update_statement(), parameters)
            left = await connection.execute(self._left_statement(), parameters)
            # A row without columns is an empty tuple.
            if await left.fetchone() is not None:
                raise RangeRefusedError(SUPPRESSED, passing=True)
            await connection.execute(
                "UPDATE rotator_rotation SET late_rows = late_rows + %s WHERE id = %s",
                (updated.rowcount, self._claim.rotation),
            )
        return updated.rowcount

    def _keyed(self) -> sql.Composable:
        """The keys of the parameter, numbered in their order, as columns."""
        return sql.SQL(
            "(SELECT {key}, (row_number() OVER (ORDER BY {key}))::integer AS rotator_position FROM"
            " (SELECT {decoded} FROM unnest(%(keys)s::text[]) AS keys (rotator_key)) AS decoded)"
            " AS rotator_keyed"
        ).format(
            key=self._table.key_columns,
            decoded=self._table.decoded_columns(sql.SQL("rotator_key::jsonb")),
        )

    def _same_key(self) -> sql.Composable:
        return sql.SQL("({}) = ({}) AND age(rotator_target.xmin) > age({})").format(
            self._table.key_columns_of("rotator_target"),
            self._table.key_columns_of("rotator_keyed"),
            _STARTED,
        )

    def _update_statement(self) -> sql.Composed:
        return sql.SQL(
            "UPDATE {} AS rotator_target SET {} = (%(values)b::{}[])[rotator_position] FROM {} WHERE {}"
        ).format(
            self._table.name,
            identifier(self._table.column.name),
            self._table.column.type,
            self._keyed(),
            self._same_key(),
        )

    def _left_statement(self) -> sql.Composed:
        return sql.SQL("SELECT FROM {} AS rotator_target, {} WHERE {} LIMIT 1").format(
            self._table.name, self._keyed(), self._same_key()
        )
