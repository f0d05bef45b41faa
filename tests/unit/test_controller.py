"""The controller against a model of a server, in simulated time."""

import itertools
import random
from dataclasses import dataclass, field

import pytest

from rotator.options import PACES, RangeLimit
from rotator.runner.controller import (
    BLOCKED_SECONDS,
    MIN_ROWS,
    RECENT_RANGES,
    START_SHARE,
    Controller,
    Progress,
    RangeSizer,
    percentile,
)

STEP_SECONDS = 0.05
DECISION_STEPS = 5


def _limit(seconds: float, rows: int = 2000) -> RangeLimit:
    return RangeLimit(seconds=seconds, rows=rows)


def _noise(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - it must be reproducible


@dataclass(kw_only=True)
class _Server:
    """A server with ``knee`` units that serve ranges; commits of other sessions wait for busy ones.

    Attributes:
        knee: The number of workers above which rows/s do not grow.
        idle_ms: The 90th percentile of a commit without the rotation.
        added_ms: What one worker adds to it, with ranges of 25 ms.
        queued_ms: What each worker above the knee adds.
        noise: The deviation of single commits.
        others: The latency that other sessions cause, as a multiple of the idle one.
    """

    knee: int
    idle_ms: float = 1.4
    added_ms: float = 1.2
    queued_ms: float = 8.0
    noise: float = 0.25
    others: float = 1.0
    chance: random.Random = field(default_factory=lambda: _noise(7))

    def rows_per_second(self, workers: int, range_seconds: float) -> float:
        share = (range_seconds - 0.003) / range_seconds
        return 40_000 * share * min(workers, self.knee) * self.chance.uniform(0.97, 1.03)

    def commit_seconds(self, workers: int, range_seconds: float) -> float:
        added = self.added_ms * workers / self.knee * (0.5 + 0.5 * range_seconds / 0.025)
        queued = self.queued_ms * max(0, workers - self.knee)
        # The 90th percentile of this noise is about 1.
        factor = self.chance.lognormvariate(-1.28 * self.noise, self.noise)
        return (self.idle_ms * self.others + added + queued) * factor / 1000


class _Run:
    """A controller that drives the model."""

    def __init__(self, server: _Server, pace: str = "balanced", *, max_workers: int = 16) -> None:
        self.server = server
        self.now = 0.0
        limit = PACES[pace].range_limit
        self.range_seconds = limit.seconds if limit else 0.0
        self.controller = Controller(PACES[pace], max_workers=max_workers, now=0.0)
        self.measure_baseline()
        self.rows = self.ranges = 0.0
        self.workers = list[tuple[float, int]]()
        self.changes = list[tuple[float, int]]()
        self._steps = itertools.count(1)

    def measure_baseline(self) -> None:
        self.controller.set_baseline(percentile((self.server.commit_seconds(0, 0) for _ in range(50)), 0.9))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += STEP_SECONDS
            workers, range_seconds = self.controller.workers, self.range_seconds
            self.rows += self.server.rows_per_second(workers, range_seconds) * STEP_SECONDS
            self.ranges += workers / range_seconds * STEP_SECONDS
            self.controller.add_commit(self.server.commit_seconds(workers, range_seconds), self.now)
            self.workers.append((self.now, workers))
            progress = Progress(at=self.now, rows=int(self.rows), ranges=int(self.ranges))
            if next(self._steps) % DECISION_STEPS == 0 and self.controller.decide(progress, busy=workers):
                self.changes.append((self.now, self.controller.workers))

    def changes_after(self, seconds: float) -> list[tuple[float, int]]:
        return [change for change in self.changes if change[0] > seconds]

    def seconds_at(self, workers: int, *, after: float) -> float:
        return STEP_SECONDS * sum(at > after and was == workers for at, was in self.workers)

    @property
    def last_workers(self) -> int:
        return self.workers[-1][1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("knee", [1, 2, 4, 16])
@pytest.mark.parametrize("queued_ms", [8.0, 0.0])
def test_it_finds_the_knee_within_30_seconds_and_stays_there(knee: int, seed: int, queued_ms: float) -> None:
    run = _Run(_Server(knee=knee, queued_ms=queued_ms, chance=_noise(seed)))
    run.run(30)
    found = run.last_workers
    assert 0.6 * knee <= found <= knee
    run.run(300)
    # More workers are retried after 60, 120 and 240 s.
    assert len([change for change in run.changes_after(30) if change[1] > found]) <= 3
    assert run.seconds_at(found, after=30) >= 0.95 * 300


def test_workers_that_gain_nothing_are_given_up_although_no_commit_is_slower() -> None:
    run = _Run(_Server(knee=2, added_ms=0.6, queued_ms=0.0))
    run.run(30)
    assert run.last_workers == 2
    assert "3 workers instead of 2 changed rows/s by" in run.controller.reason


@pytest.mark.parametrize("pace", ["gentle", "balanced"])
def test_a_slow_disk_means_one_worker_and_never_a_stop(pace: str) -> None:
    run = _Run(_Server(knee=1, idle_ms=12.0, added_ms=60.0), pace)
    run.run(30)
    assert run.controller.workers == 1
    assert run.controller.is_stuck
    run.run(60)
    assert run.changes_after(30) == []


def test_a_load_that_begins_is_yielded_to_within_3_seconds() -> None:
    run = _Run(_Server(knee=4))
    run.run(60)
    assert run.last_workers >= 3
    run.server.others = 6.0
    run.run(3)
    assert run.last_workers == 1


def test_a_baseline_that_rises_with_the_load_of_others_gives_the_workers_back() -> None:
    run = _Run(_Server(knee=4))
    run.run(60)
    run.server.others = 6.0
    run.run(10)
    assert run.last_workers == 1
    run.measure_baseline()
    run.run(30)
    assert run.last_workers >= 3


def test_a_load_far_above_the_limit_halves_the_workers() -> None:
    run = _Run(_Server(knee=16))
    run.run(30)
    run.server.others = 10.0
    run.run(3)
    assert [workers for _, workers in run.changes_after(30)][:4] == [8, 4, 2, 1]


def test_noise_does_not_move_it() -> None:
    run = _Run(_Server(knee=2, noise=0.5))
    run.run(30)
    run.run(300)
    assert len(run.changes_after(30)) <= 12


def test_slow_commits_now_and_then_are_a_reason_against_more_workers() -> None:
    controller = Controller(PACES["balanced"], max_workers=4, now=0.0)
    controller.set_baseline(0.001)
    for step in range(1, 400):
        # The 90th percentile stays at the baseline.
        controller.add_commit(0.004 if step % 12 == 0 else 0.001, step / 20)
        assert not controller.decide(Progress(at=step / 20, rows=step * 1000, ranges=step), busy=1.0)


def test_no_measurements_hold_the_level() -> None:
    controller = Controller(PACES["balanced"], max_workers=4, now=0.0)
    controller.set_baseline(0.001)
    for second in range(1, 60):
        # Long above the limit, but too few.
        controller.add_commit(1.0, float(second))
        assert not controller.decide(Progress(at=float(second), rows=0, ranges=0), busy=1.0)
    assert controller.p90 is None
    assert controller.reason == ""


def test_without_a_baseline_the_level_holds() -> None:
    controller = Controller(PACES["balanced"], max_workers=4, now=0.0)
    for step in range(100):
        controller.add_commit(1.0, step / 20)
    assert not controller.decide(Progress(at=5.0, rows=0, ranges=0), busy=1.0)


def test_idle_workers_are_no_reason_for_more() -> None:
    controller = Controller(PACES["balanced"], max_workers=4, now=0.0)
    controller.set_baseline(0.001)
    for step in range(1, 400):
        controller.add_commit(0.001, step / 20)
        assert not controller.decide(Progress(at=step / 20, rows=step * 1000, ranges=step), busy=0.5)


def test_a_fast_disk_tolerates_half_a_millisecond() -> None:
    controller = Controller(PACES["gentle"], max_workers=4, now=0.0)
    controller.set_baseline(0.0001)
    assert controller.limit == pytest.approx(0.0006)


def test_a_lower_limit_of_workers_applies_at_once() -> None:
    run = _Run(_Server(knee=16))
    run.run(30)
    run.controller.set_max_workers(3)
    assert run.controller.workers == 3
    run.run(2 * BLOCKED_SECONDS)
    assert max(workers for _, workers in run.workers[-600:]) == 3


def _sizer(
    seconds_per_row: float, *, ranges: int, target: float, max_rows: int = 2000, fixed: float = 0.0032
) -> RangeSizer:
    sizer = RangeSizer(max_rows)
    for _ in range(ranges):
        rows = sizer.rows(_limit(target))
        sizer.count_completed(rows, fixed + rows * seconds_per_row)
    return sizer


def test_ranges_grow_at_most_by_half_until_they_take_the_target() -> None:
    sizer = RangeSizer(2000)
    first = int(2000 * START_SHARE)
    assert sizer.rows(_limit(0.025)) == first
    sizer.count_completed(first, 0.0032 + first * 14e-6)
    assert sizer.rows(_limit(0.025)) == int(first * 1.5)
    rows = _sizer(14e-6, ranges=60, target=0.025).rows(_limit(0.025))
    assert 0.0032 + rows * 14e-6 == pytest.approx(0.025, rel=0.05)


def test_ranges_shrink_at_once_where_the_target_changes() -> None:
    sizer = _sizer(14e-6, ranges=60, target=0.025)
    assert 0.0032 + sizer.rows(_limit(0.020)) * 14e-6 == pytest.approx(0.020, rel=0.05)


def test_ranges_shrink_where_the_server_has_become_slower() -> None:
    sizer = _sizer(14e-6, ranges=60, target=0.025)
    for _ in range(16):
        rows = sizer.rows(_limit(0.025))
        sizer.count_completed(rows, 0.0032 + rows * 200e-6)
    assert sizer.rows(_limit(0.025)) < 150


@pytest.mark.parametrize("target", [0.005, 0.010, 0.025])
def test_at_most_a_fifth_of_the_time_of_a_range_is_its_fixed_cost(target: float) -> None:
    rows = _sizer(14e-6, ranges=60, target=target, fixed=0.002).rows(_limit(target))
    assert 0.002 / (0.002 + rows * 14e-6) <= 0.201


def test_ranges_do_not_shrink_to_nothing_next_to_sessions_that_take_the_cpu() -> None:
    sizer, chance = RangeSizer(2000), _noise(1)
    sizes = []
    for _ in range(200):
        rows = sizer.rows(_limit(0.010))
        sizes.append(rows)
        # Most ranges wait for the CPU, for a time that does not depend on their rows.
        sizer.count_completed(rows, 0.002 + rows * 14e-6 + max(0.0, chance.gauss(0.015, 0.015)))
    assert min(sizes[RECENT_RANGES:]) >= 200


@pytest.mark.parametrize("batch", [50, 100, 2000])
@pytest.mark.parametrize("most", [100, 750, 2000])
def test_ranges_do_not_shrink_where_that_makes_them_hardly_shorter(most: int, batch: int) -> None:
    sizer = RangeSizer(batch)
    for _ in range(60):
        rows = sizer.rows(_limit(0.025, most))
        # E.g. a trigger that sleeps.
        sizer.count_completed(rows, 0.150 + rows * 14e-6)
    assert sizer.rows(_limit(0.025, most)) == batch


@pytest.mark.parametrize(("fixed", "row"), [(0.001, 7e-6), (0.002, 7e-6), (0.0032, 14e-6), (0.004, 20e-6)])
@pytest.mark.parametrize("most", [100, 750])
def test_short_ranges_have_no_more_rows_than_the_pace_allows(most: int, fixed: float, row: float) -> None:
    sizer = RangeSizer(2000)
    for _ in range(60):
        rows = sizer.rows(_limit(0.025, most))
        sizer.count_completed(rows, fixed + rows * row)
    assert sizer.rows(_limit(0.025, most)) == most


def test_one_slow_range_among_many_does_not_shrink_them() -> None:
    sizer = _sizer(14e-6, ranges=60, target=0.025)
    before = sizer.rows(_limit(0.025))
    sizer.count_completed(before, 0.100)
    assert sizer.rows(_limit(0.025)) == pytest.approx(before, rel=0.1)


def test_the_batch_is_the_upper_limit_and_some_rows_are_always_planned() -> None:
    assert _sizer(1e-7, ranges=60, target=0.025).rows(_limit(0.025)) == 2000
    assert _sizer(1.0, ranges=60, target=0.025).rows(_limit(0.025)) == MIN_ROWS
    assert RangeSizer(4).rows(_limit(0.025)) == 4


def test_without_a_target_the_time_on_the_server_does_not_matter() -> None:
    sizer = RangeSizer(2000)
    for _ in range(20):
        sizer.count_completed(2000, 10.0)
    assert sizer.rows(None) == 2000


def test_an_operator_changes_the_upper_limit_of_rows() -> None:
    sizer = RangeSizer(2000)
    sizer.limit(500)
    assert sizer.rows(None) == 500
    sizer.limit(4000)
    assert sizer.rows(None) == 4000
    sizer.shrink(4000)
    sizer.limit(3000)
    assert sizer.rows(None) == 2000
