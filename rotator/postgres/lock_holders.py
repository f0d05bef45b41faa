"""Which sessions hold the locks that the rotator's sessions wait for."""

from collections.abc import Mapping

from psycopg import AsyncConnection

from rotator.postgres.failures import answered

_HOLDERS = (
    "SELECT DISTINCT b.pid AS holder, CASE WHEN b.pid = 0 THEN 'a prepared transaction'"
    " ELSE 'pid ' || b.pid || COALESCE(', ' || NULLIF(h.application_name, ''), '')"
    # Without pg_read_all_stats, the server does not show these of other roles' sessions.
    " || COALESCE(', ' || h.state, '')"
    " || COALESCE(' for ' || round(extract(epoch FROM clock_timestamp() - h.state_change)) || ' s', '') END"
    " FROM pg_stat_activity w, unnest(pg_blocking_pids(w.pid)) AS b (pid)"
    " LEFT JOIN pg_stat_activity h ON h.pid = b.pid"
    " WHERE w.datname = current_database() AND w.wait_event_type = 'Lock'"
    " AND w.application_name = current_setting('application_name')"
    " AND h.application_name IS DISTINCT FROM current_setting('application_name')"
    " AND COALESCE(h.xact_start < clock_timestamp() - make_interval(secs => %s), true)"
)


async def lock_holders(connection: AsyncConnection, *, seconds: float) -> Mapping[int, str]:
    """Return a phrase for each session that blocks one of the rotator's at this moment, by its pid.

    Args:
        connection: In autocommit mode; may be shared.
        seconds: Transactions that are younger are left out.
    """
    async with answered(connection):
        cursor = await connection.execute(_HOLDERS, (seconds,))
        return {pid: phrase async for pid, phrase in cursor}
