"""Other sessions: old transactions, holders of locks and of the xmin horizon, and standbys."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import class_row

from rotator.exceptions import ServerLostError
from rotator.postgres.connection import IS_OWN_SESSION, fetch_as, fetch_column, fetch_row, fetch_rows
from rotator.postgres.table import TargetTable


async def holders(connection: AsyncConnection, table: TargetTable, started_xid: int) -> tuple[str, ...]:
    """Return a phrase for each open transaction, older than the rotation, that has written to the target.

    An older transaction that has not yet written to it cannot commit a value that was in the table when the
    rotation began.
    """
    return await fetch_column(
        connection,
        table.compose(
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
            " AND t.locktype = 'relation' AND t.granted AND t.relation IN {partitions}"
            " AND t.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND t.mode NOT IN ('AccessShareLock', 'RowShareLock')"
            " ORDER BY 1"
        ),
        {"started_xid": started_xid},
    )


# A blocker may wait itself, e.g. for the same row: the one that waits longest leads to the holder.
# Every role sees the virtual transactions of all sessions. A prepared transaction has none.
_BLOCKING: Final = (
    "WITH RECURSIVE ours AS MATERIALIZED (SELECT DISTINCT l.pid FROM pg_locks l"  # noqa: S608 - our own text
    # The view's wait_event is NULL for the sessions of another role, and that is any one after SET ROLE.
    " JOIN pg_stat_activity a ON a.pid = l.pid WHERE NOT l.granted AND a.datname = current_database()"
    f" AND a.{IS_OWN_SESSION}),"
    " waits AS MATERIALIZED (SELECT pid, transactionid, waitstart FROM pg_locks"
    " WHERE NOT granted AND EXISTS (SELECT FROM ours)),"
    " chain (depth, pid, blockers) AS (SELECT 1, pid, pg_blocking_pids(pid) FROM ours"
    " UNION ALL SELECT depth + 1, next.pid, pg_blocking_pids(next.pid) FROM chain,"
    " LATERAL (SELECT pid FROM waits WHERE pid = ANY (blockers) ORDER BY waitstart LIMIT 1) AS next"
    " WHERE depth < 5)"
    " SELECT DISTINCT COALESCE('prepared ' || p.gid, (SELECT v.virtualtransaction FROM pg_locks v"
    " WHERE v.pid = b.pid AND v.virtualxid = v.virtualtransaction))"
    " FROM chain c JOIN waits w USING (pid) CROSS JOIN unnest(c.blockers) AS b (pid)"
    " LEFT JOIN pg_stat_activity h ON h.pid = b.pid"
    " LEFT JOIN pg_prepared_xacts p ON b.pid = 0 AND p.database = current_database()"
    " AND p.transaction = COALESCE(w.transactionid, p.transaction)"
    " WHERE b.pid NOT IN (SELECT pid FROM waits)"
    f" AND (h.{IS_OWN_SESSION}) IS NOT TRUE"
)
_OPEN: Final = (
    "SELECT v.virtualtransaction, 'pid ' || v.pid || COALESCE(', ' || NULLIF(h.application_name, ''), '')"
    # Without pg_read_all_stats, these are NULL for other roles' sessions.
    " || COALESCE(', ' || h.state, '')"
    " || COALESCE(' for ' || round(extract(epoch FROM clock_timestamp() - h.state_change)) || ' s', '')"
    " FROM pg_locks v"
    " LEFT JOIN pg_stat_activity h ON h.pid = v.pid"
    " WHERE v.virtualxid = v.virtualtransaction AND v.virtualxid = ANY (%(transactions)s)"
    " UNION ALL SELECT 'prepared ' || gid, 'prepared transaction ' || gid FROM pg_prepared_xacts"
    " WHERE 'prepared ' || gid = ANY (%(transactions)s) ORDER BY 2"
)


async def blocking_transactions(connection: AsyncConnection) -> frozenset[str]:
    """Return the transactions of other sessions for which the rotator's sessions wait just now."""
    return frozenset(await fetch_column(connection, _BLOCKING)) - {None}


async def open_transactions(connection: AsyncConnection, transactions: Iterable[str]) -> dict[str, str]:
    """Return those of these transactions that have not ended, each with a phrase for its session."""
    return dict(await fetch_rows(connection, _OPEN, {"transactions": list(transactions)}))


