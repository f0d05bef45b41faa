"""The control row of a rotation, the log of what was done with it, and what its owner has measured."""

from dataclasses import asdict, dataclass
from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from rotator.events import ActionKind
from rotator.postgres.connection import execute, fetch_as
from rotator.postgres.owner import this_process

# A rotation that no user has changed has no control row.
_READ: Final = (
    "SELECT COALESCE(c.revision, 0) AS revision, COALESCE(c.paused, false) AS paused,"
    " COALESCE(c.paused_by, '') AS paused_by, COALESCE(c.pace, '') AS pace, c.concurrency, c.batch,"
    " COALESCE(c.cancel_revision, 0) AS cancel_revision, COALESCE(c.cancelled_by, '') AS cancelled_by,"
    " COALESCE(c.changed_by, '') AS changed_by, r.applied_revision, r.throttle_reason,"
    " GREATEST(0, EXTRACT(epoch FROM clock_timestamp() - r.updated_at))::double precision AS silent_seconds"
    " FROM rotator_rotation r LEFT JOIN rotator_control c ON c.rotation_id = r.id WHERE r.id = %s"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Requested:
    """What users have requested of a rotation, and what its owner has reported.

    An empty pace, and None for a number, stand for those of the run.

    Attributes:
        revision: The revision of the control row; 0 where no user has changed it.
        cancel_revision: The revision that asks the owner of that time to stop; 0 where none does.
        throttle_reason: What holds the owner, except for a pause; empty where nothing does.
        silent_seconds: The time since the owner's latest heartbeat.
    """

    revision: int
    paused: bool
    paused_by: str
    pace: str
    concurrency: int | None
    batch: int | None
    cancel_revision: int
    cancelled_by: str
    changed_by: str
    applied_revision: int
    throttle_reason: str
    silent_seconds: float


async def read_requested(connection: AsyncConnection, rotation: int) -> Requested:
    """Return what users have requested of a rotation; waits for no other session that writes it."""
    (requested,) = await fetch_as(connection, class_row(Requested), _READ, (rotation,))
    return requested


async def log_action(
    connection: AsyncConnection,
    rotation: int,
    kind: ActionKind,
    *,
    detail: str = "",
    seconds_ago: float = 0.0,
) -> None:
    """Add what this process has done to the log of a rotation, in the open transaction if there is one."""
    await execute(
        connection,
        "INSERT INTO rotator_action (rotation_id, kind, by, detail, at)"
        " VALUES (%s, %s, %s, %s, now() - make_interval(secs => %s))",
        (rotation, kind, str(this_process()), detail, seconds_ago),
    )


# The queries of this part are for readers with a connection of their own, such as the page in Django's admin.

# A longer time between two measurements is a time without an owner.
GAP_SECONDS: Final = 30

# The last measurement of each part of the time: as many look-ups in the index, however long the time is.
# A time without an owner has no rate.
CHART: Final = (
    "WITH found AS (SELECT point, last.* FROM generate_series(0, %(points)s - 1) AS point,"
    " make_interval(secs => %(span)s / %(points)s) AS part CROSS JOIN LATERAL"
    " (SELECT at, rows_done, commit_seconds, baseline_seconds FROM rotator_measurement"
    " WHERE rotation_id = %(rotation)s AND at >= %(began_at)s + point * part AND at < %(began_at)s"
    # The last part includes its end.
    " + (point + 1) * part + (point = %(points)s - 1)::int * interval '1s'"
    " ORDER BY at DESC LIMIT 1) AS last),"
    " paired AS (SELECT *, rows_done - lag(rows_done) OVER earlier AS rows,"
    " date_part('epoch', at - lag(at) OVER earlier) AS seconds"
    " FROM found WINDOW earlier AS (ORDER BY point))"
    " SELECT point, CASE WHEN seconds <= %(gap)s + 2 * %(span)s / %(points)s"
    " THEN GREATEST(rows, 0) / NULLIF(seconds, 0) END AS rows_per_second, commit_seconds, baseline_seconds"
    " FROM paired ORDER BY point"
)

# One row for each time in which the same sources held the rotation, the latest first; LIMIT NULL returns all.
# It ends with the next change, or where the owner ended before that.
HELD: Final = (
    "SELECT held_by, held.at AS began_at, CASE WHEN following.at < last.at + make_interval(secs => %(gap)s)"
    " THEN following.at ELSE last.at END AS ended_at FROM (SELECT held_by, at FROM rotator_measurement"
    " WHERE rotation_id = %(rotation)s AND is_change AND held_by <> ''"
    " ORDER BY at DESC LIMIT %(limit)s) AS held"
    " LEFT JOIN LATERAL (SELECT at FROM rotator_measurement WHERE rotation_id = %(rotation)s AND is_change"
    " AND at > held.at ORDER BY at LIMIT 1) AS following ON true"
    " CROSS JOIN LATERAL (SELECT at FROM rotator_measurement WHERE rotation_id = %(rotation)s"
    " AND at >= held.at AND at < COALESCE(following.at, 'infinity') ORDER BY at DESC LIMIT 1) AS last"
    " ORDER BY began_at DESC"
)

HELD_SECONDS: Final = (
    "SELECT name, sum(date_part('epoch', ended_at - began_at))"  # noqa: S608 - our own text
    f" FROM ({HELD}) AS held CROSS JOIN LATERAL string_to_table(held_by, chr(10)) AS name"
    " GROUP BY name ORDER BY name"
)

# The same checkpoints that the progress of the run counts, in steps of a quarter of a second.
RECENT_RANGES: Final = (
    "SELECT date_part('epoch', max(committed_at)) AS at, sum(rows)::bigint AS rows,"
    " max(seconds) AS seconds FROM (SELECT committed_at, rows, seconds FROM rotator_completedrange"
    " WHERE rotation_id = %(rotation)s AND committed_at >= %(since)s"
    " ORDER BY id DESC LIMIT %(limit)s) AS recent"
    " GROUP BY floor(date_part('epoch', committed_at) * 4) ORDER BY 1"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the owner of a rotation measured at a moment; None where a figure is not measured.

    Attributes:
        held_by: The names of what holds the rotation, the oldest first.
        is_change: Whether the state or what holds it differs from this owner's measurement before.
        commit_seconds: The 90th percentile of the time of a small commit.
        baseline_seconds: The same without the rotation.
        replica_lags: The seconds of lag, by Django's aliases.
        horizon_holders: What keeps VACUUM from removing dead rows, one phrase each.
    """

    rows_done: int
    state: str
    held_by: tuple[str, ...]
    is_change: bool
    workers: int
    commit_seconds: float | None
    baseline_seconds: float | None
    waiting_sessions: int | None
    replica_lags: dict[str, float]
    horizon_holders: tuple[str, ...]


async def record(connection: AsyncConnection, rotation: int, measured: Measured) -> None:
    """Store what was measured now."""
    await execute(
        connection,
        "INSERT INTO rotator_measurement (rotation_id, at, rows_done, state, held_by, is_change, workers,"
        " commit_seconds, baseline_seconds, waiting_sessions, replica_lags, horizon_holders)"
        " VALUES (%(rotation)s, clock_timestamp(), %(rows_done)s, %(state)s, %(held_by)s, %(is_change)s,"
        " %(workers)s, %(commit_seconds)s, %(baseline_seconds)s, %(waiting_sessions)s, %(replica_lags)s,"
        " %(horizon_holders)s)",
        {
            **asdict(measured),
            "rotation": rotation,
            "held_by": "\n".join(measured.held_by),
            "replica_lags": Jsonb(measured.replica_lags),
            "horizon_holders": Jsonb(measured.horizon_holders),
        },
    )
