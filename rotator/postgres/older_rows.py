"""Rotates rows that no range has written, by where they are: late commits, attached partitions, lost keys.

They are found by reading the heap, never by the key: an index may lack them. A row is named by its leaf, its
``ctid`` and its ``xmin``; a session that writes it in between makes it another row.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.exceptions import OldValuesKeptError, RangeRejectedError
from rotator.options import WaitLimits
from rotator.postgres.catalog import read_update_triggers
from rotator.postgres.errors import SUPPRESSED, translate_errors
from rotator.postgres.fence import Lease, begin_fenced
from rotator.postgres.last_writers import ATTACHED, RECORDED, is_older
from rotator.postgres.table import (
    COUNT_OUTCOMES,
    PARTITIONS,
    ROW,
    TargetTable,
    identifier,
    rows_written_so_far,
    select_digests,
)
from rotator.postgres.values import InBulk, Place, ValueSource, named
from rotator.postgres.writer import Digests, by_key, count_kept
from rotator.ranges import Key

# 16 MB: little to read again for each batch of rows, and no snapshot that holds vacuum back.
CHUNK_BLOCKS: Final = 2048
_ATTEMPTS: Final = 3
_REPEATED: Final = "new values are equal to the old ones"

_PLACED: Final = "rotator_placed"
_POSITION: Final = "rotator_position"
_PLACES: Final = sql.SQL(
    "unnest(%(leaves)s::bigint[]::oid[], %(ctids)s::text[]::tid[], %(xids)s::text[]::xid[])"
    " WITH ORDINALITY AS places (leaf, place, xid, {})"
).format(identifier(_POSITION))


@dataclass(frozen=True, kw_only=True, slots=True)
class OlderRow:
    """A row that nothing has written since the rotation began.

    Attributes:
        place: Where it is.
        xid: Its ``xmin``.
        key: Its key, for messages.
    """

    place: Place
    xid: str
    key: Key


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    name: sql.Composable
    oid: int
    attached_xid: str | None


class OlderRows:
    """Finds such rows in the whole table, above the bound too, and gives them new values."""

    def __init__(
        self,
        connection: AsyncConnection,
        table: TargetTable,
        lease: Lease,
        *,
        started_xid: int,
        source: ValueSource,
        limits: WaitLimits,
    ) -> None:
        """Take a connection in autocommit mode, for this object's use alone."""
        self._connection = connection
        self._table = table
        self._claim = lease
        self._started_xid = started_xid
        self._source = source
        self._limits = limits
        # Once triggers have written to the table, each transaction notes its old values first.
        self._compares_digests = False

    @property
    def rotation(self) -> int:
        """The rotation's id."""
        return self._claim.rotation

    async def find(self, batch: int) -> AsyncIterator[list[OlderRow]]:
        """Read the table once, in the order of its blocks, and yield at most ``batch`` rows at a time.

        A row that is written meanwhile, by whatever session, moves to where it is not found again.
        """
        for leaf in await self._leaves():
            block, after = 0, "(0,0)"
            while block < await self._blocks(leaf):
                block += CHUNK_BLOCKS
                end = f"({block},0)"
                while found := await self._find_in(leaf, after, end, batch):
                    after = found[-1].place.ctid
                    yield found
                    if len(found) < batch:
                        break
                after = end

    async def _leaves(self) -> list[_Leaf]:
        async with translate_errors(self._connection):
            cursor = await self._connection.execute(
                sql.SQL(
                    "SELECT n.nspname, c.relname, c.oid::bigint, a.xid::text FROM pg_class c"
                    " JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN ({}) AS a ON a.leaf = c.oid"
                    " WHERE c.oid IN {} AND c.relkind = 'r' ORDER BY c.oid"
                ).format(ATTACHED, PARTITIONS),
                {"table": self._table.regclass, "started_xid": self._started_xid},
            )
            return [
                _Leaf(name=identifier(schema, name), oid=oid, attached_xid=xid)
                async for schema, name, oid, xid in cursor
            ]

    async def _blocks(self, leaf: _Leaf) -> int:
        async with translate_errors(self._connection):
            cursor = await self._connection.execute(
                "SELECT pg_relation_size(%s::oid::regclass) / current_setting('block_size')::integer",
                (leaf.oid,),
            )
            row = await cursor.fetchone()
        # A partition that was dropped meanwhile has no size.
        return int(row[0] or 0) if row else 0

    async def _find_in(self, leaf: _Leaf, after: str, end: str, batch: int) -> list[OlderRow]:
        xmin = identifier(ROW, "xmin")
        older = is_older(xmin, sql.SQL("%(attached_xid)s::xid"))
        if leaf.attached_xid is not None:
            # Rows that the rotation wrote before the partition was attached again are as old as these.
            older = sql.SQL("{} AND NOT EXISTS (SELECT FROM ({}) AS r WHERE r.xid = {})").format(
                older, RECORDED, xmin
            )
        async with translate_errors(self._connection):
            cursor = await self._connection.execute(
                sql.SQL(
                    # Under another name, or ORDER BY would mean the text, in which (0,10) comes before (0,2).
                    "SELECT ctid::text AS place, {}::text, {} FROM ONLY {} AS {}"
                    " WHERE ctid > %(after)s::tid AND ctid < %(end)s::tid"
                    " AND {}{} ORDER BY ctid LIMIT %(batch)s"
                ).format(
                    xmin, self._table.key_json, leaf.name, identifier(ROW), older, self._table.and_matches
                ),
                {
                    "after": after,
                    "end": end,
                    "started_xid": self._started_xid,
                    "attached_xid": leaf.attached_xid,
                    "rotation": self._claim.rotation,
                    "batch": batch,
                },
            )
            return [
                OlderRow(place=Place(leaf=leaf.oid, ctid=ctid), xid=xid, key=Key(key))
                async for ctid, xid, key in cursor
            ]

    async def rotate(self, rows: Sequence[OlderRow]) -> int:
        """Give these rows new values, and record the transaction, in one transaction.

        Args:
            rows: Rows of one leaf.

        Returns:
            The number of rows that have new values; the others were deleted, or written by another session
            meanwhile.

        Raises:
            RowsLockedError: Another session holds some of them; nothing was written.
            RangeRejectedError: The server refused, or a trigger suppressed, the update; nothing was written.
            OldValuesKeptError: Triggers put the old values back; nothing was written.
            SupersededError: Another process owns the rotation; nothing was written.
        """
        kept = 0
        for _ in range(_ATTEMPTS):
            parameters = await self._parameters(rows)
            written, kept, repeated = await self._write(parameters, rows)
            if written is not None and not kept and not repeated:
                return written
        if kept:
            triggers = await read_update_triggers(self._connection, self._table)
            raise OldValuesKeptError(f"at the keys {rows[0].key} to {rows[-1].key}", triggers)
        raise RangeRejectedError(_REPEATED, retryable=True)

    async def _parameters(self, rows: Sequence[OlderRow]) -> dict[str, object]:
        source = self._source
        by_place = {row.place: row for row in rows}
        if isinstance(source, InBulk):
            places, values = [row.place for row in rows], await source.make(len(rows))
        else:
            places, values = await source.make_at([row.place for row in rows])
        return {
            "leaves": [place.leaf for place in places],
            "ctids": [place.ctid for place in places],
            "xids": [by_place[place].xid for place in places],
            "table": self._table.regclass,
            **named(values),
        }

    async def _write(
        self, parameters: dict[str, object], rows: Sequence[OlderRow]
    ) -> tuple[int | None, int, int]:
        """Write the rows, and return the number that were written, kept their values, and got the same again.

        The first is None where triggers wrote, too, and the old values were not noted: nothing was written.
        """
        connection, count_writes = self._connection, rows_written_so_far(self._table)
        async with translate_errors(connection), connection.transaction() as transaction:
            await begin_fenced(connection, self._claim, self._limits, disabled_joins=("mergejoin",))
            digests: Digests | None = None
            if self._compares_digests:
                digests = await by_key(await connection.execute(_digests_at_places(self._table), parameters))
            before = await (await connection.execute(count_writes, parameters)).fetchone() or (0,)
            cursor = await connection.execute(update_at_places(self._table), parameters)
            written, kept, repeated = await cursor.fetchone() or (0, 0, 0)
            if kept or repeated:
                transaction.force_rollback = True
                return written, kept, repeated
            if written < len(rows):
                left = await connection.execute(_select_at_places(self._table), parameters)
                # A row without columns is an empty tuple.
                if await left.fetchone() is not None:
                    raise RangeRejectedError(SUPPRESSED, retryable=True)
            # Deferred triggers would run in the COMMIT, after the last look at what they do.
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            after = await (await connection.execute(count_writes, parameters)).fetchone() or (0,)
            has_other_writes = after[0] - before[0] != written
            if has_other_writes:
                # What an update returns is older than what the triggers after it do.
                if digests is None:
                    self._compares_digests = True
                    transaction.force_rollback = True
                    return None, 0, 0
                keys = {"keys": list(digests)}
                now = await by_key(await connection.execute(select_digests(self._table), keys))
                if kept := count_kept(digests, now):
                    transaction.force_rollback = True
                    return written, kept, 0
            await connection.execute(
                "UPDATE rotator_rotation SET late_rows = late_rows + %s WHERE id = %s",
                (written, self._claim.rotation),
            )
            # Where triggers wrote, too, nothing tells their rows from these: none is confirmed.
            if not has_other_writes:
                await connection.execute(
                    "INSERT INTO rotator_latetransaction (rotation_id, xid, rows)"
                    " VALUES (%s, pg_current_xact_id()::text::bigint, %s)",
                    (self._claim.rotation, written),
                )
        return written, 0, 0