# The view's state and times of other roles are NULL without pg_read_all_stats, its xid and xmin are not. A
# replica has no database. A worker of autovacuum ignores its own snapshot while it vacuums, and so does a
# VACUUM of the rotator.
_HORIZON_HOLDERS: Final = (
    "SELECT name, xmin, phrase FROM ("  # noqa: S608 - our own text
    " SELECT 'pid ' || pid AS name, CASE WHEN datname IS NULL"
    " THEN 'replica ' || COALESCE(NULLIF(application_name, ''), '?') || ' (hot_standby_feedback)'"
    " ELSE 'pid ' || pid || COALESCE(', ' || NULLIF(application_name, ''), '') || COALESCE(', ' || state, '')"
    " || COALESCE(', since ' || to_char(xact_start AT TIME ZONE 'UTC', 'HH24:MI:SS') || ' UTC', '') END"
    " AS phrase, COALESCE(backend_xmin, backend_xid)::text AS xmin,"
    " GREATEST(age(backend_xmin), age(backend_xid)) AS age FROM pg_stat_activity"
    " WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)"
    " AND (datname IS NULL OR datname = current_database())"
    f" AND ({IS_OWN_SESSION}) IS NOT TRUE"
    " AND backend_type IS DISTINCT FROM 'autovacuum worker'"
    " UNION ALL SELECT 'prepared ' || gid, 'prepared transaction ' || gid, transaction::text,"
    " age(transaction) FROM pg_prepared_xacts WHERE database = current_database()"
    " UNION ALL SELECT 'slot ' || slot_name, 'replication slot ' || slot_name"
    " || CASE WHEN active THEN '' ELSE ' (not active)' END, xmin::text, age(xmin)"
    " FROM pg_replication_slots WHERE xmin IS NOT NULL"
    ") AS held ORDER BY age DESC LIMIT 20"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HorizonHolder:
    """A session, replica, slot or prepared transaction that holds the xmin horizon of the database.

    ``xmin`` is the oldest transaction whose rows it keeps from VACUUM; it stays the same as long as it does.
    """

    name: str
    xmin: str
    phrase: str


async def horizon_holders(connection: AsyncConnection) -> tuple[HorizonHolder, ...]:
    """Return what holds the xmin horizon now, the oldest first; most of it for a moment only."""
    return tuple(await fetch_as(connection, class_row(HorizonHolder), _HORIZON_HOLDERS))


# A number comes before the names in parentheses; one standby confirms where there is none. The view's
# sync_state is NULL without pg_read_all_stats.
_MISSING_STANDBYS: Final = (
    "SELECT names FROM current_setting('synchronous_standby_names') AS names WHERE names <> ''"  # noqa: S608 - our own text
    " AND ((SELECT count(*) FROM pg_stat_replication"
    " WHERE sync_state IN ('sync', 'quorum') OR sync_state IS NULL)"
    " < COALESCE(substring(names FROM '(?i)^\\s*(?:first|any)?\\s*(\\d+)\\s*\\(')::int, 1)"
    " OR (%(counts_waits)s AND EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    " AND state = 'active'"
    # A short wait is part of each commit.
    " AND query_start < clock_timestamp() - interval '5 s'"
    f" AND datname = current_database() AND {IS_OWN_SESSION})))"
)


async def missing_standbys(connection: AsyncConnection, *, counts_waits: bool) -> str:
    """Return why each commit waits for ever; empty where the synchronous standbys confirm commits.

    With ``counts_waits``, a commit of the rotator that waits for 5 s is reason enough.
    """
    row = await fetch_row(connection, _MISSING_STANDBYS, {"counts_waits": counts_waits})
    if row is None:
        return ""
    return (
        "Each commit waits for a synchronous standby that does not confirm it "
        f"(synchronous_standby_names is '{row[0]}'). Start the standby, or change that setting."
    )


async def check_standbys(connection: AsyncConnection) -> None:
    """Raise ServerLostError if each commit waits for a synchronous standby that is not connected."""
    if reason := await missing_standbys(connection, counts_waits=True):
        raise ServerLostError(reason)
