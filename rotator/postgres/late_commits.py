"""Rows that transactions older than the rotation commit, however late.

A row's ``xmin`` says which transaction wrote it last. The rotation's first transaction is S: rows whose
``xmin`` is older than S have not been written since the rotation began. Before completion there are none.
"""

from collections.abc import AsyncIterator
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.errors import RangeRefusedError
from rotator.keys import Key
from rotator.postgres.failures import SUPPRESSED, answered
from rotator.postgres.keyed import keyed_select, keyed_update
from rotator.postgres.relations import LEAVES, read_leaves
from rotator.postgres.table import ROW, TargetTable, identifier
from rotator.postgres.transaction import Claim, WaitLimits, guard
from rotator.postgres.value_source import InBulk, ValueSource, named

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
            sql.SQL(
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
                " AND t.locktype = 'relation' AND t.granted AND t.relation IN {}"
                " AND t.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " AND t.mode NOT IN ('AccessShareLock', 'RowShareLock')"
                " ORDER BY 1"
            ).format(LEAVES),
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
        source: ValueSource,
        limits: WaitLimits,
    ) -> None:
        """Take a connection in autocommit mode, for this pass's use alone."""
        self._connection = connection
        self._table = table
        self._claim = claim
        self._started_xid = started_xid
        self._source = source
        self._limits = limits

    @property
    def rotation(self) -> int:
        """The rotation's id."""
        return self._claim.rotation

    async def found(self, batch: int) -> AsyncIterator[list[Key]]:
        """Keys of rows that have not been written since the rotation began, at most ``batch`` at a time.

        The table is read once, in the order of its blocks and a chunk at a time; a row that is written
        meanwhile, by whomever, moves to where it is not found again.
        """
        for leaf in await read_leaves(self._connection, self._table):
            async for keys in self._found_in(leaf, batch):
                yield keys

    async def _found_in(self, leaf: sql.Composable, batch: int) -> AsyncIterator[list[Key]]:
        block, after = 0, "(0,0)"
        while block < await self._blocks(leaf):
            block += CHUNK_BLOCKS
            end = f"({block},0)"
            while older := await self._older(leaf, after, end, batch):
                after = older[-1][1]
                yield [Key(key) for key, _ in older]
                if len(older) < batch:
                    break
            after = end

    async def _blocks(self, leaf: sql.Composable) -> int:
        async with answered(self._connection):
            cursor = await self._connection.execute(
                "SELECT pg_relation_size(%s::regclass) / current_setting('block_size')::integer",
                # Without parameters in its text, where a percent sign is one.
                (leaf.as_string().replace("%%", "%"),),
            )
            row = await cursor.fetchone()
        return int(row[0]) if row else 0

    async def _older(self, leaf: sql.Composable, after: str, end: str, batch: int) -> list[tuple[str, str]]:
        async with answered(self._connection):
            cursor = await self._connection.execute(
                sql.SQL(
                    # Under another name, or ORDER BY would mean the text, in which (0,10) comes before (0,2).
                    "SELECT {}, ctid::text AS place FROM ONLY {} AS {}"
                    " WHERE ctid > %(after)s::tid AND ctid < %(end)s::tid"
                    " AND {} ORDER BY ctid LIMIT %(batch)s"
                ).format(self._table.key_json, leaf, identifier(ROW), self._is_older()),
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
        source = self._source
        parameters: dict[str, object] = {"started_xid": self._started_xid}
        if isinstance(source, InBulk):
            parameters |= {"keys": [str(key) for key in keys], **named(await source.make(len(keys)))}
        else:
            # Whoever changes one of them meanwhile makes it one that is not older any more.
            parameters |= await source.parameters(keys)
        async with answered(connection), connection.transaction():
            await guard(connection, self._claim, self._limits, without=("mergejoin",))
            updated = await connection.execute(keyed_update(self._table, self._is_older()), parameters)
            left = await connection.execute(keyed_select(self._table, self._is_older()), parameters)
            # A row without columns is an empty tuple.
            if await left.fetchone() is not None:
                raise RangeRefusedError(SUPPRESSED, passing=True)
            await connection.execute(
                "UPDATE rotator_rotation SET late_rows = late_rows + %s WHERE id = %s",
                (updated.rowcount, self._claim.rotation),
            )
        return updated.rowcount

    def _is_older(self) -> sql.Composable:
        """A condition about the alias ROW: not written since the rotation began, and to be rotated."""
        return sql.SQL("age({}) > age({}){}").format(
            identifier(ROW, "xmin"), _STARTED, self._table.and_matches
        )
