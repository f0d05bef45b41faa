"""What the page shows of one rotation, as text and JSON types: the template and the script show the same."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from django.db.models import Count, Max

from rotator.apps import hides_keys
from rotator.events import ActionKind, Findings
from rotator.exceptions import TargetError
from rotator.fields.target import find_fields
from rotator.management.rotation import (
    Speed,
    control_text,
    cursor_of,
    detail_of,
    facts_of,
    owner_facts,
    reason_of,
    resume_command_of,
    rows_of,
    selection_text,
    shown,
    speed_of,
    status_of,
    stored,
    target_facts,
)
from rotator.models import Action, Measurement, Rotation, Span, Verification
from rotator.options import RunOptions, Selection
from rotator.postgres.control import CHART, GAP_SECONDS, HELD
from rotator.progress.chart import POINTS, Held, Point, draw
from rotator.progress.preflight import preflight_facts
from rotator.progress.text import (
    ACTIVITIES,
    GUARD_EFFECTS,
    count,
    duration,
    moment,
    one_line,
    plural,
    rate,
    unconfirmed,
)
from rotator.stats import STALL_SECONDS

_LONGEST_LOG: Final = 50
_BANDS_SHOWN: Final = 60
_MOST_CHARTS: Final = 20
_ACTIVITIES: Final = dict[str, str](ACTIVITIES.items()) | {"late_commits": "waiting for older transactions"}
# The chart of a rotation, with the measurement up to which it was drawn.
_charts: dict[tuple[str | None, int], tuple[object, dict[str, object]]] = {}

Facts = list[tuple[str, str]]


def page_state(rotation: Rotation) -> dict[str, object]:
    """Return all that the page shows of a rotation, from ``find_rotations()``, as JSON types."""
    actions = list(stored(Action, rotation).order_by("-pk")[:_LONGEST_LOG])
    latest = stored(Measurement, rotation).order_by("-at", "-pk").first()
    rotation.error = shown(rotation.error)
    findings = Findings.from_json(rotation.findings) if rotation.findings else None
    speed = speed_of(rotation)
    motion = _motion_of(rotation, speed, latest.state if latest else "", actions)
    return {
        "facts": _public_facts(rotation, speed),
        "tone": motion.tone,
        "percent": rotation.percent,
        "revision": rotation.control_row.revision,
        "is_paused": rotation.control_row.paused,
        "is_unfinished": rotation.is_unfinished,
        "can_answer": rotation.has_owner,
        "text": {
            "headline": motion.headline,
            "status": status_of(rotation),
            "since": _since(rotation, motion),
            "ends": motion.ends,
            "command": resume_command_of(rotation, hides_keys=hides_keys()),
            "requested": control_text(rotation),
            "percent": f"{rotation.percent}%",
            "rows": rows_of(rotation),
            "rate": _rate(rotation, motion, speed),
            "eta": _eta(rotation, motion, speed),
        },
        "left_out": [one_line(each) for each in _left_out(rotation)],
        "server": _server_facts(rotation, latest, actions),
        "run": _run_facts(rotation),
        "log": [(moment(each.at), each.kind, each.by, one_line(detail_of(each))) for each in actions],
        "rejected": _rejected(rotation),
        "proof": _proof_facts(rotation),
        "preflight": preflight_facts(findings) if findings else [],
        "chart": _chart(rotation, latest),
    }


# --- Whether it moves ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Motion:
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


def _motion_of(rotation: Rotation, speed: Speed, state: str, actions: list[Action]) -> _Motion:
    """Return whether the rotation moves, by what its owner does and by its log, the latest first."""
    status, updated_at = rotation.status, rotation.updated_at
    if status == Rotation.Status.RUNNING:
        return _motion_of_running(rotation, speed, state, actions)
    if status == Rotation.Status.QUEUED:
        ends = "The next free Celery worker continues it."
        return _Motion("held", "Not moving: waiting for a worker", updated_at, ends)
    if status == Rotation.Status.COMPLETED:
        headline = "Completed for the rows that match the filter" if rotation.is_filtered else "Completed"
        if rotation.unconfirmed_rows:
            headline += f", {plural(rotation.unconfirmed_rows, 'row')} not confirmed"
        return _Motion("done", headline, rotation.finished_at)
    if status == Rotation.Status.ABANDONED:
        return _Motion("stopped", "Abandoned: it is never resumed", rotation.finished_at)
    reason = reason_of(rotation)
    why = f"{rotation.error.rstrip('.')}. " if rotation.error and not reason else ""
    return _Motion(
        "problem" if status == Rotation.Status.FAILED else "stopped",
        f"Not moving: {status}{f', {reason}' if reason else ''}",
        updated_at,
        f"{why}No process works on it. The same command resumes it.",
    )


def _motion_of_running(  # noqa: PLR0911 - one result for each reason
    rotation: Rotation, speed: Speed, state: str, actions: list[Action]
) -> _Motion:
    if not rotation.has_owner:
        owner = rotation.owner
        cause = f"The process of {owner} has ended." if owner.is_gone() else f"{owner} does not answer."
        return _Motion(
            "problem",
            f"Not moving: no heartbeat for {duration(rotation.silent_seconds)}",
            rotation.updated_at,
            f"{cause} If no process works on it, the same command resumes it.",
        )
    if held := rotation.held_by:
        since = rotation.throttled_since
        if rotation.control_row.paused:
            since = next((each.at for each in actions if each.kind == ActionKind.PAUSED), since)
            return _Motion("held", f"Not moving: {held}", since, "Resume ends the pause.")
        return _Motion("held", f"Not moving: throttled by {held}", since, "The rotation continues by itself.")
    if activity := _ACTIVITIES.get(state):
        return _Motion("moving", f"Moving: {activity}")
    if speed.idle_seconds is not None and speed.idle_seconds > STALL_SECONDS:
        return _Motion(
            "held",
            f"Not moving: no range was committed for {duration(speed.idle_seconds)}",
            rotation.updated_at - timedelta(seconds=speed.idle_seconds),
            "Its process is alive. Other sessions may hold locks: look at its output.",
        )
    if speed.rows_per_second is None:
        return _Motion("moving", "Starting: the rate is not known yet")
    return _Motion("moving", f"Moving: {rate(speed.rows_per_second)} rows/s")


def _since(rotation: Rotation, motion: _Motion) -> str:
    if motion.since is None:
        return ""
    seconds = max(0.0, (rotation.read_at - motion.since).total_seconds())
    return f"Since {moment(motion.since)} ({duration(seconds)})."


def _rate(rotation: Rotation, motion: _Motion, speed: Speed) -> str:
    if rotation.status == Rotation.Status.COMPLETED and rotation.active_seconds:
        return f"{rate(rotation.rows_done / rotation.active_seconds)} rows/s on average"
    if motion.tone != "moving" or speed.rows_per_second is None:
        return "unknown" if motion.tone == "moving" else "0 rows/s"
    return f"{rate(speed.rows_per_second)} rows/s"


def _eta(rotation: Rotation, motion: _Motion, speed: Speed) -> str:
    if rotation.status == Rotation.Status.COMPLETED:
        return "completed"
    if motion.tone != "moving" or speed.eta_seconds is None:
        return "unknown"
    return f"{duration(speed.eta_seconds)} at the current rate"


def _left_out(rotation: Rotation) -> list[str]:
    """Return a sentence for each kind of rows that "completed" does not include."""
    chosen = Selection.from_json(rotation.selection)
    left = []
    if chosen.is_filtered:
        kept = selection_text(rotation, hides_keys=hides_keys())
        left.append(f"Rows that the filter leaves out keep their values: {kept}")
    fields = []
    for label in rotation.target.split():
        # A later version of the project may not have it, or not be able to rotate it.
        with suppress(TargetError):
            fields += find_fields([label])
    if not chosen.include_null and any(field.null for field in fields):
        left.append("NULL stays NULL (no --include-null).")
    if not chosen.include_blank and any(field.empty_strings_allowed for field in fields):
        left.append("The empty string stays empty (no --include-blank).")
    if rotation.unconfirmed_rows:
        left.append(f"{unconfirmed(rotation.unconfirmed_rows)}.")
    return left or ["The options leave out no row."]


def _server_facts(rotation: Rotation, latest: Measurement | None, actions: list[Action]) -> Facts:
    facts = [
        ("throttled or paused", f"{duration(rotation.throttled_seconds)} over all runs"),
        ("deferrals", f"{count(rotation.deferrals)} (rows locked by other sessions)"),
        ("retries", count(rotation.retries)),
        ("late rows", count(rotation.late_rows)),
        ("VACUUM", _vacuums(rotation, actions)),
    ]
    if latest is None or rotation.status != Rotation.Status.RUNNING:
        return facts
    if latest.waiting_sessions is not None:
        facts.append(("sessions that wait for ranges", count(latest.waiting_sessions)))
    if latest.commit_seconds is not None:
        baseline = latest.baseline_seconds
        without = f", {_milliseconds(baseline)} without the rotation" if baseline is not None else ""
        facts.append(("commit, p90", f"{_milliseconds(latest.commit_seconds)}{without}"))
    facts += [(f"lag of {alias}", duration(lag)) for alias, lag in sorted(latest.replica_lags.items())]
    if latest.horizon_holders:
        facts.append(("VACUUM waits for", "; ".join(latest.horizon_holders)))
    facts.append(("workers that may write", count(latest.workers)))
    return facts


def _vacuums(rotation: Rotation, actions: list[Action]) -> str:
    """Return the number of VACUUM runs and the time of the latest, without a query if the log is short."""
    found = [each.at for each in actions if each.kind == ActionKind.VACUUMED]
    number, latest = len(found), max(found, default=None)
    if len(actions) == _LONGEST_LOG:
        runs = stored(Action, rotation).filter(kind=ActionKind.VACUUMED)
        number, latest = runs.aggregate(number=Count("pk"), latest=Max("at")).values()
    return f"{plural(number, 'run')}, the latest {moment(latest)}" if latest else "no run"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _run_facts(rotation: Rotation) -> Facts:
    options = RunOptions.from_json(rotation.options)
    workers = plural(options.concurrency, "worker")
    facts = target_facts(rotation, hides_keys=hides_keys())
    facts.append(("limits", f"pace {options.pace}, {workers}, {count(options.batch)} rows"))
    facts += owner_facts(rotation)
    if rotation.error:
        facts.append(("error", one_line(rotation.error)))
    return facts


def _rejected(rotation: Rotation) -> list[tuple[str, str]]:
    """Return the keys of rejected rows, each with the reason: those of the latest run, and of open spans."""
    spans = stored(Span, rotation).exclude(failed_keys=[])
    found = spans.values_list("failed_keys", flat=True)[:_LONGEST_LOG]
    keys = [each for failed in (rotation.rejected_keys, *found) for each in failed]
    if hides_keys():
        reasons = Counter(str(reason) for _, reason in keys)
        return [(plural(number, "row"), one_line(reason)) for reason, number in reasons.most_common()]
    return [(str(key), one_line(str(reason))) for key, reason in keys[:_LONGEST_LOG]]


def _proof_facts(rotation: Rotation) -> Facts:
    """Return the ledger, the guard and the survivors; empty without a ledger."""
    ledger = rotation.ledger_row
    if ledger is None:
        return []
    facts = [
        ("ledger", f"{ledger.state}, {plural(ledger.entries, 'entry')}"),
        ("guard", GUARD_EFFECTS.get(ledger.guard, "no guard")),
    ]
    latest = stored(Verification, rotation).order_by("-pk").first()
    if latest is None:
        return [*facts, ("survivors", "not searched yet")]
    if latest.finished_at is None:
        found = f"{count(latest.survivors)} in {plural(latest.rows, 'row')}"
        return [*facts, ("survivors", f"{found} so far, since {moment(latest.started_at)}")]
    survivors = latest.proved_survivors
    known = "unknown" if survivors is None else f"{count(survivors)} in {plural(latest.rows, 'row')}"
    facts.append(("survivors", f"{known}, {moment(latest.finished_at)}"))
    facts.append(("verified", "yes" if latest.result.get("is_verified") else "no"))
    if survivors and latest.survivor_keys and not hides_keys():
        facts.append(("first survivors", ", ".join(map(str, latest.survivor_keys[:_LONGEST_LOG]))))
    return facts


def _public_facts(rotation: Rotation, speed: Speed) -> dict[str, object]:
    facts = facts_of(rotation) | {
        "rows_per_second": speed.rows_per_second and round(speed.rows_per_second, 1),
        "eta_seconds": speed.eta_seconds and round(speed.eta_seconds, 1),
    }
    if hides_keys():
        del facts["selection"]
    return facts


# --- The chart -----------------------------------------------------------------------------------------


def _chart(rotation: Rotation, latest: Measurement | None) -> dict[str, object]:
    """Return the chart of a rotation, which changes only with its latest measurement."""
    key, through = (rotation._state.db, rotation.pk), latest and (latest.pk, latest.at)
    drawn_through, chart = _charts.get(key, (None, {}))
    if latest is None or drawn_through != through:
        chart = _drawn(rotation)
        if len(_charts) >= _MOST_CHARTS:
            _charts.clear()
        _charts[key] = through, chart
    return chart


def _drawn(rotation: Rotation) -> dict[str, object]:
    """Return the chart of a rotation over all of its runs."""
    ordered = stored(Measurement, rotation).order_by("at").values_list("at", flat=True)
    first, last = ordered.first(), ordered.last()
    if first is None or last is None:
        return draw([], [], began_at=rotation.started_at, ended_at=rotation.updated_at)
    facts: dict[str, Any] = {
        "rotation": rotation.pk,
        "began_at": first,
        "span": max((last - first).total_seconds(), 1.0),
        "points": POINTS,
        "gap": GAP_SECONDS,
        "limit": _BANDS_SHOWN,
    }
    with cursor_of(rotation) as cursor:
        cursor.execute(CHART, facts)
        points = [
            Point(at, None if speed is None else float(speed), commit, baseline)
            for at, speed, commit, baseline in cursor.fetchall()
        ]
        cursor.execute(HELD, facts)
        held = [
            Held(names=_names(names), began_at=began_at, ended_at=ended_at)
            for names, began_at, ended_at in reversed(cursor.fetchall())
        ]
    return draw(points, held, began_at=first, ended_at=last)


def _names(held_by: str) -> str:
    return ", ".join("paused" if name == "pause" else name for name in held_by.split("\n"))
