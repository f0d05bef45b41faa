"""What the page shows of one rotation, as text and JSON types: the template and the script show the same."""

from collections import Counter
from contextlib import suppress
from datetime import timedelta
from typing import Final

from django.db.models import Count, Max

from rotator.apps import hides_keys
from rotator.events import ActionKind, Findings
from rotator.exceptions import TargetError
from rotator.fields.model import AnyField
from rotator.fields.target import find_fields
from rotator.management.motion import Motion, Speed, motion_of, speed_of
from rotator.management.rotation import (
    control_of,
    control_text,
    cursor_of,
    detail_of,
    facts_of,
    has_owner,
    ledger_of,
    owner_facts,
    percent_of_rotation,
    resume_command_of,
    rows_of,
    selection_text,
    shown,
    silent_seconds,
    status_of,
    stored,
    survivors_of,
    target_facts,
)
from rotator.models import Action, Measurement, Rotation, Span, Verification
from rotator.options import RunOptions, Selection
from rotator.postgres.measurements import CHART, GAP_SECONDS, HELD
from rotator.progress.chart import POINTS, Held, Point, draw
from rotator.progress.preflight import preflight_facts
from rotator.progress.text import (
    GUARD_EFFECTS,
    count,
    duration,
    moment,
    one_line,
    plural,
    rate,
    unconfirmed,
)

_LONGEST_LOG: Final = 50
_BANDS_SHOWN: Final = 60
_PAUSE: Final = "pause"
_MOST_CHARTS: Final = 20
# The chart of a rotation, with the measurement up to which it was drawn.
_charts: dict[tuple[str | None, int], tuple[object, dict[str, object]]] = {}

Facts = list[tuple[str, str]]


def page_state(rotation: Rotation) -> dict[str, object]:
    """Return all that the page shows of a rotation, from ``find_rotations()``, as JSON types."""
    actions = list(stored(Action, rotation).order_by("-pk")[:_LONGEST_LOG])
    latest = stored(Measurement, rotation).order_by("-at", "-pk").first()
    rotation.error = shown(rotation.error)
    speed = speed_of(rotation)
    motion = motion_of(rotation, speed, latest.state if latest else "", actions)
    control = control_of(rotation)
    return {
        "facts": _public_facts(rotation, speed),
        "tone": motion.tone,
        "percent": percent_of_rotation(rotation),
        "revision": control.revision,
        "is_paused": control.paused,
        "is_unfinished": rotation.status in Rotation.UNFINISHED,
        "can_answer": has_owner(rotation),
        "text": {
            "headline": motion.headline,
            "status": status_of(rotation),
            "since": _since(rotation, motion),
            "ends": motion.ends,
            "command": resume_command_of(rotation, hides_keys=hides_keys()),
            "requested": control_text(rotation),
            "percent": f"{percent_of_rotation(rotation)}%",
            "rows": rows_of(rotation),
            "rate": _rate(rotation, motion, speed),
            "eta": _eta(rotation, motion, speed),
        },
        "left_out": [one_line(each) for each in _left_out(rotation)],
        "server": _server_facts(rotation, latest, actions),
        "run": _run_facts(rotation),
        "log": [_line(each) for each in actions],
        "rejected": _rejected(rotation),
        "proof": _proof_facts(rotation),
        "preflight": _preflight_facts(rotation),
        "chart": _chart_through(rotation, latest),
    }


def _since(rotation: Rotation, motion: Motion) -> str:
    if motion.since is None:
        return ""
    now = rotation.updated_at + timedelta(seconds=silent_seconds(rotation))
    return f"Since {moment(motion.since)} ({duration(max(0.0, (now - motion.since).total_seconds()))})."


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


def _left_out(rotation: Rotation) -> list[str]:
    """Return a sentence for each kind of rows that "completed" does not include."""
    chosen = Selection.from_json(rotation.selection)
    left = []
    if chosen.is_filtered:
        kept = selection_text(rotation, hides_keys=hides_keys())
        left.append(f"Rows that the filter leaves out keep their values: {kept}")
    fields = _fields(rotation)
    if not chosen.include_null and any(field.null for field in fields):
        left.append("NULL stays NULL (no --include-null).")
    if not chosen.include_blank and any(field.empty_strings_allowed for field in fields):
        left.append("The empty text stays empty (no --include-blank).")
    if rotation.unconfirmed_rows:
        left.append(f"{unconfirmed(rotation.unconfirmed_rows)}.")
    return left or ["The options leave out no row."]


