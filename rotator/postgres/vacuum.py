"""VACUUM of the target, and the disk space of its heap and indexes."""

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
"""Why one VACUUM was skipped: another session held, or waited for, a lock that conflicts with its own."""
SCATTERED_CORRELATION: Final = 0.1
_MAINTAIN_SINCE: Final = 170_000
# vacuum_is_permitted_for_relation() in the server's src/backend/commands/vacuum.c.
_OWNS: Final = (
    "SELECT pg_has_role(c.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE')"
    " FROM pg_class c, pg_database d WHERE c.oid = %s::regclass AND d.datname = current_database()"
)
_MAINTAINS: Final = "SELECT has_table_privilege(%s::regclass, 'MAINTAIN')"


async def read_storage(connection: AsyncConnection, table: TargetTable) -> Storage:
    """What the table takes now.

    Raises:
        ServerLostError: The connection is gone.
    """
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
    """Whether the server would let this role vacuum the table; it skips it with a warning otherwise."""
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
    """Whether the rows lie in an order that has nothing to do with the key's, as far as the server knows."""
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
    """Vacuum the table, unless somebody else holds or wants a lock that is in the way of it.

    Truncating would take the strongest lock there is, and more processes at once what the writers need.

    Args:
        connection: For the statement alone; in autocommit mode.
        control: Another one in autocommit mode, by which is seen who waits.
        table: What to vacuum.
        indexes: Whether to read all of its indexes to remove what points to old row versions; else these are
            only emptied, which is what frees the space.

    Returns:
        Why it was not done, or not to its end; empty when it was.

    Raises:
        RotatorError: The server refused, or was lost.
    """
    warnings = set[str | None]()

    def hear(warning: Diagnostic) -> None:
        # To be read here and now: it is gone when the handler returns.
        warnings.add(warning.sqlstate)

    if isinstance(connection, OwnConnection) and "role" in connection.local_settings:
        return "a connection pooler is in between, and VACUUM cannot assume a role there"
    connection.add_notice_handler(hear)
    statement = sql.SQL("VACUUM (SKIP_LOCKED, TRUNCATE false, PARALLEL 0, INDEX_CLEANUP {}) {}").format(
        sql.SQL("on" if indexes else "off"), table.name
    )
    vacuuming = asyncio.create_task(_execute(connection, statement), name="rotator VACUUM statement")
    try:
        is_in_the_way = False
        while not (await asyncio.wait([vacuuming], timeout=WATCH_SECONDS))[0]:
            if is_in_the_way := await _blocks_others(control, table):
                await connection.cancel_safe()
                break
        was_cancelled = not await vacuuming
    finally:
        vacuuming.cancel()
    if was_cancelled:
        return BUSY if is_in_the_way else await _cancelled_by(connection)
    return BUSY if errors.LockNotAvailable.sqlstate in warnings else ""


async def _execute(connection: AsyncConnection, statement: sql.Composed) -> bool:
    """Whether the statement got to its end; not what else it may have met."""
    # As long as it takes: whoever waits for it has it cancelled.
    async with translate_errors(connection, seconds=None):
        with suppress(errors.QueryCanceled):
            await execute_alone(connection, statement)
            return True
    return False


async def _cancelled_by(connection: AsyncConnection) -> str:
    """Return what cancelled the statement, if it was not this process."""
    async with translate_errors(connection):
        # As the session has it, without what the rotator sets for its own transactions.
        cursor = await execute_alone(connection, b"SELECT current_setting('statement_timeout')")
        row = await cursor.fetchone()
    timeout = row[0] if row else "0"
    if timeout == "0":
        return "another session cancelled VACUUM"
    return (
        f"the role's statement_timeout ({timeout}) cancelled VACUUM, and cannot be changed through a "
        "connection pooler; connect to the server directly, or raise it for this role"
    )


async def _blocks_others(control: AsyncConnection, table: TargetTable) -> bool:
    """Whether anybody waits for a lock on the table while VACUUM has its own."""
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
