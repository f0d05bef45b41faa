import io

import pytest

from rotator.events import (
    AnalyzeSkipped,
    DrainStarted,
    Event,
    IndexRebuilt,
    LateCommitsAwaited,
    LateRowsRotated,
    LockHeld,
    OutageEnded,
    OutageStarted,
    OwnerWatched,
    RangeDeferred,
    RangeRetried,
    ReindexSkipped,
    ReindexStarted,
    RowRejected,
    StopReason,
    Tick,
    VacuumSkipped,
)
from rotator.progress.lines import LinesObserver
from rotator.ranges import Key
from tests.unit.progress_fakes import STOPPED_AT, Clock, Gone, completed, resumed, started, stopped

AT = "2026-03-01T12:03:05Z "


def observer_of(stream: io.StringIO, clock: Clock) -> LinesObserver:
    return LinesObserver(stream, clock=clock, wall_clock=lambda: STOPPED_AT)


def lines_of(stream: io.StringIO) -> list[str]:
    """Return the lines without the time that each begins with."""
    lines = stream.getvalue().splitlines()
    assert all(line.startswith(AT) for line in lines)
    return [line.removeprefix(AT) for line in lines]


def told(*events: Event) -> list[str]:
    """Return the lines that the events give when none of them takes any time."""
    stream = io.StringIO()
    observer = observer_of(stream, Clock())
    for event in events:
        observer(event)
    return lines_of(stream)


def test_figures_come_every_thirty_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    observer = observer_of(stream, clock)
    observer(started())
    for step in range(1, 121):
        clock.now = step / 2
        observer(completed(rows=2000, seconds=0.5))
        observer(Tick())
    first, *figures = lines_of(stream)
    assert first == (
        "rotation 7 of tickets.Ticket.token starts: 1,000,000 rows, 4 workers, 2,000 rows a range"
    )
    assert figures == [
        "120,000 of 1,000,000 rows (12%), 4,000 rows/s, ETA 3 min 40 s",
        "240,000 of 1,000,000 rows (24%), 4,000 rows/s, ETA 3 min 10 s",
    ]


def test_figures_before_the_start_would_be_about_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    observer = observer_of(stream, clock)
    clock.now = 60
    observer(Tick())
    assert stream.getvalue() == ""


def test_an_estimate_is_called_one_and_an_unknown_eta_too() -> None:
    stream, clock = io.StringIO(), Clock()
    observer = observer_of(stream, clock)
    observer(started(rows_total_is_exact=False))
    clock.now = 31
    observer(Tick())
    assert lines_of(stream) == [
        "rotation 7 of tickets.Ticket.token starts: about 1,000,000 rows, 4 workers, 2,000 rows a range",
        "0 of about 1,000,000 rows (0%), ETA unknown",
    ]


def test_who_holds_locks_is_printed_once_and_in_the_figures_until_it_ends() -> None:
    stream, clock = io.StringIO(), Clock()
    observer = observer_of(stream, clock)
    observer(started())
    observer(LockHeld(holders=("pid 4711, psql, idle in transaction for 5 s",)))
    observer(LockHeld(holders=("pid 4711, psql, idle in transaction for 36 s",), is_new=False))
    clock.now = 31
    observer(Tick())
    observer(LockHeld(holders=(), is_new=False))
    clock.now = 62
    observer(Tick())
    waiting = "waiting for locks that other sessions hold: pid 4711, psql, idle in transaction for "
    assert lines_of(stream)[1:] == [
        f"{waiting}5 s",
        f"0 of 1,000,000 rows (0%), ETA unknown, {waiting}36 s",
        "0 of 1,000,000 rows (0%), ETA unknown",
    ]


def test_what_holds_the_run_up_is_in_the_figures() -> None:
    stream, clock = io.StringIO(), Clock()
    observer = observer_of(stream, clock)
    observer(started())
    observer(RangeDeferred(rows=2000))
    observer(RangeDeferred(rows=2000))
    observer(RangeRetried(rows=2000, reason="deadlock_detected", split=False))
    observer(RowRejected(key=Key("[42]"), reason="check_violation"))
    observer(OutageStarted(reason="connection refused", budget_seconds=300))
    clock.now = 37
    observer(Tick())
    assert lines_of(stream)[-1] == (
        "0 of 1,000,000 rows (0%), unreachable 37 s, 4 min 23 s left, 2 deferrals, 1 retry, 1 rejected row"
    )


