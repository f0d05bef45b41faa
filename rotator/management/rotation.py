"""A rotation as users see it: the same words and figures in the commands, in their JSON and on the page."""

import shlex
from typing import Final, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError
from django.db import DEFAULT_DB_ALIAS, Error, connections
from django.db.backends.utils import CursorWrapper
from django.db.models import DurationField, ExpressionWrapper, F, FloatField, Model, QuerySet
from django.db.models.functions import Extract, Now

from rotator.apps import hides_keys
from rotator.events import ActionKind, StopReason
from rotator.fields.connections import naming_timeouts, reading_times
from rotator.models import Action, Control, Ledger, Rotation, Verification
from rotator.options import DEFAULT_OPTIONS, SETTINGS, RunOptions, Selection, given_options
from rotator.postgres.owner import SILENT_SECONDS, Owner
from rotator.progress.text import HIDDEN, done_of_total, duration, moment, stopped_by
from rotator.stats import percent_of

AnyModel = TypeVar("AnyModel", bound=Model)

_JUST_ENDED_SECONDS: Final = 3.0


def find_rotations(database: str) -> QuerySet[Rotation]:
    """Return the rotations of a database, the latest first, for the functions of this module."""
    elapsed = ExpressionWrapper(Now() - F("updated_at"), output_field=DurationField())
    # The driver reads an interval only in one of the styles that a session can have.
    silence = Extract(elapsed, "epoch", output_field=FloatField())
    rotations = Rotation.objects.using(database).select_related("control", "ledger").defer("ledger__salt")
    return rotations.annotate(silence=silence).order_by("-pk")


def read_rotations(database: str, number: int | None = None) -> list[Rotation]:
    """Read the rotation with an id, or all rotations of a database, the latest first.

    Raises:
        CommandError: There is none with this id, or the database cannot be read.
    """
    found = find_rotations(database)
    try:
        with reading_times(database), naming_timeouts(database):
            rotations = list(found if number is None else found.filter(pk=number))
    except (Error, ImproperlyConfigured) as error:
        raise CommandError(
            f"Cannot read the rotations of the database '{database}': {first_line(error).rstrip('.')}. "
            "Check that the server runs and that the database is migrated."
        ) from error
    if number is not None and not rotations:
        raise CommandError(f"There is no rotation {number} in the database '{database}'.")
    return rotations


def first_line(error: Exception) -> str:
    """Return the first line of a database's error."""
    return " ".join(str(error).split("\n", 1)[0].split())


def ledger_of(rotation: Rotation) -> Ledger | None:
    """Return the ledger of a rotation, forgotten or not; None where it never had one."""
    return getattr(rotation, "ledger", None)


def stored(kind: type[AnyModel], rotation: Rotation) -> QuerySet[AnyModel]:
    """Return the rows of another table that belong to a rotation, from the database that it was read from."""
    # Not from the database that the project's routers choose to read from.
    return kind._default_manager.using(rotation._state.db).filter(rotation=rotation)  # noqa: SLF001 - documented


def survivors_of(verification: Verification) -> int | None:
    """Return the survivors of a finished verification; None without a ledger, or where a control failed."""
    controls = verification.result.get("controls")
    found: int | None = verification.result.get("survivors")
    return found if controls and controls["have_passed"] else None


def cursor_of(rotation: Rotation) -> CursorWrapper:
    """Return a cursor of the database that a rotation was read from."""
    return connections[rotation._state.db or DEFAULT_DB_ALIAS].cursor()  # noqa: SLF001 - documented by Django


def control_of(rotation: Rotation) -> Control:
    """Return the control row of a rotation; an empty one where no user has changed it."""
    return getattr(rotation, "control", None) or Control(rotation=rotation)


def owner_of(rotation: Rotation) -> Owner:
    """Return the process that owns a rotation, or the last one that did."""
    return Owner(
        host=rotation.owner_host,
        pid=rotation.owner_pid or 0,
        process=rotation.owner_process,
        user=rotation.owner_user,
        version=rotation.version,
    )


def silent_seconds(rotation: Rotation) -> float:
    """Return the time since the last heartbeat, on the database's clock."""
    return max(0.0, float(vars(rotation)["silence"]))


def is_silent(rotation: Rotation) -> bool:
    """Return whether the owner of a running rotation sends no heartbeat."""
    return rotation.status == Rotation.Status.RUNNING and silent_seconds(rotation) > SILENT_SECONDS


def is_dead(rotation: Rotation) -> bool:
    """Return whether the owner of a running rotation has ended, or is silent for too long."""
    # A process that has just ended may have completed the rotation after it was read.
    if rotation.status != Rotation.Status.RUNNING or silent_seconds(rotation) < _JUST_ENDED_SECONDS:
        return False
    budget_seconds = RunOptions.from_json(rotation.options).outage_budget_seconds
    return owner_of(rotation).is_gone() or silent_seconds(rotation) > budget_seconds + SILENT_SECONDS


