"""A rotation as users see it: the same words and figures in the commands, in their JSON and on the page."""

import shlex
from dataclasses import dataclass
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
from rotator.models import Action, Rotation
from rotator.options import DEFAULT_OPTIONS, SETTINGS, Selection, given_options
from rotator.postgres.control import RECENT_RANGES
from rotator.progress.text import HIDDEN, done_of_total, duration, moment, stopped_by
from rotator.stats import RecentRate

AnyModel = TypeVar("AnyModel", bound=Model)

# About the checkpoints of the window of a rate.
# Some seconds of the smallest ranges: a rate needs two.
_RECENT_RANGES: Final = 4000


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


def stored(kind: type[AnyModel], rotation: Rotation) -> QuerySet[AnyModel]:
    """Return the rows of another table that belong to a rotation, from the database that it was read from."""
    # Not from the database that the project's routers choose to read from.
    return kind._default_manager.using(rotation._state.db).filter(rotation=rotation)


def cursor_of(rotation: Rotation) -> CursorWrapper:
    """Return a cursor of the database that a rotation was read from."""
    return connections[rotation._state.db or DEFAULT_DB_ALIAS].cursor()


def selection_text(rotation: Rotation, *, hides_keys: bool) -> str:
    """Return the options that choose the rows and their values; those of filters can be keys."""
    chosen = str(Selection.from_json(rotation.selection))
    if not hides_keys or chosen == DEFAULT_OPTIONS:
        return chosen
    words = shlex.split(chosen)
    return shlex.join(f"{word.partition('=')[0]}=…" if "=" in word else word for word in words)


def resume_command_of(rotation: Rotation, *, hides_keys: bool) -> str:
    """Return the command that resumes a rotation; empty where it is finished, or has an owner."""
    if not rotation.is_unfinished or rotation.has_owner:
        return ""
    words = ["python", "manage.py", "async_rotate", *rotation.target.split(), "--database", rotation.database]
    options = str(given_options(rotation.options, rotation.selection))
    for chosen in (selection_text(rotation, hides_keys=hides_keys), options):
        words += shlex.split(chosen) if chosen != DEFAULT_OPTIONS else []
    return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Speed:
    """The recent speed of a rotation; None while it is unknown.

    Attributes:
        eta_seconds: The time until every row is done.
        idle_seconds: The time since the last range.
    """

    rows_per_second: float | None = None
    eta_seconds: float | None = None
    idle_seconds: float | None = None


def speed_of(rotation: Rotation) -> Speed:
    """Return the recent speed, computed from the checkpoints as the run does from its ranges."""
    now = rotation.read_at.timestamp()
    recent, last = RecentRate(), None
    with cursor_of(rotation) as cursor:
        # Between two owners, no one worked on it.
        since = rotation.owned_since
        cursor.execute(RECENT_RANGES, {"rotation": rotation.pk, "since": since, "limit": _RECENT_RANGES})
        for at, rows, seconds in cursor.fetchall():
            last = min(float(at), now)
            recent.add(int(rows), now=last, seconds=seconds)
    if last is None:
        return Speed()
    left = rotation.rows_total - rotation.rows_done
    eta_seconds = recent.eta_seconds(left, now, is_exact=rotation.rows_total_is_exact)
    return Speed(recent.rows_per_second(now), eta_seconds, now - last)


def status_of(rotation: Rotation) -> str:
    """Return the status, or that a running rotation sends no heartbeat or is held."""
    if rotation.is_silent:
        return f"no heartbeat for {duration(rotation.silent_seconds)}"
    if rotation.held_by:
        return "paused" if rotation.control_row.paused else "throttled"
    return str(rotation.status)


def reason_of(rotation: Rotation) -> str:
    """Return the reason of a stop as a phrase; empty without one."""
    reason = StopReason(rotation.stop_reason) if rotation.stop_reason else None
    return stopped_by(reason, rotation.control_row.cancelled_by)


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
    control, ledger = rotation.control_row, rotation.ledger_row
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
        "percent": rotation.percent,
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
        "heartbeat_seconds_ago": round(rotation.silent_seconds, 3),
        "ledger": ledger.state if ledger else "",
        "guard": ledger.guard if ledger else "",
        "deferrals": rotation.deferrals,
        "retries": rotation.retries,
        "throttled_seconds": round(rotation.throttled_seconds, 3),
        "throttle_reason": rotation.held_by,
        "throttled_since": rotation.throttled_since and rotation.throttled_since.isoformat(),
        "control": {
            "revision": control.revision,
            "paused": control.paused,
            "pace": control.pace,
            "concurrency": control.concurrency,
            "batch": control.batch,
            "changed_by": control.changed_by,
            "changed_at": control.changed_at.isoformat() if control.revision else None,
            "applied_revision": rotation.applied_revision,
            "applied_at": rotation.applied_at and rotation.applied_at.isoformat(),
        },
    }


def control_text(rotation: Rotation) -> str:
    """Return the requests of users, and whether the owner has applied them; empty without any."""
    control = rotation.control_row
    if not control.revision:
        return ""
    wanted = ["paused" if control.paused else "not paused"]
    wanted += [f"{name} {value}" for name in SETTINGS if (value := getattr(control, name))]
    if control.cancel_revision == control.revision:
        wanted = ["cancel"]
    state = "requested, not applied yet"
    if rotation.applied_revision >= control.revision:
        state = "applied"
    elif not rotation.is_active:
        state = "applies when the rotation is resumed"
    return (
        f"{', '.join(wanted)}: revision {control.revision} by {control.changed_by} at "
        f"{moment(control.changed_at)}, {state}"
    )


def rows_of(rotation: Rotation, noun: str = "") -> str:
    """Return the rows done and the total as text, in a sentence with a noun after the numbers."""
    rows = done_of_total(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)
    rows += f"{noun} that match the filter" if rotation.is_filtered else noun
    return f"{rows} (last known)" if rotation.is_silent else rows


def target_facts(rotation: Rotation, *, hides_keys: bool) -> list[tuple[str, str]]:
    """Return the target and the options, each with its label."""
    return [
        ("target", f"{rotation.target} in database '{rotation.database}'"),
        ("table", rotation.table_name),
        ("chosen by", selection_text(rotation, hides_keys=hides_keys)),
        ("options", str(given_options(rotation.options, rotation.selection))),
    ]


def owner_facts(rotation: Rotation) -> list[tuple[str, str]]:
    """Return the owner and the times, each with its label."""
    return [
        ("time", f"{duration(rotation.active_seconds)} over all runs"),
        ("owner", f"{rotation.owner} since {moment(rotation.owned_since)}"),
        ("started", moment(rotation.started_at)),
        ("heartbeat", f"{moment(rotation.updated_at)}, {age_of(rotation)}"),
        ("finished", moment(rotation.finished_at) if rotation.finished_at else "not yet"),
        ("generation", str(rotation.generation)),
        ("version", rotation.version),
    ]


def age_of(rotation: Rotation) -> str:
    """Return the age of the last heartbeat."""
    return f"{duration(rotation.silent_seconds)} ago"