def _fields(rotation: Rotation) -> list[AnyField]:
    """Return the fields of the target, without those that could not be rotated any more."""
    found = list[AnyField]()
    for label in rotation.target.split():
        with suppress(TargetError):
            found += find_fields([label])
    return found


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


def _vacuums(rotation: Rotation, actions: list[Action]) -> str:
    """Return the number of VACUUM runs and the time of the latest, without a query if the log is short."""
    found = [each.at for each in actions if each.kind == ActionKind.VACUUMED]
    number, latest = len(found), max(found, default=None)
    if len(actions) == _LONGEST_LOG:
        runs = rotation.actions.filter(kind=ActionKind.VACUUMED)
        number, latest = runs.aggregate(number=Count("pk"), latest=Max("at")).values()
    return f"{plural(number, 'run')}, the latest {moment(latest)}" if latest else "no run"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _run_facts(rotation: Rotation) -> Facts:
    options = RunOptions.from_json(rotation.options)
    facts = [
        *target_facts(rotation, hides_keys=hides_keys()),
        (
            "limits",
            f"pace {options.pace}, {plural(options.concurrency, 'worker')}, {count(options.batch)} rows",
        ),
        *owner_facts(rotation),
    ]
    if rotation.error:
        facts.append(("error", one_line(rotation.error)))
    return facts


def _line(action: Action) -> tuple[str, str, str, str]:
    return (moment(action.at), action.kind, action.by, one_line(detail_of(action)))


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
    ledger = ledger_of(rotation)
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
    survivors = survivors_of(latest)
    known = "unknown" if survivors is None else f"{count(survivors)} in {plural(latest.rows, 'row')}"
    facts.append(("survivors", f"{known}, {moment(latest.finished_at)}"))
    facts.append(("verified", "yes" if latest.result.get("is_verified") else "no"))
    if survivors and latest.survivor_keys and not hides_keys():
        facts.append(("first survivors", ", ".join(map(str, latest.survivor_keys[:_LONGEST_LOG]))))
    return facts


def _preflight_facts(rotation: Rotation) -> Facts:
    findings = Findings.from_json(rotation.findings) if rotation.findings else None
    return preflight_facts(findings) if findings else []


def _public_facts(rotation: Rotation, speed: Speed) -> dict[str, object]:
    facts = facts_of(rotation) | {
        "rows_per_second": speed.rows_per_second and round(speed.rows_per_second, 1),
        "eta_seconds": speed.eta_seconds and round(speed.eta_seconds, 1),
    }
    if hides_keys():
        del facts["selection"]
    return facts


def _chart_through(rotation: Rotation, latest: Measurement | None) -> dict[str, object]:
    """Return the chart of a rotation, which changes only with its latest measurement."""
    if latest is None:
        return chart_of(rotation)
    key, through = (rotation._state.db, rotation.pk), (latest.pk, latest.at)  # noqa: SLF001 - documented by Django
    drawn_through, chart = _charts.get(key, (None, {}))
    if drawn_through != through:
        chart = chart_of(rotation)
        if len(_charts) >= _MOST_CHARTS:
            _charts.clear()
        _charts[key] = through, chart
    return chart


def chart_of(rotation: Rotation) -> dict[str, object]:
    """Return the chart of a rotation over all of its runs."""
    ordered = stored(Measurement, rotation).order_by("at").values_list("at")
    first, last = ordered.first(), ordered.last()
    if first is None or last is None:
        return draw([], [], began_at=rotation.started_at, ended_at=rotation.updated_at)
    span = max((last[0] - first[0]).total_seconds(), 1.0)
    with cursor_of(rotation) as cursor:
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
            Point(at, None if speed is None else float(speed), commit, baseline)
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
