"""Probes: what other sessions feel, measured on the server's clock; no other task uses their connection."""

from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import class_row

from rotator.postgres.connection import IS_OWN_SESSION, begin, execute_alone, fetch_as
from rotator.postgres.errors import translate_errors
from rotator.postgres.fence import LOCK_CLASS, SPAN_LOCK_CLASS

# A commit can wait for ever, e.g. for a synchronous standby that is gone.
PROBE_SECONDS: Final = 5.0
SLEEP_SECONDS: Final = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One measurement.

    Attributes:
        commit_seconds: The duration of a transaction that writes a few bytes of WAL and waits for its flush.
        overrun_seconds: The time by which a sleeping session woke too late. It shows a lack of CPUs, but
            saturates at a few milliseconds.
    """

    commit_seconds: float
    overrun_seconds: float


async def probe(connection: AsyncConnection) -> Probe:
    """Commit once, and sleep for ``SLEEP_SECONDS``.

    All statements are sent at once, so the time of this process and of the network does not count. The
    transaction writes a message to the WAL instead of a row: where an old snapshot is open, a row that is
    updated many times a second gets slower and slower to find.
    """
    async with translate_errors(connection, seconds=PROBE_SECONDS), connection.pipeline():
        began = await connection.execute(_NOW)
        await begin(connection)
        await connection.execute("SET LOCAL synchronous_commit TO on")
        await connection.execute("SELECT pg_logical_emit_message(true, 'rotator', '')")
        await execute_alone(connection, b"COMMIT")
        ended = await connection.execute(_NOW)
        slept = await connection.execute(
            "SELECT extract(epoch FROM clock_timestamp() - before.at)::float8"
            " FROM (SELECT clock_timestamp() AS at OFFSET 0) AS before, pg_sleep(%s)",
            (SLEEP_SECONDS,),
        )
        (begin_seconds,), (end_seconds,) = await began.fetchone() or (0.0,), await ended.fetchone() or (0.0,)
        (slept_seconds,) = await slept.fetchone() or (0.0,)
    return Probe(
        commit_seconds=max(0.0, end_seconds - begin_seconds),
        overrun_seconds=max(0.0, slept_seconds - SLEEP_SECONDS),
    )


_NOW: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Counts of the database's statistics, which each session adds to about once a second.

    Attributes:
        at: The server's time, in seconds.
        commits: The commits of all sessions of this database.
        ranges: The ranges of all rotations in it, those of the ledgers included.
        writes: The other writes to the rotator's tables.
        recent_sessions: The other sessions that have done something a moment ago, which the counts may not
            show yet. Sessions that the role may not see are included.
    """

    at: float
    commits: int
    ranges: int
    writes: int
    recent_sessions: int = 0


_ACTIVITY: Final = (
    "SELECT extract(epoch FROM clock_timestamp())::float8 AS at,"  # noqa: S608 - our own text
    " pg_stat_get_db_xact_commit((SELECT oid FROM pg_database WHERE datname = current_database()))"
    " AS commits,"
    " pg_stat_get_tuples_inserted('rotator_completedrange'::regclass)"
    " + pg_stat_get_tuples_updated('rotator_ledger'::regclass) AS ranges,"
    " pg_stat_get_tuples_updated('rotator_rotation'::regclass)"
    " + pg_stat_get_tuples_inserted('rotator_span'::regclass)"
    " + pg_stat_get_tuples_updated('rotator_span'::regclass)"
    " + pg_stat_get_tuples_updated('rotator_helper'::regclass) AS writes,"
    " (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    f" AND COALESCE(backend_type = 'client backend' AND NOT ({IS_OWN_SESSION})"
    " AND state_change > clock_timestamp() - interval '250 ms', true)) AS recent_sessions"
)


async def read_activity(connection: AsyncConnection) -> Activity:
    """Read the counts, which every role may read."""
    (activity,) = await fetch_as(connection, class_row(Activity), _ACTIVITY, seconds=PROBE_SECONDS)
    return activity


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """The number of sessions that wait for a lock of a rotation, and the longest time that one has waited."""

    sessions: int
    seconds: float


# A transaction of a range holds the rotation's advisory lock, also with Celery and behind a pooler.
_WAITING: Final = (
    "WITH waiting AS MATERIALIZED (SELECT w.pid, clock_timestamp() - w.waitstart AS waited FROM pg_locks w"
    " WHERE NOT w.granted AND w.waitstart < clock_timestamp() - make_interval(secs => %(seconds)s)"
    # Another process that takes the rotation over waits on purpose.
    " AND NOT (w.locktype = 'advisory' AND w.classid::bigint = ANY (%(classes)s::bigint[]))),"
    " ours AS MATERIALIZED (SELECT l.pid FROM pg_locks l WHERE EXISTS (SELECT FROM waiting)"
    " AND l.granted AND l.locktype = 'advisory' AND l.objsubid = 2"
    # pg_locks shows all databases of the server.
    " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND l.classid::bigint = ANY (%(classes)s::bigint[]))"
    " SELECT count(*) AS sessions, COALESCE(extract(epoch FROM max(waited)), 0)::float8 AS seconds"
    " FROM waiting"
    " WHERE pid NOT IN (SELECT pid FROM ours)"
    " AND pg_blocking_pids(pid) && ARRAY(SELECT pid FROM ours)"
)


async def sessions_that_wait(connection: AsyncConnection, *, seconds: float) -> Waiting:
    """Return the sessions that have waited for longer than this for a range of a rotation."""
    parameters = {"seconds": seconds, "classes": [LOCK_CLASS, SPAN_LOCK_CLASS]}
    (waiting,) = await fetch_as(connection, class_row(Waiting), _WAITING, parameters, seconds=PROBE_SECONDS)
    return waiting
