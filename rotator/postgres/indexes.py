"""Rebuilds the target's indexes without blocking reads or writes, and drops what a cancelled rebuild left.

Every function takes connections in autocommit mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.events import IndexSize
from rotator.exceptions import RangeRejectedError, RotatorError, RowsLockedError
from rotator.postgres.connection import fetch_column, fetch_rows
from rotator.postgres.errors import translate_errors
from rotator.postgres.table import PARTITIONS, TargetTable
from rotator.postgres.vacuum import BUSY, STOPPED, execute_until

# Other sessions wait for at most this time and that of the cancellation.
WATCH_SECONDS: Final = 0.05
# REINDEX CONCURRENTLY waits for each transaction that may use the old index. It blocks no session while it
# waits, unless that session waits for a lock on the table.
LOCK_SECONDS: Final = 60.0
DROP_LOCK_SECONDS: Final = 5.0

_NAME: Final = "format('%%I.%%I', n.nspname, c.relname)"
_INDEXES: Final = sql.SQL(
    "FROM {} AS leaf JOIN pg_index i ON i.indrelid = leaf.oid JOIN pg_class c ON c.oid = i.indexrelid"
    " JOIN pg_namespace n ON n.oid = c.relnamespace"
).format(PARTITIONS)
_STALE: Final = sql.SQL(
    "SELECT {name}, pg_relation_size(c.oid) {indexes}"
    # The server cannot rebuild an exclusion constraint's index concurrently.
    " WHERE i.indisvalid AND NOT i.indisexclusion"
    # REINDEX CONCURRENTLY makes a new index, with a new row in pg_index.
    " AND age(i.xmin) >= (SELECT age(r.started_xid::text::xid8::xid) FROM rotator_rotation r"
    " WHERE r.id = %(rotation)s) ORDER BY pg_relation_size(c.oid), 1"
).format(name=sql.SQL(_NAME), indexes=_INDEXES)
_LEFTOVERS: Final = sql.SQL(
    "SELECT {name} {indexes} WHERE NOT i.indisvalid AND c.relname ~ '_cc(new|old)[0-9]*$'"
    " AND EXISTS (SELECT FROM pg_index v JOIN pg_class vc ON vc.oid = v.indexrelid"
    " CROSS JOIN LATERAL (SELECT regexp_replace(c.relname::text, '_cc(new|old)[0-9]*$', '') AS stem) s"
    " WHERE v.indrelid = i.indrelid AND v.indisvalid AND starts_with(vc.relname::text, s.stem)"
    # The server shortens a name that would be longer than 63 bytes, between two characters.
    " AND (vc.relname::text = s.stem OR octet_length(c.relname::text) >= 60)) ORDER BY 1"
).format(name=sql.SQL(_NAME), indexes=_INDEXES)


async def find_stale_indexes(
    connection: AsyncConnection, table: TargetTable, rotation: int
) -> tuple[IndexSize, ...]:
    """Return the indexes that were not rebuilt since the rotation began, the smallest first."""
    rows = await fetch_rows(connection, _STALE, {"table": table.regclass, "rotation": rotation})
    return tuple(IndexSize(name=name, size_bytes=size) for name, size in rows)


async def find_leftovers(connection: AsyncConnection, table: TargetTable) -> tuple[str, ...]:
    """Return the invalid indexes that an interrupted ``REINDEX CONCURRENTLY`` left on the table."""
    return await fetch_column(connection, _LEFTOVERS, {"table": table.regclass})


async def read_size(connection: AsyncConnection, index: str) -> int:
    """Return the size of an index."""
    (size,) = await fetch_column(connection, "SELECT pg_relation_size(to_regclass(%s))", (index,))
    return size or 0


def rebuild_statement(index: str) -> str:
    """Return the statement that rebuilds an index; the name is quoted."""
    return f"REINDEX INDEX CONCURRENTLY {index};"


def drop_statement(index: str) -> str:
    """Return the statement that drops a leftover; the name is quoted."""
    return f"DROP INDEX CONCURRENTLY {index};"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexBuilder:
    """Executes REINDEX and DROP INDEX, and cancels them when another session waits for a lock of theirs.

    Attributes:
        connection: A direct connection for these statements alone.
        control: Another connection, for watching the lock queue.
        is_stopped: Returns whether a stop was requested.
    """

    connection: AsyncConnection
    control: AsyncConnection
    is_stopped: Callable[[], bool]

    async def rebuild(self, index: str) -> str:
        """Rebuild an index; return the reason where it was not rebuilt, else an empty text."""
        return await self._execute(rebuild_statement(index), LOCK_SECONDS, stops=True)

    async def drop(self, leftover: str) -> str:
        """Drop an invalid index; return the reason where it was not dropped, else an empty text."""
        return await self._execute(drop_statement(leftover), DROP_LOCK_SECONDS, stops=False)

    async def _execute(self, statement: str, lock_seconds: float, *, stops: bool) -> str:
        async def reason_to_cancel() -> str:
            if stops and self.is_stopped():
                return STOPPED
            return BUSY if await self._blocks_others() else ""

        try:
            async with translate_errors(self.connection):
                await self.connection.execute(
                    "SELECT set_config('lock_timeout', %s, false)", (f"{lock_seconds * 1000:.0f}ms",)
                )
            reason = await execute_until(self.connection, statement.encode(), reason_to_cancel, WATCH_SECONDS)
        except RowsLockedError:
            return f"transactions of other sessions did not end within {lock_seconds:g} s"
        except RangeRejectedError as error:
            return error.condition
        except RotatorError as error:
            return str(error)
        return "another session cancelled it" if reason is None else reason

    async def _blocks_others(self) -> bool:
        """Return whether another session waits for a lock on the table or an index, because of this one."""
        (blocks,) = await fetch_column(
            self.control,
            "SELECT EXISTS (SELECT FROM pg_locks w WHERE NOT w.granted AND w.locktype = 'relation'"
            " AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND %s = ANY (pg_blocking_pids(w.pid)))",
            (self.connection.info.backend_pid,),
        )
        return bool(blocks)
