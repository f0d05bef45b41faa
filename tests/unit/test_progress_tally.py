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
    RowFailed,
    StopReason,
)
from rotator.ranges import Key
from rotator.stats import Tally
from tests.unit.progress_fakes import completed, resumed, started


def state(tally: Tally) -> str:
    """Return the state anew; mypy takes a property for a fact that stays."""
    return tally.state


def run(tally: Tally, *, begin: float, ranges: int, every: float = 0.1) -> float:
    now = begin
    for _ in range(ranges):
        now += every
        tally.take(completed(seconds=every), now)
    return now


def test_rows_of_earlier_runs_count_as_done_but_not_as_fast() -> None:
    tally = Tally()
    tally.take(resumed(), 0)
    assert tally.rows_done == 412_000
    assert tally.percent == 41
    now = run(tally, begin=0, ranges=100)
    assert tally.rows_done == 612_000
    assert tally.rows_per_second(now) == pytest.approx(20_000, rel=0.05)
    assert tally.eta_seconds(now) == pytest.approx(388_000 / 20_000, rel=0.05)


def test_nothing_is_shown_past_an_exact_total() -> None:
    tally = Tally()
    tally.take(started(rows_total=3000), 0)
    now = run(tally, begin=0, ranges=2)
    assert tally.rows_done == 4000
    assert tally.rows_shown == tally.rows_capped == 3000
    assert tally.percent == 100
    assert tally.eta_seconds(now) == 0
    assert state(tally) == "finishing"


def test_an_estimated_total_is_never_reached() -> None:
    tally = Tally()
    tally.take(started(rows_total=3000, rows_total_is_exact=False), 0)
    now = run(tally, begin=0, ranges=50)
    assert tally.rows_shown == 100_000
    assert tally.rows_capped == 2970
    assert tally.percent == 99
    assert tally.eta_seconds(now) is None
    assert state(tally) == "rotating"


@pytest.mark.parametrize(("exact", "percent"), [(True, 100), (False, 0)])
def test_a_total_of_nothing(*, exact: bool, percent: int) -> None:
    tally = Tally()
    tally.take(started(rows_total=0, rows_total_is_exact=exact), 0)
    assert tally.percent == percent


def test_no_rate_and_no_eta_during_an_outage_and_the_true_ones_soon_after() -> None:
    tally = Tally()
    tally.take(started(), 0)
    now = run(tally, begin=0, ranges=100)
    tally.take(OutageStarted(reason="refused", budget_seconds=300), now)
    assert state(tally) == "outage"
    assert tally.rows_per_second(now + 60) is None
    assert tally.eta_seconds(now + 60) is None
    tally.take(OutageEnded(seconds=60, rows_done=190_000), now + 60)
    assert tally.rows_done == 190_000
    now = run(tally, begin=now + 60, ranges=30)
    assert state(tally) == "rotating"
    assert tally.rows_per_second(now) == pytest.approx(20_000, rel=0.05)
    assert tally.eta_seconds(now) == pytest.approx(750_000 / 20_000, rel=0.05)


def test_draining_and_waiting_have_no_eta() -> None:
    tally = Tally()
    tally.take(started(), 0)
    now = run(tally, begin=0, ranges=100)
    assert tally.eta_seconds(now) is not None
    tally.take(LateCommitsAwaited(holders=("pid 1",)), now)
    assert state(tally) == "late_commits"
    assert tally.eta_seconds(now) is None
    tally.take(LateCommitsOver(), now)
    assert state(tally) == "rotating"
    tally.take(LateRowsRotated(rows=12), now)
    assert tally.rows_done == 200_012
    assert state(tally) == "rotating"
    tally.take(DrainStarted(reason=StopReason.SIGINT), now)
    assert state(tally) == "draining"
    assert tally.eta_seconds(now) is None
    tally.take(completed(), now)
    assert state(tally) == "draining"


def test_deferrals_retries_and_failed_rows_are_counted() -> None:
    tally = Tally()
    tally.take(started(), 0)
    for _ in range(3):
        tally.take(RangeDeferred(rows=2000), 1)
    for _ in range(2):
        tally.take(RangeRetried(rows=2000, reason="deadlock_detected", split=True), 1)
    tally.take(RowFailed(key=Key("[42]"), reason="check_violation"), 1)
    assert (tally.deferrals, tally.retries, tally.failed_rows) == (3, 2, 1)
