import io
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

from rotator.events import (
    DrainStarted,
    Event,
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    LedgerProgressed,
    OutageEnded,
    OutageStarted,
    OwnerWatched,
    Preflighted,
    RangeCompleted,
    RangeDeferred,
    RangeRetried,
    RotationStarted,
    RotationStopped,
    RowRejected,
    StopReason,
    Tick,
    VerificationProgressed,
    WorkersProgressed,
)
from rotator.progress.lines import JsonObserver, event_name
from rotator.progress.summary import report
from rotator.ranges import Key
from tests.unit.progress_fakes import Clock, completed, resumed, started, stopped

NOON = datetime(2026, 3, 1, 13, 0, 0, 123_456, tzinfo=timezone(timedelta(hours=1)))
AT = "2026-03-01T12:00:00.123+00:00"


def observe(clock: Clock) -> tuple[io.StringIO, JsonObserver]:
    stream = io.StringIO()
    return stream, JsonObserver(stream, clock=clock, wall_clock=lambda: NOON)


def told(*events: Event) -> list[dict[str, Any]]:
    stream, observer = observe(Clock())
    for event in events:
        observer(event)
    return parsed(stream)


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_start_tells_what_will_be_done() -> None:
    assert told(started()) == [
        {
            "event": "started",
            "at": AT,
            "rotation": 7,
            "target": "tickets.Ticket.token",
            "rows_total": 1_000_000,
            "rows_total_is_exact": True,
            "rows_done": 0,
            "late_rows": 0,
            "seconds_before": 0.0,
            "stopped_at": None,
            "concurrency": 4,
            "batch": 2000,
            "deferrals_before": 0,
            "retries_before": 0,
            "throttled_seconds_before": 0.0,
            "pace": "balanced",
            "resumed": False,
        }
    ]


def test_a_resumed_start_tells_when_it_stopped() -> None:
    (line,) = told(resumed())
    assert line["resumed"] is True
    assert line["stopped_at"] == "2026-03-01T12:03:05.000+00:00"
    assert datetime.fromisoformat(line["stopped_at"]).tzinfo == UTC


def test_progress_comes_once_a_second_with_the_figures() -> None:
    clock = Clock()
    stream, observer = observe(clock)
    observer(started())
    observer(RangeDeferred(rows=2000))
    observer(RangeRetried(rows=2000, reason="deadlock_detected", split=False))
    for step in range(1, 401):
        clock.now = step / 100
        observer(completed(rows=200, seconds=0.01))
        observer(Tick())
    lines = [line for line in parsed(stream) if line["event"] == "progress"]
    assert len(lines) == 4
    assert lines[0]["rows_per_second"] is None
    assert lines[0]["eta_seconds"] is None
    assert 19_000 < lines[-1].pop("rows_per_second") < 21_000
    assert 43 < lines[-1].pop("eta_seconds") < 51
    assert lines[-1] == {
        "event": "progress",
        "at": AT,
        "rotation": 7,
        "state": "rotating",
        "rows_done": 80_000,
        "rows_total": 1_000_000,
        "rows_total_is_exact": True,
        "percent": 8,
        "late_rows": 0,
        "deferrals": 1,
        "retries": 1,
        "rejected_rows": 0,
        "outage_left_seconds": None,
        "lock_holders": [],
        "pace": None,
        "throttles": {},
        "throttled_seconds": {},
    }


def test_each_notable_event_has_its_name_and_its_facts() -> None:
    head = {"at": AT, "rotation": None}
    assert told(
        OwnerWatched(owner="app on db1, pid 42", seconds=10),
        OutageStarted(reason="refused", budget_seconds=300),
        OutageEnded(seconds=12, rows_done=410_000, late_rows=12),
        LateCommitsAwaited(holders=("pid 1", "pid 2")),
        LateCommitsOver(),
        LateRowsRotated(rows=12),
        RowRejected(key=Key("[42]"), reason="check_violation"),
        DrainStarted(reason=StopReason.SIGINT),
    ) == [
        head | {"event": "owner_watched", "owner": "app on db1, pid 42", "seconds": 10},
        head | {"event": "outage_started", "reason": "refused", "budget_seconds": 300},
        head | {"event": "outage_ended", "seconds": 12, "rows_done": 410_000, "late_rows": 12},
        head | {"event": "late_commits_awaited", "holders": ["pid 1", "pid 2"]},
        head | {"event": "late_commits_over"},
        head | {"event": "late_rows_rotated", "rows": 12},
        head | {"event": "row_rejected", "key": "[42]", "reason": "check_violation"},
        head | {"event": "drain_started", "reason": "SIGINT", "by": ""},
    ]


def test_the_names_of_all_other_events_are_an_interface() -> None:
    special = {
        Preflighted,
        RotationStarted,
        RangeCompleted,
        WorkersProgressed,
        RangeDeferred,
        RangeRetried,
        LedgerProgressed,
        VerificationProgressed,
        Tick,
        RotationStopped,
    }
    names = (
        "row_rejected outage_started outage_ended broker_unreachable workers_silent owner_watched "
        "server_log_shows_values late_commits_awaited late_commits_over late_rows_rotated "
        "confirmation_started rows_confirmed vacuum_started vacuumed vacuum_skipped analyzed "
        "analyze_skipped reindex_started index_rebuilt reindex_skipped receiver_failed "
        "limit_raised lock_held pace_changed throttled throttle_ended limits_changed horizon_held "
        "drain_started ledger_started ledger_ready guard_added leaked_values_found "
        "verification_started verified"
    )
    assert [event_name(kind) for kind in get_args(Event) if kind not in special] == names.split()


def test_the_last_line_is_the_report() -> None:
    end = stopped(rejected_keys=((Key("[42]"), "check_violation"),))
    *_, line = told(started(), end)
    assert line == {"event": "stopped", "at": AT} | report(end)


def test_the_outage_is_a_state_of_the_figures() -> None:
    clock = Clock()
    stream, observer = observe(clock)
    observer(started())
    observer(OutageStarted(reason="refused", budget_seconds=300))
    clock.now = 1
    observer(Tick())
    assert parsed(stream)[-1]["state"] == "outage"
    assert parsed(stream)[-1]["eta_seconds"] is None
