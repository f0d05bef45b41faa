"""The control row of a rotation, and the log of what was done with it.

Every function takes a connection in autocommit mode.
"""

from dataclasses import dataclass
from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import class_row

from rotator.events import ActionKind
from rotator.postgres.connection import fetch_as
from rotator.postgres.errors import translate_errors
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

    Attributes:
        revision: The revision of the control row; 0 where no user has changed it.
        pace: The pace; empty for that of the run.
        concurrency: The most workers; None for those of the run.
        batch: The most rows in a range; None for those of the run.
        cancel_revision: The revision that asks the owner of that time to stop; 0 where none does.
        changed_by: The user of this revision.
        applied_revision: The revision that an owner has applied.
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
    async with translate_errors(connection):
        await connection.execute(
            "INSERT INTO rotator_action (rotation_id, kind, by, detail, at)"
            " VALUES (%s, %s, %s, %s, now() - make_interval(secs => %s))",
            (rotation, kind, str(this_process()), detail, seconds_ago),
        )
