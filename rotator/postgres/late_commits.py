"""The transactions that began before the rotation and may still commit rows of the target."""

from psycopg import AsyncConnection, sql

from rotator.postgres.failures import answered
from rotator.postgres.relations import LEAVES
from rotator.postgres.table import TargetTable


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
