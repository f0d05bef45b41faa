"""What the owner of a rotation measured, and the chart of it.

``record()`` takes a connection in autocommit mode. The statements are for readers with a connection of their
own, such as the page in Django's admin.
"""

from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from rotator.postgres.errors import translate_errors

# A longer time between two measurements is a time without an owner.
GAP_SECONDS: Final = 30
# While something holds a rotation, measurements are closer than this.
APART_SECONDS: Final = 8

# Only the last measurements of two parts of the time are compared, so that no window has many rows. A time
# without an owner has no rate.
CHART: Final = (
    "WITH found AS (SELECT LEAST(floor(date_part('epoch', at - %(began_at)s) * %(points)s / %(span)s),"
    " %(points)s - 1)::int AS point, max(at) AS at, max(rows_done) AS rows_done,"
    " avg(commit_seconds) AS commit_seconds, avg(baseline_seconds) AS baseline_seconds"
    " FROM rotator_measurement WHERE rotation_id = %(rotation)s GROUP BY 1),"
    " paired AS (SELECT *, rows_done - lag(rows_done) OVER earlier AS rows,"
    " date_part('epoch', at - lag(at) OVER earlier) AS seconds"
    " FROM found WINDOW earlier AS (ORDER BY point))"
    " SELECT point, CASE WHEN seconds <= %(gap)s + 2 * %(span)s / %(points)s"
    " THEN GREATEST(rows, 0) / NULLIF(seconds, 0) END AS rows_per_second, commit_seconds, baseline_seconds"
    " FROM paired ORDER BY point"
)

# One row for each time in which the same sources held the rotation, the latest first. A partial index has the
# measurements of these times.
HELD: Final = (
    "WITH found AS (SELECT at, held_by, held_by <> lag(held_by, 1, '') OVER earlier"
    " OR at - lag(at) OVER earlier > make_interval(secs => %(apart)s) AS begins"
    " FROM rotator_measurement WHERE rotation_id = %(rotation)s AND held_by <> ''"
    " WINDOW earlier AS (ORDER BY at)),"
    " numbered AS (SELECT *, count(*) FILTER (WHERE begins) OVER (ORDER BY at) AS number FROM found),"
    " bands AS (SELECT held_by, min(at) AS began_at, max(at) AS last_at FROM numbered"
    " GROUP BY number, held_by ORDER BY 2 DESC LIMIT %(limit)s)"
    " SELECT held_by, began_at, COALESCE((SELECT min(at) FROM rotator_measurement"
    " WHERE rotation_id = %(rotation)s AND at > last_at AND at < last_at + make_interval(secs => %(gap)s)),"
    " last_at) AS ended_at FROM bands ORDER BY began_at DESC"
)

# Each measurement counts until the next one.
HELD_SECONDS: Final = (
    "SELECT name, sum(LEAST(date_part('epoch', following.at - held.at), %(gap)s))"
    " FROM rotator_measurement AS held CROSS JOIN LATERAL (SELECT min(at) AS at FROM rotator_measurement"
    " WHERE rotation_id = held.rotation_id AND at > held.at) AS following"
    " CROSS JOIN LATERAL string_to_table(held.held_by, chr(10)) AS name"
    " WHERE held.rotation_id = %(rotation)s AND held.held_by <> '' AND following.at IS NOT NULL"
    " GROUP BY name ORDER BY name"
)

# The same checkpoints that the progress of the run counts, in steps of a quarter of a second.
RECENT_RANGES: Final = (
    "SELECT date_part('epoch', max(committed_at)) AS at, sum(rows)::bigint AS rows,"
    " max(seconds) AS seconds FROM (SELECT committed_at, rows, seconds FROM rotator_completedrange"
    " WHERE rotation_id = %(rotation)s ORDER BY id DESC LIMIT %(limit)s) AS recent"
    " GROUP BY floor(date_part('epoch', committed_at) * 4) ORDER BY 1"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the owner of a rotation measured at a moment.

    Attributes:
        rows_done: The completed rows.
        state: What the owner does.
        held_by: The names of what holds it, the oldest first.
        workers: The workers that may write.
        commit_seconds: The 90th percentile of the time of a small commit; None where it is not measured.
        baseline_seconds: The same without the rotation.
        waiting_sessions: The sessions that wait for a range; None where that is not measured.
        replica_lags: The seconds of lag, by Django's aliases.
        horizon_holders: What keeps VACUUM from removing dead rows, one phrase each.
    """

    rows_done: int
    state: str
    held_by: tuple[str, ...]
    workers: int
    commit_seconds: float | None
    baseline_seconds: float | None
    waiting_sessions: int | None
    replica_lags: dict[str, float]
    horizon_holders: tuple[str, ...]


async def record(connection: AsyncConnection, rotation: int, measured: Measured) -> None:
    """Store what was measured now."""
    async with translate_errors(connection):
        await connection.execute(
            "INSERT INTO rotator_measurement (rotation_id, at, rows_done, state, held_by, workers,"
            " commit_seconds, baseline_seconds, waiting_sessions, replica_lags, horizon_holders)"
            " VALUES (%s, clock_timestamp(), %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                rotation,
                measured.rows_done,
                measured.state,
                "\n".join(measured.held_by),
                measured.workers,
                measured.commit_seconds,
                measured.baseline_seconds,
                measured.waiting_sessions,
                Jsonb(measured.replica_lags),
                Jsonb(list(measured.horizon_holders)),
            ),
        )
