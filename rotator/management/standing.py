"""A rotation as users see it: the same words and figures in ``rotations``, in its JSON and on the page."""

from rotator.events import StopReason
from rotator.management.control import SETTINGS
from rotator.management.owners import control_of, is_silent, silent_seconds
from rotator.management.rotation import find_ledger
from rotator.models import Rotation
from rotator.options import Selection
from rotator.progress.text import done_of_total, duration, moment, stopped_by
from rotator.stats import percent_of


def status_of(rotation: Rotation) -> str:
    """Return the status, or that a running rotation sends no heartbeat or is held."""
    if is_silent(rotation):
        return f"no heartbeat for {duration(silent_seconds(rotation))}"
    if held_by(rotation):
        return "paused" if control_of(rotation).paused else "throttled"
    return str(rotation.status)


def held_by(rotation: Rotation) -> str:
    """Return what holds a running rotation; empty where nothing does."""
    if rotation.status != Rotation.Status.RUNNING:
        return ""
    control = control_of(rotation)
    paused = [f"paused by {control.paused_by}"] if control.paused else []
    return "; ".join([*paused, *([rotation.throttle_reason] if rotation.throttle_reason else [])])


def awaits_workers(rotation: Rotation) -> bool:
    """Return whether the rotation waits for a Celery worker."""
    return rotation.status == Rotation.Status.QUEUED


def reason_of(rotation: Rotation) -> str:
    """Return the reason of a stop as a phrase; empty without one."""
    reason = StopReason(rotation.stop_reason) if rotation.stop_reason else None
    return stopped_by(reason, control_of(rotation).cancelled_by)


def facts_of(rotation: Rotation) -> dict[str, object]:
    """Return a rotation as JSON types; these keys are an interface and only ever added to."""
    return {
        "rotation": rotation.pk,
        "target": rotation.target,
        "table": rotation.table_name,
        "database": rotation.database,
        "status": rotation.status,
        "rows": rotation.rows_done,
        "rows_total": rotation.rows_total,
        "rows_total_is_exact": rotation.rows_total_is_exact,
        "late_rows": rotation.late_rows,
        "unconfirmed_rows": rotation.unconfirmed_rows,
        "percent": percent_of_rotation(rotation),
        "seconds_total": round(rotation.active_seconds, 3),
        "started_at": rotation.started_at.isoformat(),
        "updated_at": rotation.updated_at.isoformat(),
        "finished_at": rotation.finished_at and rotation.finished_at.isoformat(),
        "host": rotation.owner_host,
        "pid": rotation.owner_pid,
        "user": rotation.owner_user,
        "owned_since": rotation.owned_since.isoformat(),
        "generation": rotation.generation,
        "version": rotation.version,
        "options": rotation.options,
        "selection": rotation.selection,
        "error": rotation.error,
        "reason": reason_of(rotation),
        "is_filtered": Selection.from_json(rotation.selection).is_filtered,
        "heartbeat_seconds_ago": round(silent_seconds(rotation), 3),
        "ledger": ledger.state if (ledger := find_ledger(rotation)) else "",
        "guard": ledger.guard if ledger else "",
        "deferrals": rotation.deferrals,
        "retries": rotation.retries,
        "throttled_seconds": round(rotation.throttled_seconds, 3),
        "throttle_reason": held_by(rotation),
        "throttled_since": rotation.throttled_since and rotation.throttled_since.isoformat(),
        "control": _control_facts(rotation),
    }


def _control_facts(rotation: Rotation) -> dict[str, object]:
    control = control_of(rotation)
    return {
        "revision": control.revision,
        "paused": control.paused,
        "pace": control.pace,
        "concurrency": control.concurrency,
        "batch": control.batch,
        "changed_by": control.changed_by,
        "changed_at": control.changed_at.isoformat() if control.revision else None,
        "applied_revision": rotation.applied_revision,
        "applied_at": rotation.applied_at and rotation.applied_at.isoformat(),
    }


def control_text(rotation: Rotation) -> str:
    """Return the requests of users, and whether the owner has applied them."""
    control = control_of(rotation)
    settings = [f"{name}={value}" for name in SETTINGS if (value := getattr(control, name))]
    requests = ", ".join([*(["paused"] if control.paused else []), *settings]) or "no limits"
    applied = "applied" if rotation.applied_revision >= control.revision else "not applied yet"
    return (
        f"{requests}; revision {control.revision} by {control.changed_by} at {moment(control.changed_at)}, "
        f"{applied}"
    )


def rows_of(rotation: Rotation) -> str:
    """Return the rows done and the total as text."""
    rows = done_of_total(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)
    rows += " that match the filter" if Selection.from_json(rotation.selection).is_filtered else ""
    return f"{rows} (last known)" if is_silent(rotation) else rows


def percent_of_rotation(rotation: Rotation) -> int:
    """Return the percentage of rows done, rounded down."""
    if rotation.status == Rotation.Status.COMPLETED:
        return 100
    if rotation.bound is None and not rotation.rows_total:
        # The rows are not counted yet.
        return 0
    return percent_of(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)


def age_of(rotation: Rotation) -> str:
    """Return the age of the last heartbeat."""
    return f"{duration(silent_seconds(rotation))} ago"
