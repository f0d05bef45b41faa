"""What the page shows of one rotation, as text and JSON types: the template and the script show the same."""

import shlex
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from django.apps import apps
from django.core.exceptions import FieldDoesNotExist
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.utils import CursorWrapper
from django.db.models import Field

from rotator.events import ActionKind, StopReason
from rotator.management.rotation import (
    age_of,
    control_of,
    facts_of,
    held_by,
    is_dead,
    is_silent,
    owner_of,
    percent_of_rotation,
    reason_of,
    rows_of,
    silent_seconds,
    status_of,
)
from rotator.models import Action, Helper, Measurement, Rotation, Span
from rotator.options import SETTINGS, RunOptions, Selection
from rotator.postgres.measurements import CHART, GAP_SECONDS, HELD, RECENT_RANGES
from rotator.progress.chart import POINTS, Held, Point, draw
from rotator.progress.text import ACTIVITIES, count, duration, moment, one_line, plural, rate, unconfirmed
from rotator.stats import RecentRate, State

# About the checkpoints of the window of a rate.
_RECENT_RANGES: Final = 1000
_LONGEST_LOG: Final = 50
_BANDS_SHOWN: Final = 60
_STALL_SECONDS: Final = 10.0
_HIDDEN: Final = "(hidden: it can contain keys)"
_PAUSE: Final = "pause"

