"""VACUUM of the target, and the disk space of its heap and indexes.

Every function takes connections in autocommit mode.
"""

import asyncio
from contextlib import suppress
from typing import Final

from psycopg import AsyncConnection, errors, sql
from psycopg.errors import Diagnostic

from rotator.events import Storage
from rotator.postgres.connection import OwnConnection, execute_alone
from rotator.postgres.errors import translate_errors
from rotator.postgres.table import PARTITIONS, TargetTable

WATCH_SECONDS: Final = 0.25
BUSY: Final = "the table is busy"
"""The reason for a skipped VACUUM where another session holds, or waits for, a conflicting lock."""
SCATTERED_CORRELATION: Final = 0.1
_MAINTAIN_SINCE: Final = 170_000
# vacuum_is_permitted_for_relation() in the server's src/backend/commands/vacuum.c.
_OWNS: Final = (
    "SELECT pg_has_role(c.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE')"
    " FROM pg_class c, pg_database d WHERE c.oid = %s::regclass AND d.datname = current_database()"
)
_MAINTAINS: Final = "SELECT has_table_privilege(%s::regclass, 'MAINTAIN')"


async def read_storage(connection: AsyncConnection, table: TargetTable) -> Storage:
    """Return the present size of the table and its indexes."""
    async with translate_errors(connection):
        cursor = await connection.execute(
            sql.SQL(
                "SELECT sum(pg_relation_size(oid))::bigint, sum(pg_indexes_size(oid))::bigint,"
                " sum(pg_stat_get_dead_tuples(oid))::bigint FROM {} AS leaf"
            ).format(PARTITIONS),
            {"table": table.regclass},
        )
        heap_bytes, index_bytes, dead_rows = await cursor.fetchone() or (0, 0, 0)
    return Storage(heap_bytes=heap_bytes, index_bytes=index_bytes, dead_rows=dead_rows)


async def may_vacuum(connection: AsyncConnection, table: TargetTable) -> bool:
    """Return whether this role may vacuum the table; otherwise the server skips it with a warning."""
    queries = [_OWNS]
    if connection.info.server_version >= _MAINTAIN_SINCE:
        queries.append(_MAINTAINS)
    async with translate_errors(connection):
        for query in queries:
            cursor = await connection.execute(query, (table.regclass,))
            row = await cursor.fetchone()
            if row and row[0]:
                return True
    return False


async def is_scattered(connection: AsyncConnection, table: TargetTable) -> bool:
    """Return whether the order of the rows is unrelated to the key's, by the server's statistics."""
    async with translate_errors(connection):
        cursor = await connection.execute(
            "SELECT abs(s.correlation) < %(most)s FROM pg_stats s"
            " JOIN pg_class c ON c.relname = s.tablename AND c.oid = %(table)s::regclass"
            " JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = s.schemaname"
            " WHERE s.attname = %(key)s AND NOT s.inherited",
            {"most": SCATTERED_CORRELATION, "table": table.regclass, "key": table.key[0].name},
        )
        row = await cursor.fetchone()
    return bool(row and row[0])


async def vacuum(
    connection: AsyncConnection, control: AsyncConnection, table: TargetTable, *, indexes: bool
) -> str:
    """Vacuum the table, unless another session holds or waits for a conflicting lock.

    It does not truncate the table, which takes the strongest lock, and uses one process.

    Args:
        connection: A connection for the statement alone.
        control: Another connection, for watching the lock queue.
        table: The table.
        indexes: Whether to remove the index entries of old row versions, which reads all indexes; else only
            the space of the row versions is freed.

    Returns:
        The reason why it was skipped or cancelled; empty where it finished.
    """
    warnings = set[str | None]()

    def note(warning: Diagnostic) -> None:
        # The warning is not valid after the handler has returned.
        warnings.add(warning.sqlstate)

    if isinstance(connection, OwnConnection) and "role" in connection.local_settings:
        return "VACUUM cannot assume a role through a connection pooler"
    connection.add_notice_handler(note)
    statement = sql.SQL("VACUUM (SKIP_LOCKED, TRUNCATE false, PARALLEL 0, INDEX_CLEANUP {}) {}").format(
        sql.SQL("on" if indexes else "off"), table.name
    )
    vacuuming = asyncio.create_task(_execute(connection, statement), name="rotator VACUUM statement")
    try:
        blocks_others = False
        while not (await asyncio.wait([vacuuming], timeout=WATCH_SECONDS))[0]:
            if blocks_others := await _blocks_others(control, table):
                await connection.cancel_safe()
                break
        was_cancelled = not await vacuuming
    finally:
        vacuuming.cancel()
    if was_cancelled:
        return BUSY if blocks_others else await _cancelled_by(connection)
    return BUSY if errors.LockNotAvailable.sqlstate in warnings else ""


async def _execute(connection: AsyncConnection, statement: sql.Composed) -> bool:
    """Execute the statement, and return whether it finished; False where it was cancelled."""
    # Without a time limit: it is cancelled once another session waits for it.
    async with translate_errors(connection, seconds=None):
        with suppress(errors.QueryCanceled):
            await execute_alone(connection, statement)
            return True
    return False


async def _cancelled_by(connection: AsyncConnection) -> str:
    """Return the reason of a cancellation by another process or by the server."""
    async with translate_errors(connection):
        # The session's own setting, without the rotator's settings for its transactions.
        cursor = await execute_alone(connection, b"SELECT current_setting('statement_timeout')")
        row = await cursor.fetchone()
    timeout = row[0] if row else "0"
    if timeout == "0":
        return "another session cancelled VACUUM"
    return (
        f"the role's statement_timeout ({timeout}) cancelled VACUUM and cannot be changed through a "
        "connection pooler; connect to the server directly, or raise it for this role"
    )


async def _blocks_others(control: AsyncConnection, table: TargetTable) -> bool:
    """Return whether a session waits for a lock on the table while VACUUM holds one."""
    async with translate_errors(control):
        cursor = await control.execute(
            sql.SQL(
                "SELECT EXISTS (SELECT FROM pg_locks w JOIN pg_locks h USING (locktype, database, relation)"
                " WHERE w.locktype = 'relation' AND w.relation IN {} AND NOT w.granted"
                # In a copy of a database, other tables have the same oids.
                " AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " AND h.granted AND h.mode = 'ShareUpdateExclusiveLock')"
            ).format(PARTITIONS),
            {"table": table.regclass},
        )
        row = await cursor.fetchone()
    return bool(row and row[0])
