from dataclasses import asdict

import pytest

from rotator.events import (
    DrainStarted,
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    OutageEnded,
    OutageStarted,
    RangeDeferred,
    RangeRetried,
    RotationStopped,
    RowRejected,
    StopReason,
    Throttled,
    ThrottleEnded,
    Vacuumed,
    VacuumStarted,
)
from rotator.ranges import Key
from rotator.stats import Stats
from tests.unit.progress_fakes import RUN, Clock, completed, resumed, started, stopped


def state(stats: Stats) -> str:
    """Return the current state; mypy assumes that a property does not change."""
    return stats.state


def account(stats: Stats) -> RotationStopped:
    return stats.stopped("interrupted", stop_reason=None, error="", superseded=False, run=RUN)


def run(stats: Stats, clock: Clock, *, ranges: int, every: float = 0.1) -> None:
    for _ in range(ranges):
        clock.now += every
        stats.take(completed(seconds=every))


def test_rows_of_earlier_runs_count_as_done_but_not_as_fast() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(resumed())
    assert stats.rows_done == 412_000
    assert stats.percent == 41
    run(stats, clock, ranges=100)
    assert stats.rows_done == 612_000
    assert stats.rows_per_second == pytest.approx(20_000, rel=0.05)
    assert stats.eta_seconds == pytest.approx(388_000 / 20_000, rel=0.05)


def test_nothing_is_shown_past_an_exact_total() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started(rows_total=3000))
    run(stats, clock, ranges=2)
    assert stats.rows_done == 4000
    assert stats.rows_capped == 3000
    assert stats.percent == 100
    assert stats.eta_seconds == 0
    assert state(stats) == "finishing"


def test_an_estimated_total_is_never_reached() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started(rows_total=3000, rows_total_is_exact=False))
    run(stats, clock, ranges=50)
    assert stats.rows_done == 100_000
    assert stats.rows_capped == 2970
    assert stats.percent == 99
    assert stats.eta_seconds is None
    assert state(stats) == "rotating"


@pytest.mark.parametrize(("exact", "percent"), [(True, 100), (False, 0)])
def test_a_total_of_nothing(*, exact: bool, percent: int) -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started(rows_total=0, rows_total_is_exact=exact))
    assert stats.percent == percent


def test_no_rate_and_no_eta_during_an_outage_and_the_true_ones_soon_after() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started())
    run(stats, clock, ranges=100)
    stats.take(OutageStarted(reason="refused", budget_seconds=300))
    assert state(stats) == "outage"
    clock.now += 60
    assert stats.rows_per_second is None
    assert stats.eta_seconds is None
    assert stats.outage_left_seconds == 240
    stats.take(OutageEnded(seconds=60, rows_done=190_000, late_rows=0))
    assert stats.rows_done == 190_000
    run(stats, clock, ranges=30)
    assert state(stats) == "rotating"
    assert stats.rows_per_second == pytest.approx(20_000, rel=0.05)
    assert stats.eta_seconds == pytest.approx(750_000 / 20_000, rel=0.05)


def test_draining_and_waiting_have_no_eta() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started())
    run(stats, clock, ranges=100)
    assert stats.eta_seconds is not None
    stats.take(LateCommitsAwaited(holders=("pid 1",)))
    assert state(stats) == "late_commits"
    assert stats.eta_seconds is None
    stats.take(LateCommitsOver())
    assert state(stats) == "rotating"
    stats.take(LateRowsRotated(rows=12))
    assert stats.rows_done == 200_012
    assert state(stats) == "rotating"
    stats.take(DrainStarted(reason=StopReason.SIGINT))
    assert state(stats) == "draining"
    assert stats.eta_seconds is None
    stats.take(completed())
    assert state(stats) == "draining"


def test_deferrals_retries_and_rejected_rows_are_counted_separately() -> None:
    stats = Stats(clock=Clock())
    stats.take(started())
    for _ in range(3):
        stats.take(RangeDeferred(rows=2000))
    for _ in range(2):
        stats.take(RangeRetried(rows=2000, reason="deadlock_detected", split=True))
    stats.take(RowRejected(key=Key("[42]"), reason="check_violation"))
    assert (stats.deferrals, stats.retries, len(stats.rejected_keys)) == (3, 2, 1)
    stats.take(OutageEnded(seconds=1, rows_done=0, late_rows=0))
    # It is in a gap, so it is retried.
    assert stats.rejected_keys == []


def test_the_rate_while_writing_ends_with_the_last_range() -> None:
    clock = Clock(100)
    stats = Stats(clock=clock)
    clock.now += 5
    stats.take(resumed(late_rows=7))
    run(stats, clock, ranges=10, every=1.0)
    # Neither the wait for late rows nor they themselves count, and neither does the final VACUUM.
    clock.now += 60
    stats.take(LateRowsRotated(rows=3))
    stats.take(VacuumStarted())
    clock.now += 60
    stats.take(Vacuumed(seconds=60))
    stats.stop_clock()
    clock.now += 60
    end = account(stats)
    assert (end.rows, end.rows_this_run, end.late_rows) == (432_003, 20_003, 10)
    assert (end.rows_per_second, end.seconds, end.seconds_total) == (2000, 135, 153.2)
    assert (end.ranges, end.vacuums, end.vacuum_seconds) == (10, 1, 60)


def test_an_outage_corrects_the_rows_of_the_run() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(resumed())
    run(stats, clock, ranges=10, every=1.0)
    stats.take(LateRowsRotated(rows=3))
    stats.take(OutageEnded(seconds=4, rows_done=424_001, late_rows=1))
    end = account(stats)
    assert (end.rows, end.rows_this_run, end.late_rows, end.outage_seconds) == (424_001, 12_001, 1, 4)
    assert end.rows_per_second == 1200


def test_an_observer_takes_the_rows_of_the_account() -> None:
    stats = Stats(clock=Clock())
    stats.take(started())
    stats.take(stopped(rows=12, late_rows=2))
    assert (stats.rows_done, stats.late_rows) == (12, 2)


def test_a_run_without_ranges_has_no_rate() -> None:
    stats = Stats(clock=Clock())
    stats.take(started())
    stats.take(LateRowsRotated(rows=3))
    assert account(stats).rows_per_second == 0


def test_the_account_can_be_copied_into_dictionaries() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started())
    for seconds in (4, 3):
        stats.take(Throttled(source="replica lag", reason="replica lag 14 s > 10 s", is_new=True))
        clock.now += seconds
        stats.take(ThrottleEnded(source="replica lag", reason="replica lag 14 s > 10 s", seconds=seconds))
    assert asdict(account(stats))["throttled_seconds"] == {"replica lag": 7}