def test_a_resumed_start_is_one_line() -> None:
    (line,) = told(resumed())
    assert line == (
        "rotation 7 of tickets.Ticket.token resumes: 412,000 of 1,000,000 rows were done in 18 s "
        "when it stopped at 2026-03-01 12:03:05 UTC"
    )


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            OutageStarted(reason="Connection refused.", budget_seconds=300),
            "outage: Connection refused; waiting for up to 5 min 00 s",
        ),
        (
            OutageEnded(seconds=12, rows_done=410_000, late_rows=0),
            "the server is reachable again after 12 s: 410,000 rows confirmed by checkpoints",
        ),
        (
            OwnerWatched(owner="app on db1, pid 42", seconds=10),
            "another process owns this rotation: app on db1, pid 42; watching its heartbeat for up to 10 s",
        ),
        (
            LateCommitsAwaited(holders=("pid 4711, psql", "pid 4712, app")),
            (
                "waiting for 2 transactions older than the rotation, which may still commit rows: "
                "pid 4711, psql; pid 4712, app"
            ),
        ),
        (
            RangeRetried(rows=2000, reason="deadlock_detected (40P01)", split=True),
            "a range of 2,000 rows is retried in two parts: deadlock_detected (40P01)",
        ),
        (LateRowsRotated(rows=12), "rotated 12 late rows"),
        (
            VacuumSkipped(reason="the table is busy", is_once=True),
            "skipped one VACUUM: the table is busy",
        ),
        (
            AnalyzeSkipped(reason="this role does not own the table", statement="ANALYZE orders;"),
            (
                "the statistics in pg_stats may still hold old values: this role does not own the table. "
                "Run: ANALYZE orders;"
            ),
        ),
        (
            ReindexStarted(indexes=2),
            "rebuilding 2 indexes (Ctrl-C stops this; the rotation stays completed)",
        ),
        (
            IndexRebuilt(name="public.orders_pkey", seconds=3, bytes_before=2_097_152, bytes_now=1_048_576),
            "rebuilt public.orders_pkey in 3 s: 2048 kB before, 1024 kB now",
        ),
        (
            ReindexSkipped(name="public.orders_pkey", reason="a stop was requested"),
            "public.orders_pkey not rebuilt: a stop was requested",
        ),
        (
            DrainStarted(reason=StopReason.SIGINT),
            "SIGINT: draining; ranges in flight are committed, and no new ones start",
        ),
        (
            RowRejected(key=Key("[42]"), reason="check_violation on token_length"),
            "row [42] is rejected: check_violation on token_length",
        ),
        (
            stopped(status="interrupted", rows=588_000, rows_this_run=588_000),
            "rotation 7 of tickets.Ticket.token interrupted after 40 s: 588,000 rows in this run",
        ),
    ],
)
def test_notable_events_are_printed_at_once(event: Event, line: str) -> None:
    assert told(event) == [line]


@pytest.mark.parametrize("event", [completed(), Tick(), RangeDeferred(rows=1)])
def test_what_happens_often_is_not_told_at_once(event: Event) -> None:
    assert told(started(), event) == told(started())


def test_the_same_wait_is_printed_once() -> None:
    waits = LateCommitsAwaited(holders=("pid 1",))
    assert len(told(waits, waits, waits)) == 1
    assert len(told(waits, LateCommitsAwaited(holders=("pid 2",)))) == 2


def test_many_holders_are_counted_after_the_first_five() -> None:
    (line,) = told(LateCommitsAwaited(holders=tuple(f"pid {pid}" for pid in range(8))))
    assert line.endswith(": pid 0; pid 1; pid 2; pid 3; pid 4; and 3 more")


def test_a_flood_of_rejected_rows_is_counted_after_the_first_twenty() -> None:
    lines = told(*(RowRejected(key=Key(f"[{key}]"), reason="check_violation") for key in range(500)))
    assert len(lines) == 21
    assert lines[19] == "row [19] is rejected: check_violation"
    assert lines[20] == "more rows are rejected; from now on they are only counted"


def test_no_control_characters_whatever_names_and_reasons_hold() -> None:
    lines = told(
        started(target="a\x1b[2Jb"),
        OutageStarted(reason="gone\nfor\r\x07good", budget_seconds=1),
        LateCommitsAwaited(holders=("evil\x1b]0;app\x07",)),
    )
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


def test_a_reader_that_went_away_does_not_stop_the_run() -> None:
    stream = Gone(1)
    observer = observer_of(stream, Clock())
    observer(started())
    observer(DrainStarted(reason=StopReason.SIGINT))
    stream.left = 1
    observer(stopped())
    assert stream.getvalue().count("\n") == 1