Facts = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Whether a rotation moves, and if not, why and what ends that.

    Attributes:
        tone: ``moving``, ``held``, ``stopped``, ``done`` or ``problem``.
        headline: One sentence.
        since: The time since which this is so; None where it moves.
        ends: What ends it; empty where it moves.
        is_ownerless: Whether no process works on an unfinished rotation.
    """

    tone: str
    headline: str
    since: datetime | None = None
    ends: str = ""
    is_ownerless: bool = False


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
    with _cursor(rotation) as cursor:
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
        is_filtered = Selection.from_json(rotation.selection).is_filtered
        headline = "Completed for the rows that match the filter" if is_filtered else "Completed"
        if rotation.unconfirmed_rows:
            headline += f", {plural(rotation.unconfirmed_rows, 'row')} not confirmed"
        return Motion(tone="done", headline=headline, since=rotation.finished_at)
    if rotation.status == Rotation.Status.ABANDONED:
        return Motion(tone="stopped", headline="Abandoned: it is never resumed", since=rotation.finished_at)
    why = reason_of(rotation) or rotation.error.rstrip(".") or f"it is {rotation.status}"
    return Motion(
        tone="problem" if rotation.status == Rotation.Status.FAILED else "stopped",
        headline=f"Not moving: {rotation.status}, {why}",
        since=rotation.updated_at,
        ends="No process works on it. The same command resumes it.",
        is_ownerless=True,
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
            is_ownerless=True,
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
    if activity := _activity(state):
        return Motion(tone="moving", headline=f"Moving: {activity}")
    if speed.silent_seconds is not None and speed.silent_seconds > _STALL_SECONDS:
        return Motion(
            tone="held",
            headline=f"Not moving: no range was committed for {duration(speed.silent_seconds)}",
            since=rotation.updated_at - timedelta(seconds=speed.silent_seconds),
            ends="Its process is alive. Other sessions may hold locks: look at its output.",
        )
    if speed.rows_per_second is None:
        return Motion(tone="moving", headline="Starting: the rate is not known yet")
    return Motion(tone="moving", headline=f"Moving: {rate(speed.rows_per_second)} rows/s")


def _activity(state: str) -> str:
    known: dict[State, str] = {
        **ACTIVITIES,
        "late_commits": "waiting for older transactions",
    }
    return next((text for name, text in known.items() if name == state), "")


def page_state(rotation: Rotation, *, hide_keys: bool) -> dict[str, object]:
    """Return all that the page shows of a rotation, as JSON types without values of the column.

    Args:
        rotation: The rotation, from ``find_rotations()``.
        hide_keys: Whether to leave out what can contain keys of rows.
    """
    database = _database(rotation)
    actions = list(Action.objects.using(database).filter(rotation=rotation).order_by("-pk")[:_LONGEST_LOG])
    latest = Measurement.objects.using(database).filter(rotation=rotation).order_by("-at", "-pk").first()
    if hide_keys and rotation.error:
        rotation.error = _HIDDEN
    speed = speed_of(rotation)
    motion = motion_of(rotation, speed, latest.state if latest else "", actions)
    control = control_of(rotation)
    return {
        "facts": _public_facts(rotation, speed, hide_keys=hide_keys),
        "tone": motion.tone,
        "percent": percent_of_rotation(rotation),
        "revision": control.revision,
        "is_paused": control.paused,
        "is_unfinished": rotation.status in Rotation.UNFINISHED,
        "can_answer": not motion.is_ownerless and rotation.status in ("running", "queued"),
        "text": {
            "headline": motion.headline,
            "status": status_of(rotation),
            "since": _since(rotation, motion),
            "ends": motion.ends,
            "command": _command(rotation, hide_keys=hide_keys) if motion.is_ownerless else "",
            "requested": _requested(rotation),
            "percent": f"{percent_of_rotation(rotation)}%",
            "rows": f"{rows_of(rotation)} rows",
            "rate": _rate(rotation, motion, speed),
            "eta": _eta(rotation, motion, speed),
        },
        "left_out": [one_line(each) for each in _left_out(rotation, hide_keys=hide_keys)],
        "server": _server_facts(rotation, latest),
        "run": _run_facts(rotation, hide_keys=hide_keys),
        "log": [_line(each, hide_keys=hide_keys) for each in actions],
        "rejected": [] if hide_keys else _rejected(rotation),
        "chart": chart_of(rotation),
    }


def _since(rotation: Rotation, motion: Motion) -> str:
    if motion.since is None:
        return ""
    now = rotation.updated_at + timedelta(seconds=silent_seconds(rotation))
    return f"since {moment(motion.since)} ({duration(max(0.0, (now - motion.since).total_seconds()))})"


def _rate(rotation: Rotation, motion: Motion, speed: Speed) -> str:
    if rotation.status == Rotation.Status.COMPLETED and rotation.active_seconds:
        return f"{rate(rotation.rows_done / rotation.active_seconds)} rows/s on average"
    if motion.tone != "moving" or speed.rows_per_second is None:
        return "unknown" if motion.tone == "moving" else "0 rows/s"
    return f"{rate(speed.rows_per_second)} rows/s"


def _eta(rotation: Rotation, motion: Motion, speed: Speed) -> str:
    if rotation.status == Rotation.Status.COMPLETED:
        return "completed"
    if motion.tone != "moving" or speed.eta_seconds is None:
        return "unknown"
    return f"{duration(speed.eta_seconds)} at the current rate"


def _requested(rotation: Rotation) -> str:
    """Return the latest request of a user, and whether it was applied."""
    control = control_of(rotation)
    if not control.revision:
        return ""
    wanted = ["paused" if control.paused else "not paused"]
    wanted += [f"{name} {value}" for name in SETTINGS if (value := getattr(control, name))]
    if control.cancel_revision == control.revision:
        wanted = ["cancel"]
    is_applied = rotation.applied_revision >= control.revision
    state = "applied" if is_applied else "requested, not applied yet"
    if not is_applied and rotation.status not in ("running", "queued"):
        state = "applies when the rotation is resumed"
    return f"{', '.join(wanted)}: revision {control.revision} by {control.changed_by}, {state}"


def _left_out(rotation: Rotation, *, hide_keys: bool = False) -> list[str]:
    """Return a sentence for each kind of rows that "completed" does not include."""
    chosen = Selection.from_json(rotation.selection)
    left = []
    if chosen.is_filtered:
        words = _selection(chosen, hide_keys=hide_keys)
        left.append(f"Rows that the filter leaves out keep their values: {words}")
    fields = _fields(rotation)
    if not chosen.include_null and any(field.null for field in fields):
        left.append("NULL stays NULL (no --include-null).")
    if not chosen.include_blank and any(field.empty_strings_allowed for field in fields):
        left.append("The empty text stays empty (no --include-blank).")
    if rotation.unconfirmed_rows:
        left.append(f"{unconfirmed(rotation.unconfirmed_rows)}.")
    return left or ["The options leave out no row."]


def _fields(rotation: Rotation) -> "list[Field[Any, Any]]":
    """Return the fields of the target, without those that the project has no more."""
    found = []
    for label in rotation.target.split():
        model, _, name = label.rpartition(".")
        with suppress(LookupError, ValueError, FieldDoesNotExist):
            field = apps.get_model(model)._meta.get_field(name)
            found += [field] if isinstance(field, Field) else []
    return found


def _selection(chosen: Selection, *, hide_keys: bool) -> str:
    words = shlex.split(str(chosen))
    # The value of a filter may be a key.
    return shlex.join(f"{word.partition('=')[0]}=…" if hide_keys and "=" in word else word for word in words)


def _server_facts(rotation: Rotation, latest: Measurement | None) -> Facts:
    facts = [
        ("throttled or paused", f"{duration(rotation.throttled_seconds)} over all runs"),
        ("deferrals", f"{count(rotation.deferrals)} (rows locked by other sessions)"),
        ("retries", count(rotation.retries)),
        ("late rows", count(rotation.late_rows)),
    ]
    if latest is None or rotation.status != Rotation.Status.RUNNING:
        return facts
    if latest.waiting_sessions is not None:
        facts.append(("sessions that wait for us", count(latest.waiting_sessions)))
    if latest.commit_seconds is not None:
        baseline = latest.baseline_seconds
        without = f", {_milliseconds(baseline)} without the rotation" if baseline is not None else ""
        facts.append(("commit, p90", f"{_milliseconds(latest.commit_seconds)}{without}"))
    facts += [(f"lag of {alias}", duration(lag)) for alias, lag in sorted(latest.replica_lags.items())]
    if latest.horizon_holders:
        facts.append(("VACUUM waits for", "; ".join(latest.horizon_holders)))
    facts.append(("workers that may write", count(latest.workers)))
    return facts


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _run_facts(rotation: Rotation, *, hide_keys: bool) -> Facts:
    options = RunOptions.from_json(rotation.options)
    facts = [
        ("target", f"{rotation.target} in database '{rotation.database}'"),
        ("table", rotation.table_name),
        ("chosen by", _selection(Selection.from_json(rotation.selection), hide_keys=hide_keys)),
        (
            "options",
            f"pace {options.pace}, {plural(options.concurrency, 'worker')}, {count(options.batch)} rows",
        ),
        ("time", f"{duration(rotation.active_seconds)} over all runs"),
        ("owner", f"{owner_of(rotation)} since {moment(rotation.owned_since)}"),
        ("heartbeat", f"{moment(rotation.updated_at)}, {age_of(rotation)}"),
        ("started", moment(rotation.started_at)),
        ("finished", moment(rotation.finished_at) if rotation.finished_at else "not yet"),
        ("generation", str(rotation.generation)),
        ("version", rotation.version),
    ]
    if rotation.error:
        facts.append(("error", one_line(rotation.error)))
    return facts


def _line(action: Action, *, hide_keys: bool) -> tuple[str, str, str, str]:
    known = {*StopReason, "interrupted", "failed", "queued", ""}
    is_shown = not hide_keys or action.kind != ActionKind.STOPPED or action.detail in known
    return (moment(action.at), action.kind, action.by, one_line(action.detail) if is_shown else _HIDDEN)


def _rejected(rotation: Rotation) -> list[tuple[str, str]]:
    """Return the keys of rejected rows, each with the reason: those of the latest run, and of open spans."""
    database = _database(rotation)
    spans = Span.objects.using(database).filter(rotation=rotation).exclude(failed_keys=[])
    found = spans.values_list("failed_keys", flat=True)[:_LONGEST_LOG]
    keys = [each for failed in (rotation.rejected_keys, *found) for each in failed]
    return [(str(key), one_line(str(reason))) for key, reason in keys[:_LONGEST_LOG]]


def _public_facts(rotation: Rotation, speed: Speed, *, hide_keys: bool) -> dict[str, object]:
    facts = facts_of(rotation) | {
        "rows_per_second": speed.rows_per_second and round(speed.rows_per_second, 1),
        "eta_seconds": speed.eta_seconds and round(speed.eta_seconds, 1),
    }
    if hide_keys:
        del facts["selection"]
    return facts


def _command(rotation: Rotation, *, hide_keys: bool) -> str:
    """Return the command that resumes a rotation."""
    chosen, options = Selection.from_json(rotation.selection), RunOptions.from_json(rotation.options)
    words = ["python", "manage.py", "async_rotate", *rotation.target.split()]
    words += ["--database", rotation.database]
    if chosen != Selection():
        words += shlex.split(_selection(chosen, hide_keys=hide_keys))
    for name in ("concurrency", "batch", "pace"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value != getattr(RunOptions(), name) else []
    if options.max_lag_seconds is not None:
        words += ["--max-lag", f"{options.max_lag_seconds:g}s"]
        words += [word for alias in options.lag_of for word in ("--lag-of", alias)]
    sizes = {
        "max-unarchived-wal": options.max_unarchived_wal_bytes,
        "max-slot-wal": options.max_slot_wal_bytes,
    }
    words += [
        word
        for name, size in sizes.items()
        if size is not None
        for word in (f"--{name}", f"{size // 1024}kB")
    ]
    words += ["--prove"] if options.prove else []
    words += ["--guard", options.guard] if options.guard else []
    words += [] if options.vacuum else ["--no-vacuum"]
    words += ["--reindex"] if options.reindex else []
    database = _database(rotation)
    if Helper.objects.using(database).filter(rotation=rotation).exists():
        words.append("--celery")
    return shlex.join(words)


def chart_of(rotation: Rotation) -> dict[str, object]:
    """Return the chart of a rotation over all of its runs."""
    database = _database(rotation)
    ordered = Measurement.objects.using(database).filter(rotation=rotation).order_by("at").values_list("at")
    first, last = ordered.first(), ordered.last()
    if first is None or last is None:
        return draw([], [], began_at=rotation.started_at, ended_at=rotation.updated_at)
    span = max((last[0] - first[0]).total_seconds(), 1.0)
    with _cursor(rotation) as cursor:
        cursor.execute(
            CHART,
            {
                "rotation": rotation.pk,
                "began_at": first[0],
                "span": span,
                "points": POINTS,
                "gap": GAP_SECONDS,
            },
        )
        points = [
            Point(
                at=at,
                rows_per_second=None if speed is None else float(speed),
                commit_seconds=commit,
                baseline_seconds=baseline,
            )
            for at, speed, commit, baseline in cursor.fetchall()
        ]
        cursor.execute(
            HELD,
            {
                "rotation": rotation.pk,
                "gap": GAP_SECONDS,
                "limit": _BANDS_SHOWN,
            },
        )
        held = [
            Held(names=_names(names), began_at=began_at, ended_at=ended_at)
            for names, began_at, ended_at in cursor.fetchall()
        ]
    return draw(points, held[::-1], began_at=first[0], ended_at=last[0])


def _names(stored: str) -> str:
    return ", ".join("paused" if name == _PAUSE else name for name in stored.split("\n"))


def _cursor(rotation: Rotation) -> CursorWrapper:
    return connections[_database(rotation)].cursor()


def _database(rotation: Rotation) -> str:
    """Return Django's alias of the database that the rotation was read from."""
    return rotation._state.db or DEFAULT_DB_ALIAS  # noqa: SLF001 - documented by Django
