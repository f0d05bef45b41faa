"""Whether a rotation moves, how fast, and if not, why and what ends that."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from rotator.events import ActionKind
from rotator.management.rotation import (
    control_of,
    cursor_of,
    held_by,
    is_dead,
    is_silent,
    owner_of,
    reason_of,
    silent_seconds,
)
from rotator.models import Action, Rotation
from rotator.postgres.measurements import RECENT_RANGES
from rotator.progress.text import ACTIVITIES, duration, plural, rate
from rotator.stats import STALL_SECONDS, RecentRate

# About the checkpoints of the window of a rate.
_RECENT_RANGES: Final = 1000
_ACTIVITIES: Final = dict[str, str](ACTIVITIES.items()) | {"late_commits": "waiting for older transactions"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Whether a rotation moves, and if not, why and what ends that.

    Attributes:
        tone: ``moving``, ``held``, ``stopped``, ``done`` or ``problem``.
        headline: One sentence.
        since: The time since which this is so; None where it moves.
        ends: What ends it; empty where it moves.
    """

    tone: str
    headline: str
    since: datetime | None = None
    ends: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """The recent speed of a rotation.

    Attributes:
        rows_per_second: The rate; None while it is unknown.
        eta_seconds: The time until every row is done; None while it is unknown.
        silent_seconds: The time since the last range; None without any.
    """

    rows_per_second: float | None
    eta_seconds: float | None
    silent_seconds: float | None


def speed_of(rotation: Rotation) -> Speed:
    """Return the recent speed, computed from the checkpoints as the run does from its ranges."""
    now = (rotation.updated_at + timedelta(seconds=silent_seconds(rotation))).timestamp()
    recent, last = RecentRate(), None
    with cursor_of(rotation) as cursor:
        cursor.execute(RECENT_RANGES, {"rotation": rotation.pk, "limit": _RECENT_RANGES})
        for at, rows, seconds in cursor.fetchall():
            last = min(float(at), now)
            recent.add(int(rows), now=last, seconds=seconds)
    if last is None:
        return Speed(rows_per_second=None, eta_seconds=None, silent_seconds=None)
    left = rotation.rows_total - rotation.rows_done
    is_exceeded = left <= 0 and not rotation.rows_total_is_exact
    return Speed(
        rows_per_second=recent.rows_per_second(now),
        eta_seconds=None if is_exceeded else recent.eta_seconds(left, now),
        silent_seconds=now - last,
    )


def motion_of(rotation: Rotation, speed: Speed, state: str, actions: list[Action]) -> Motion:
    """Return whether the rotation moves.

    Args:
        rotation: The rotation, from ``find_rotations()``.
        speed: Its speed.
        state: What its owner does, by the latest measurement; empty where none is known.
        actions: Its log, the latest first.
    """
    if rotation.status == Rotation.Status.RUNNING:
        return _motion_of_running(rotation, speed, state, actions)
    if rotation.status == Rotation.Status.QUEUED:
        ends = "The next free Celery worker continues it."
        return Motion(
            tone="held", headline="Not moving: waiting for a worker", since=rotation.updated_at, ends=ends
        )
    if rotation.status == Rotation.Status.COMPLETED:
        headline = "Completed for the rows that match the filter" if rotation.is_filtered else "Completed"
        if rotation.unconfirmed_rows:
            headline += f", {plural(rotation.unconfirmed_rows, 'row')} not confirmed"
        return Motion(tone="done", headline=headline, since=rotation.finished_at)
    if rotation.status == Rotation.Status.ABANDONED:
        return Motion(tone="stopped", headline="Abandoned: it is never resumed", since=rotation.finished_at)
    is_failed = rotation.status == Rotation.Status.FAILED
    reason = reason_of(rotation)
    why = f"{rotation.error.rstrip('.')}. " if rotation.error and not reason else ""
    return Motion(
        tone="problem" if is_failed else "stopped",
        headline=f"Not moving: {rotation.status}{f', {reason}' if reason else ''}",
        since=rotation.updated_at,
        ends=f"{why}No process works on it. The same command resumes it.",
    )


def _motion_of_running(  # noqa: PLR0911 - one result for each reason
    rotation: Rotation, speed: Speed, state: str, actions: list[Action]
) -> Motion:
    if is_silent(rotation) or is_dead(rotation):
        owner = owner_of(rotation)
        cause = f"The process of {owner} has ended." if owner.is_gone() else f"{owner} does not answer."
        return Motion(
            tone="problem",
            headline=f"Not moving: no heartbeat for {duration(silent_seconds(rotation))}",
            since=rotation.updated_at,
            ends=f"{cause} If no process works on it, the same command resumes it.",
        )
    if held := held_by(rotation):
        since = rotation.throttled_since
        if control_of(rotation).paused:
            since = next((each.at for each in actions if each.kind == ActionKind.PAUSED), since)
            return Motion(
                tone="held", headline=f"Not moving: {held}", since=since, ends="Resume ends the pause."
            )
        return Motion(
            tone="held",
            headline=f"Not moving: throttled by {held}",
            since=since,
            ends="It continues by itself then.",
        )
    if activity := _ACTIVITIES.get(state):
        return Motion(tone="moving", headline=f"Moving: {activity}")
    if speed.silent_seconds is not None and speed.silent_seconds > STALL_SECONDS:
        return Motion(
            tone="held",
            headline=f"Not moving: no range was committed for {duration(speed.silent_seconds)}",
            since=rotation.updated_at - timedelta(seconds=speed.silent_seconds),
            ends="Its process is alive. Other sessions may hold locks: look at its output.",
        )
    if speed.rows_per_second is None:
        return Motion(tone="moving", headline="Starting: the rate is not known yet")
    return Motion(tone="moving", headline=f"Moving: {rate(speed.rows_per_second)} rows/s")
