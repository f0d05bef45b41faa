"""What the owner of a rotation measured, and the chart of it.

``record()`` takes a connection in autocommit mode. The statements are for readers with a connection of their
own, such as the page in Django's admin.
"""

from dataclasses import asdict, dataclass
from typing import Final

from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from rotator.postgres.errors import translate_errors

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

# One row for each time in which the same sources held the rotation, the latest first; NULL is no limit.
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
        is_change: Whether either of them differs from this owner's measurement before.
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
    is_change: bool
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
