"""VACUUM and ANALYZE of the target, and the disk space of its heap and indexes.

Every function takes connections in autocommit mode.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from psycopg import AsyncConnection, errors, sql
from psycopg.errors import Diagnostic

from rotator.events import IndexSize, Storage
from rotator.postgres.connection import OwnConnection, execute_alone, fetch_column, fetch_rows
from rotator.postgres.errors import translate_errors
from rotator.postgres.table import PARTITIONS, TargetTable

WATCH_SECONDS: Final = 0.25
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
    " FROM pg_class c, pg_database d WHERE c.oid = %s::regclass AND d.datname = current_database()"
)
# ANALYZE locks the partitioned table itself, too.
_MEMBERS: Final = sql.SQL(
    "(SELECT %(table)s::regclass::oid AS oid"
    " UNION SELECT relid::oid FROM pg_partition_tree(%(table)s::regclass))"
)


async def read_storage(connection: AsyncConnection, table: TargetTable) -> Storage:
    """Return the present size of the table and its indexes."""
    ((heap_bytes, index_bytes, dead_rows),) = await fetch_rows(
        connection,
        sql.SQL(
            "SELECT sum(pg_relation_size(oid))::bigint, sum(pg_indexes_size(oid))::bigint,"
            " sum(pg_stat_get_dead_tuples(oid))::bigint FROM {} AS leaf"
        ).format(PARTITIONS),
        {"table": table.regclass},
    )
    rows = await fetch_rows(
        connection,
        sql.SQL(
            "SELECT format('%%I.%%I', n.nspname, c.relname), pg_relation_size(c.oid)"
            " FROM {} AS leaf JOIN pg_index i ON i.indrelid = leaf.oid"
            " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
            " ORDER BY 1"
        ).format(PARTITIONS),
        {"table": table.regclass},
    )
    indexes = tuple(IndexSize(name=name, size_bytes=size) for name, size in rows)
    return Storage(heap_bytes=heap_bytes, index_bytes=index_bytes, dead_rows=dead_rows, indexes=indexes)


async def may_vacuum(connection: AsyncConnection, table: TargetTable) -> bool:
    """Return whether this role may vacuum and analyze the table; else the server skips it with a warning."""
    (is_permitted,) = await fetch_column(connection, _MAY_VACUUM, (table.regclass,))
    return bool(is_permitted)


async def is_scattered(connection: AsyncConnection, table: TargetTable) -> bool:
    """Return whether the order of the rows is unrelated to the key's, by the server's statistics."""
    are_scattered = await fetch_column(
        connection,
        "SELECT abs(s.correlation) < %(most)s FROM pg_stats s"
        " JOIN pg_class c ON c.relname = s.tablename AND c.oid = %(table)s::regclass"
        " JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = s.schemaname"
        " WHERE s.attname = %(key)s AND NOT s.inherited",
        {"most": SCATTERED_CORRELATION, "table": table.regclass, "key": table.key[0].name},
    )
    return any(are_scattered)


async def vacuum(
    connection: OwnConnection,
    control: AsyncConnection,
    table: TargetTable,
    *,
    indexes: bool,
    is_slow: bool = False,
) -> str:
    """Vacuum the table, unless another session holds or waits for a conflicting lock.

    It does not truncate the table, which takes the strongest lock, and uses one process.

    Args:
        connection: A connection for the statement alone.
        control: Another connection, for watching the lock queue.
        table: The table.
        indexes: Whether to remove the index entries of old row versions, which reads all indexes; else only
            the space of the row versions is freed.
        is_slow: Whether to pause as autovacuum does, for the sake of other sessions. A larger
            ``vacuum_cost_delay`` of the role remains. Behind a pooler, that of the session applies.

    Returns:
        The reason why it was skipped or cancelled; empty where it finished.
    """
    statement = sql.SQL("VACUUM (SKIP_LOCKED, TRUNCATE false, PARALLEL 0, INDEX_CLEANUP {}) {}").format(
        sql.SQL("on" if indexes else "off"), sql.Identifier(*table.path)
    )
    if is_slow and connection.is_direct:
        async with translate_errors(connection):
            await connection.execute(
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
    if not reason and (columns := await _without_statistics(control, table)):
        reason = f"ANALYZE keeps the statistics of columns with the statistics target 0: {', '.join(columns)}"
    return reason


async def _without_statistics(control: AsyncConnection, table: TargetTable) -> tuple[str, ...]:
    """Return the rotated columns that ANALYZE skips, and that have statistics."""
    return await fetch_column(
        control,
        sql.SQL(
            "SELECT DISTINCT a.attname::text FROM {} AS member JOIN pg_class c ON c.oid = member.oid"
            " JOIN pg_namespace n ON n.oid = c.relnamespace"
            " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attstattarget = 0"
            # A join with the view would read the statistics of all tables.
            " CROSS JOIN LATERAL (SELECT FROM pg_stats s WHERE s.schemaname = n.nspname"
            " AND s.tablename = c.relname AND s.attname = a.attname LIMIT 1) AS statistics"
            " WHERE a.attname = ANY (%(columns)s::text[]) ORDER BY 1"
        ).format(_MEMBERS),
        {"table": table.regclass, "columns": [column.name for column in table.columns]},
    )


async def _maintain(
    connection: OwnConnection,
    control: AsyncConnection,
    table: TargetTable,
    statement: sql.Composed,
    verb: str,
) -> tuple[str, set[str | None]]:
    """Execute VACUUM or ANALYZE, and cancel it when another session waits for its lock.

    Returns:
        The reason why it was skipped or cancelled, and the codes of the server's warnings.
    """
    warnings = set[str | None]()

    def note(warning: Diagnostic) -> None:
        # The warning is not valid after the handler has returned.
        if warning.severity_nonlocalized == "WARNING":
            warnings.add(warning.sqlstate)

    async def reason_to_cancel() -> str:
        return BUSY if await _blocks_others(control, table) else ""

    if "role" in connection.local_settings:
        return f"{verb} cannot assume a role through a connection pooler", warnings
    if connection.is_direct:
        async with translate_errors(connection):
            # Nothing depends on it, so a standby that is gone must not keep the run from ending.
            await connection.execute("SELECT set_config('synchronous_commit', 'local', false)")
    connection.add_notice_handler(note)
    reason = await execute_until(connection, statement, reason_to_cancel, WATCH_SECONDS)
    if reason is None:
        reason = await _cancelled_by(connection, verb)
    return reason or (BUSY if errors.LockNotAvailable.sqlstate in warnings else ""), warnings


async def execute_until(
    connection: AsyncConnection,
    statement: bytes | sql.Composed,
    reason_to_cancel: Callable[[], Awaitable[str]],
    every_seconds: float,
) -> str | None:
    """Execute a statement that cannot be part of a transaction, and cancel it once there is a reason.

    Args:
        connection: A connection for the statement alone.
        statement: The statement.
        reason_to_cancel: Returns the reason; empty where there is none.
        every_seconds: The time between two of its calls.

    Returns:
        The reason of the cancellation; empty where the statement finished; None where another process or the
        server cancelled it.
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


async def _blocks_others(control: AsyncConnection, table: TargetTable) -> bool:
    """Return whether a session waits for a lock on the table while VACUUM or ANALYZE holds one."""
    (blocks,) = await fetch_column(
        control,
        sql.SQL(
            "SELECT EXISTS (SELECT FROM pg_locks w JOIN pg_locks h USING (locktype, database, relation)"
            " WHERE w.locktype = 'relation' AND w.relation IN {} AND NOT w.granted"
            # In a copy of a database, other tables have the same oids.
            " AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND h.granted AND h.mode = 'ShareUpdateExclusiveLock')"
        ).format(_MEMBERS),
        {"table": table.regclass},
    )
    return bool(blocks)