def has_owner(rotation: Rotation) -> bool:
    """Return whether a process works on a rotation, or Celery workers will."""
    is_owned = rotation.status in (Rotation.Status.RUNNING, Rotation.Status.QUEUED)
    return is_owned and not is_silent(rotation) and not is_dead(rotation)


def selection_text(rotation: Rotation, *, hides_keys: bool) -> str:
    """Return the options that choose the rows and their values; those of filters can be keys."""
    chosen = str(Selection.from_json(rotation.selection))
    if not hides_keys or chosen == DEFAULT_OPTIONS:
        return chosen
    words = shlex.split(chosen)
    return shlex.join(f"{word.partition('=')[0]}=…" if "=" in word else word for word in words)


def resume_command_of(rotation: Rotation, *, hides_keys: bool) -> str:
    """Return the command that resumes a rotation; empty where it is finished, or has an owner."""
    if rotation.status not in Rotation.UNFINISHED or has_owner(rotation):
        return ""
    words = ["python", "manage.py", "async_rotate", *rotation.target.split(), "--database", rotation.database]
    options = str(given_options(rotation.options, rotation.selection))
    for chosen in (selection_text(rotation, hides_keys=hides_keys), options):
        words += shlex.split(chosen) if chosen != DEFAULT_OPTIONS else []
    return shlex.join(words)


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


def reason_of(rotation: Rotation) -> str:
    """Return the reason of a stop as a phrase; empty without one."""
    reason = StopReason(rotation.stop_reason) if rotation.stop_reason else None
    return stopped_by(reason, control_of(rotation).cancelled_by)


def shown(text: str) -> str:
    """Return a text that can contain keys of rows, or a phrase instead where the project hides them."""
    return HIDDEN if text and hides_keys() else text


def detail_of(action: Action) -> str:
    """Return the detail of an action, for the log of a rotation."""
    # The other details are made of options, limits and reasons without keys.
    has_keys = action.kind == ActionKind.STOPPED and action.detail not in {*StopReason, *Rotation.UNFINISHED}
    return shown(action.detail) if has_keys else action.detail


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
        "selection": Selection.from_json(rotation.selection).without_values().to_json(),
        "error": rotation.error,
        "reason": reason_of(rotation),
        "is_filtered": rotation.is_filtered,
        "heartbeat_seconds_ago": round(silent_seconds(rotation), 3),
        "ledger": ledger.state if (ledger := ledger_of(rotation)) else "",
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
    """Return the requests of users, and whether the owner has applied them; empty without any."""
    control = control_of(rotation)
    if not control.revision:
        return ""
    wanted = ["paused" if control.paused else "not paused"]
    wanted += [f"{name} {value}" for name in SETTINGS if (value := getattr(control, name))]
    if control.cancel_revision == control.revision:
        wanted = ["cancel"]
    state = "requested, not applied yet"
    if rotation.applied_revision >= control.revision:
        state = "applied"
    elif rotation.status not in (Rotation.Status.RUNNING, Rotation.Status.QUEUED):
        state = "applies when the rotation is resumed"
    return (
        f"{', '.join(wanted)}: revision {control.revision} by {control.changed_by} at "
        f"{moment(control.changed_at)}, {state}"
    )


def rows_of(rotation: Rotation, noun: str = "") -> str:
    """Return the rows done and the total as text.

    Args:
        rotation: The rotation.
        noun: What follows the numbers, for a sentence.
    """
    rows = done_of_total(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)
    rows += noun
    rows += " that match the filter" if rotation.is_filtered else ""
    return f"{rows} (last known)" if is_silent(rotation) else rows


def percent_of_rotation(rotation: Rotation) -> int:
    """Return the percentage of rows done, rounded down."""
    if rotation.status == Rotation.Status.COMPLETED:
        return 100
    if rotation.bound is None and not rotation.rows_total:
        # The rows are not counted yet.
        return 0
    return percent_of(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)


def target_facts(rotation: Rotation, *, hides_keys: bool) -> list[tuple[str, str]]:
    """Return the target and the options as pairs of a label and a text."""
    return [
        ("target", f"{rotation.target} in database '{rotation.database}'"),
        ("table", rotation.table_name),
        ("chosen by", selection_text(rotation, hides_keys=hides_keys)),
        ("options", str(given_options(rotation.options, rotation.selection))),
    ]


def owner_facts(rotation: Rotation) -> list[tuple[str, str]]:
    """Return the owner and the times as pairs of a label and a text."""
    return [
        ("time", f"{duration(rotation.active_seconds)} over all runs"),
        ("owner", f"{owner_of(rotation)} since {moment(rotation.owned_since)}"),
        ("started", moment(rotation.started_at)),
        ("heartbeat", f"{moment(rotation.updated_at)}, {age_of(rotation)}"),
        ("finished", moment(rotation.finished_at) if rotation.finished_at else "not yet"),
        ("generation", str(rotation.generation)),
        ("version", rotation.version),
    ]


def age_of(rotation: Rotation) -> str:
    """Return the age of the last heartbeat."""
    return f"{duration(silent_seconds(rotation))} ago"
