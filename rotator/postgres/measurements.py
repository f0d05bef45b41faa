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

# Rows are counted by the differences of neighbours, so that a run that is resumed begins at 0.
CHART: Final = (
    "WITH found AS (SELECT at, held_by, commit_seconds, baseline_seconds,"
    " rows_done - lag(rows_done) OVER earlier AS rows,"
    " EXTRACT(epoch FROM at - lag(at) OVER earlier)::float8 AS seconds,"
    " EXTRACT(epoch FROM at - min(at) OVER ())::float8 AS since,"
    " EXTRACT(epoch FROM max(at) OVER () - min(at) OVER ())::float8 AS span"
    " FROM rotator_measurement WHERE rotation_id = %(rotation)s WINDOW earlier AS (ORDER BY at, id))"
    " SELECT LEAST(floor(since * %(points)s / NULLIF(span, 0)), %(points)s - 1)::int AS point,"
    " sum(GREATEST(rows, 0)) FILTER (WHERE seconds <= %(gap)s)"
    " / NULLIF(sum(seconds) FILTER (WHERE seconds <= %(gap)s), 0) AS rows_per_second,"
    " avg(commit_seconds) AS commit_seconds, avg(baseline_seconds) AS baseline_seconds"
    " FROM found WHERE span > 0 GROUP BY 1 ORDER BY 1"
)

# One row for each time in which the same sources held the rotation.
HELD: Final = (
    "WITH found AS (SELECT at, held_by, lead(at) OVER later AS until,"
    " held_by <> lag(held_by, 1, '') OVER later"
    " OR EXTRACT(epoch FROM at - lag(at) OVER later) > %(gap)s AS begins"
    " FROM rotator_measurement WHERE rotation_id = %(rotation)s WINDOW later AS (ORDER BY at, id)),"
    " numbered AS (SELECT *, count(*) FILTER (WHERE begins) OVER (ORDER BY at) AS number FROM found)"
    " SELECT held_by, min(at) AS began_at,"
    " max(LEAST(COALESCE(until, at), at + make_interval(secs => %(gap)s))) AS ended_at"
    " FROM numbered WHERE held_by <> '' GROUP BY number, held_by ORDER BY 2"
)

# Each measurement counts until the next one.
HELD_SECONDS: Final = (
    "SELECT name, sum(LEAST(seconds, %(gap)s)) FROM (SELECT held_by,"
    " EXTRACT(epoch FROM lead(at) OVER (ORDER BY at, id) - at)::float8 AS seconds"
    " FROM rotator_measurement WHERE rotation_id = %(rotation)s) AS measured"
    " CROSS JOIN LATERAL string_to_table(NULLIF(held_by, ''), chr(10)) AS name"
    " WHERE seconds IS NOT NULL GROUP BY name ORDER BY name"
)

# The same checkpoints that the progress of the run counts, in steps of a quarter of a second.
RECENT_RANGES: Final = (
    "SELECT EXTRACT(epoch FROM max(committed_at))::float8 AS at, sum(rows)::bigint AS rows,"
    " max(seconds) AS seconds FROM (SELECT committed_at, rows, seconds FROM rotator_completedrange"
    " WHERE rotation_id = %(rotation)s ORDER BY id DESC LIMIT %(limit)s) AS recent"
    " GROUP BY floor(EXTRACT(epoch FROM committed_at) * 4) ORDER BY 1"
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
