"""Maintenance of the target: VACUUM, ANALYZE, REINDEX, and the disk space of its heap and indexes."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection, errors, sql
from psycopg.errors import Diagnostic
from psycopg.rows import class_row

from rotator.events import IndexSize, Storage
from rotator.exceptions import RangeRejectedError, RotatorError, RowsLockedError
from rotator.postgres.connection import OwnConnection, execute_alone, fetch_as, fetch_column, fetch_rows
from rotator.postgres.errors import translate_errors
from rotator.postgres.table import TargetTable

WATCH_SECONDS: Final = 0.25
# Other sessions wait for at most this time and that of the cancellation.
INDEX_WATCH_SECONDS: Final = 0.05
# REINDEX CONCURRENTLY waits for each transaction that may use the old index. It blocks no session while it
# waits, unless that session waits for a lock on the table.
INDEX_LOCK_SECONDS: Final = 60.0
DROP_LOCK_SECONDS: Final = 5.0
BUSY: Final = "the table is busy"
"""The reason for a skipped VACUUM where another session holds, or waits for, a conflicting lock."""
STOPPED: Final = "a stop was requested"
"""The reason for work that was not done, or was cancelled, because of a request to stop."""
SCATTERED_CORRELATION: Final = 0.1
# The default of autovacuum_vacuum_cost_delay.
SLOW_DELAY_MILLISECONDS: Final = 2
# vacuum_is_permitted_for_relation() in the server's src/backend/commands/vacuum.c.
_MAY_VACUUM: Final = (
    "SELECT pg_has_role(c.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE')"
    # Older servers do not have this privilege.
    " OR CASE WHEN current_setting('server_version_num')::integer >= 170000"
    " THEN has_table_privilege(c.oid, 'MAINTAIN') ELSE false END"
    " FROM pg_class c, pg_database d WHERE c.oid = {regclass} AND d.datname = current_database()"
)
# ANALYZE locks the partitioned table itself, too.
_MEMBERS: Final = "(SELECT {regclass}::oid AS oid UNION SELECT relid::oid FROM pg_partition_tree({regclass}))"
_INDEXES: Final = (
    "(SELECT format('%%I.%%I', n.nspname, c.relname) AS name, pg_relation_size(c.oid) AS size_bytes,"
    " c.relname::text, i.xmin, i.* FROM {partitions} AS leaf JOIN pg_index i ON i.indrelid = leaf.oid"
    " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace)"
)


async def read_storage(connection: AsyncConnection, table: TargetTable) -> Storage:
    """Return the present size of the table and its indexes."""
    query = table.compose(
        "SELECT sum(pg_relation_size(oid))::bigint, sum(pg_indexes_size(oid))::bigint,"
        " sum(pg_stat_get_dead_tuples(oid))::bigint FROM {partitions} AS leaf"
    )
    ((heap_bytes, index_bytes, dead_rows),) = await fetch_rows(connection, query)
    query = table.compose(
        "SELECT name, size_bytes FROM {indexes} AS i ORDER BY name", indexes=table.compose(_INDEXES)
    )
    indexes = tuple(await fetch_as(connection, class_row(IndexSize), query))
    return Storage(heap_bytes=heap_bytes, index_bytes=index_bytes, dead_rows=dead_rows, indexes=indexes)


async def may_vacuum(connection: AsyncConnection, table: TargetTable) -> bool:
    """Return whether this role may vacuum and analyze the table; else the server skips it with a warning."""
    (is_permitted,) = await fetch_column(connection, table.compose(_MAY_VACUUM))
    return bool(is_permitted)


async def is_scattered(connection: AsyncConnection, table: TargetTable) -> bool:
    """Return whether the order of the rows is unrelated to the key's, by the server's statistics."""
    query = table.compose(
        "SELECT abs(s.correlation) < %s FROM pg_stats s"
        " JOIN pg_class c ON c.relname = s.tablename AND c.oid = {regclass}"
        " JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = s.schemaname"
        " WHERE s.attname = %s AND NOT s.inherited"
    )
    return any(await fetch_column(connection, query, (SCATTERED_CORRELATION, table.key[0].name)))


async def vacuum(
    connection: OwnConnection,
    control: AsyncConnection,
    table: TargetTable,
    *,
    indexes: bool,
    is_slow: bool = False,
) -> str:
    """Vacuum the table, unless another session holds or waits for a conflicting lock.

    It does not truncate the table, which takes the strongest lock, and uses one process. The connection is
    for the statement alone; ``control`` is another one, which watches the lock queue.

    With ``indexes``, it removes the index entries of old row versions, which reads all indexes; else only the
    space of the row versions is freed. With ``is_slow``, it pauses as autovacuum does, for the sake of other
    sessions; a larger ``vacuum_cost_delay`` of the role remains. Behind a pooler, the session's applies.

    Returns:
        The reason why it was skipped or cancelled; empty where it finished.
    """
    statement = sql.SQL("VACUUM (SKIP_LOCKED, TRUNCATE false, PARALLEL 0, INDEX_CLEANUP {}) {}").format(
        sql.SQL("on" if indexes else "off"), sql.Identifier(*table.path)
    )
    if is_slow and connection.is_direct:
        await fetch_rows(
            connection,
            "SELECT set_config(name, %(delay)s::text, false) FROM pg_settings"
            " WHERE name = 'vacuum_cost_delay' AND setting::float8 < %(delay)s",
            {"delay": SLOW_DELAY_MILLISECONDS},
        )
    reason, _warnings = await _maintain(connection, control, table, statement, "VACUUM")
    return reason


async def analyze(connection: OwnConnection, control: AsyncConnection, table: TargetTable) -> str:
    """Make new statistics of the table, of its partitions and of the expressions in its indexes.

    The old ones, in ``pg_stats`` and ``pg_stats_ext``, hold values from before the rotation.

    Returns:
        The reason why statistics may still hold old values; empty where they do not.
    """
    statement = sql.SQL("ANALYZE (SKIP_LOCKED) {}").format(sql.Identifier(*table.path))
    reason, warnings = await _maintain(connection, control, table, statement, "ANALYZE")
    if not reason and warnings:
        reason = "the server skipped a part of it; check that this role owns each partition"
    query = table.compose(
        "SELECT DISTINCT a.attname::text FROM {members} AS member JOIN pg_class c ON c.oid = member.oid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attstattarget = 0"
        # A join with the view would read the statistics of all tables.
        " CROSS JOIN LATERAL (SELECT FROM pg_stats s WHERE s.schemaname = n.nspname"
        " AND s.tablename = c.relname AND s.attname = a.attname LIMIT 1) AS statistics"
        " WHERE a.attname = ANY (%s::text[]) ORDER BY 1",
        members=table.compose(_MEMBERS),
    )
    if not reason and (columns := await fetch_column(control, query, (table.column_names,))):
        reason = f"ANALYZE keeps the statistics of columns with the statistics target 0: {', '.join(columns)}"
    return reason


async def _maintain(
    connection: OwnConnection,
    control: AsyncConnection,
    table: TargetTable,
    statement: sql.Composed,
    verb: str,
) -> tuple[str, set[str | None]]:
    """Execute VACUUM or ANALYZE, and cancel it when another session waits for its lock.

    Return the reason why it was skipped or cancelled, and the codes of the server's warnings.
    """
    warnings = set[str | None]()

    def note(warning: Diagnostic) -> None:
        # The warning is not valid after the handler has returned.
        if warning.severity_nonlocalized == "WARNING":
            warnings.add(warning.sqlstate)

    blocking = table.compose(
        "SELECT EXISTS (SELECT FROM pg_locks w JOIN pg_locks h USING (locktype, database, relation)"
        " WHERE w.locktype = 'relation' AND w.relation IN {members} AND NOT w.granted"
        # In a copy of a database, other tables have the same oids.
        " AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND h.granted AND h.mode = 'ShareUpdateExclusiveLock')",
        members=table.compose(_MEMBERS),
    )

    async def reason_to_cancel() -> str:
        (blocks_others,) = await fetch_column(control, blocking)
        return BUSY if blocks_others else ""

    if "role" in connection.local_settings:
        return f"{verb} cannot assume a role through a connection pooler", warnings
    if connection.is_direct:
        # Nothing depends on it, so a standby that is gone must not keep the run from ending.
        await fetch_rows(connection, "SELECT set_config('synchronous_commit', 'local', false)")
    connection.add_notice_handler(note)
    reason = await _execute_until(connection, statement, reason_to_cancel, WATCH_SECONDS)
    if reason is None:
        reason = await _cancelled_by(connection, verb)
    return reason or (BUSY if errors.LockNotAvailable.sqlstate in warnings else ""), warnings


async def _execute_until(
    connection: AsyncConnection,
    statement: bytes | sql.Composed,
    reason_to_cancel: Callable[[], Awaitable[str]],
    every_seconds: float,
) -> str | None:
    """Execute a statement that cannot be part of a transaction, and cancel it once there is a reason.

    Return the reason of the cancellation; empty where the statement finished; None where another process or
    the server cancelled it. ``reason_to_cancel`` returns an empty text where there is none.
    """
    executing = asyncio.create_task(_execute(connection, statement), name="rotator maintenance")
    reason = ""
    try:
        while not (await asyncio.wait([executing], timeout=every_seconds))[0]:
            if reason := await reason_to_cancel():
                await connection.cancel_safe()
                break
        is_finished = await executing
    finally:
        executing.cancel()
    return "" if is_finished else reason or None


async def _execute(connection: AsyncConnection, statement: bytes | sql.Composed) -> bool:
    """Execute the statement, and return whether it finished; False where it was cancelled."""
    # Without a time limit: it is cancelled once another session waits for it.
    async with translate_errors(connection, seconds=None):
        with suppress(errors.QueryCanceled):
            await execute_alone(connection, statement)
            return True
    return False


async def _cancelled_by(connection: AsyncConnection, verb: str) -> str:
    """Return the reason of a cancellation by another process or by the server."""
    async with translate_errors(connection):
        # The session's own setting, without the rotator's settings for its transactions.
        cursor = await execute_alone(connection, b"SELECT current_setting('statement_timeout')")
        row = await cursor.fetchone()
    timeout = row[0] if row else "0"
    if timeout == "0":
        return f"another session cancelled {verb}"
    return (
        f"the role's statement_timeout ({timeout}) cancelled {verb} and cannot be changed through a "
        "connection pooler; connect to the server directly, or raise it for this role"
    )


async def find_stale_indexes(
    connection: AsyncConnection, table: TargetTable, rotation: int
) -> tuple[IndexSize, ...]:
    """Return the indexes that were not rebuilt since the rotation began, the smallest first."""
    query = table.compose(
        "SELECT name, size_bytes FROM {indexes} AS i"
        # The server cannot rebuild an exclusion constraint's index concurrently.
        " WHERE indisvalid AND NOT indisexclusion"
        # REINDEX CONCURRENTLY makes a new index, with a new row in pg_index.
        " AND age(i.xmin) >= (SELECT age(r.started_xid::text::xid8::xid) FROM rotator_rotation r"
        " WHERE r.id = %s) ORDER BY size_bytes, name",
        indexes=table.compose(_INDEXES),
    )
    return tuple(await fetch_as(connection, class_row(IndexSize), query, (rotation,)))


async def find_leftovers(connection: AsyncConnection, table: TargetTable) -> tuple[str, ...]:
    """Return the invalid indexes that an interrupted ``REINDEX CONCURRENTLY`` left on the table."""
    query = table.compose(
        "SELECT i.name FROM {indexes} AS i,"
        " LATERAL (SELECT regexp_replace(i.relname, '_cc(new|old)[0-9]*$', '') AS stem) s"
        " WHERE NOT i.indisvalid AND i.relname <> s.stem AND EXISTS (SELECT FROM pg_index v"
        " JOIN pg_class vc ON vc.oid = v.indexrelid WHERE v.indrelid = i.indrelid AND v.indisvalid"
        # The server shortens a name that would be longer than 63 bytes, between two characters.
        " AND (vc.relname = s.stem"
        " OR starts_with(vc.relname::text, s.stem) AND octet_length(i.relname) >= 60)) ORDER BY i.name",
        indexes=table.compose(_INDEXES),
    )
    return await fetch_column(connection, query)


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

    The direct connection is for these statements alone; ``control`` is another one, which watches the lock
    queue.
    """

    connection: AsyncConnection
    control: AsyncConnection
    is_stopped: Callable[[], bool]

    async def rebuild(self, index: str) -> str:
        """Rebuild an index; return the reason where it was not rebuilt, else an empty text."""
        return await self._execute(rebuild_statement(index), INDEX_LOCK_SECONDS, stops=True)

    async def drop(self, leftover: str) -> str:
        """Drop an invalid index; return the reason where it was not dropped, else an empty text."""
        return await self._execute(drop_statement(leftover), DROP_LOCK_SECONDS, stops=False)

    async def _execute(self, statement: str, lock_seconds: float, *, stops: bool) -> str:
        async def reason_to_cancel() -> str:
            if stops and self.is_stopped():
                return STOPPED
            (blocks_others,) = await fetch_column(
                self.control,
                "SELECT EXISTS (SELECT FROM pg_locks w WHERE NOT w.granted AND w.locktype = 'relation'"
                " AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " AND %s = ANY (pg_blocking_pids(w.pid)))",
                (self.connection.info.backend_pid,),
            )
            return BUSY if blocks_others else ""

        try:
            lock_timeout = f"{lock_seconds * 1000:.0f}ms"
            await fetch_rows(self.connection, "SELECT set_config('lock_timeout', %s, false)", (lock_timeout,))
            reason = await _execute_until(
                self.connection, statement.encode(), reason_to_cancel, INDEX_WATCH_SECONDS
            )
        except RowsLockedError:
            return f"transactions of other sessions did not end within {lock_seconds:g} s"
        except RangeRejectedError as error:
            return error.condition
        except RotatorError as error:
            return str(error)
        return "another session cancelled it" if reason is None else reason