def update_at_places(table: TargetTable) -> sql.Composed:
    """The update of the rows at some places, through the table itself; returns what other updates do.

    Parameters: ``leaves``, ``ctids`` and ``xids`` (one of each for each row) and ``values_0`` and so on (an
    array for each column, in the same order).
    """
    return sql.SQL(
        "WITH written AS (UPDATE {row} SET {assignments}"
        " FROM (SELECT places.*, {old_values} FROM {places} JOIN {row} ON {at_place}) AS {placed}"
        " WHERE {at_same_place}{and_matches} RETURNING {outcome})"
        " {count_outcomes}"
    ).format(
        count_outcomes=COUNT_OUTCOMES,
        row=table.row,
        assignments=table.assignments(identifier(_PLACED, _POSITION)),
        old_values=table.old_values,
        places=_PLACES,
        at_place=_at_place("places"),
        placed=identifier(_PLACED),
        at_same_place=_at_place(_PLACED),
        and_matches=table.and_matches,
        outcome=table.outcome(_PLACED, identifier(_PLACED, _POSITION)),
    )


def _select_at_places(table: TargetTable) -> sql.Composed:
    """One of the rows that are still at these places."""
    return sql.SQL("SELECT FROM {} JOIN {} ON {}{} LIMIT 1").format(
        _PLACES, table.row, _at_place("places"), table.and_matches
    )


def _digests_at_places(table: TargetTable) -> sql.Composed:
    """The key and the digests of each of the rows at these places."""
    return sql.SQL("SELECT {}, {} FROM {} JOIN {} ON {}").format(
        table.key_json_of(ROW), table.digests, _PLACES, table.row, _at_place("places")
    )


def _at_place(alias: str) -> sql.Composable:
    """A condition about :data:`ROW`; with ``xmin``, so that a row's next version does not match."""
    return sql.SQL("{ctid} = {alias}.place AND {leaf} = {alias}.leaf AND {xmin} = {alias}.xid").format(
        ctid=identifier(ROW, "ctid"),
        leaf=identifier(ROW, "tableoid"),
        xmin=identifier(ROW, "xmin"),
        alias=identifier(alias),
    )
