"""The controller of the pace: from measurements to the number of workers and the size of ranges.

Nothing here waits, reads a clock of its own or asks the server, so that simulations can test it.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rotator.options import Pace, RangeLimit

# Rows per range.
COMPLETED_BEFORE_GROWTH: Final = 64
MIN_ROWS: Final = 16
# The first ranges are smaller, so that ranges of different sizes show the fixed cost.
START_SHARE: Final = 1 / 3
RECENT_RANGES: Final = 16
MAX_GROWTH: Final = 1.5
# What a range costs on the server whatever its size, without triggers; benchmarks/speed.py prints it.
FIXED_SECONDS: Final = 0.002
# Smaller ranges would spend too much of their time on that cost.
MAX_FIXED_SHARE: Final = 0.2
# Of the rows of which half of a range's time is fixed: with fewer, four fifths of it would be.
MIN_HALF_SHARE: Final = 1 / 4
# The ratio of two sizes below which noise would pass for a fixed cost.
MIN_SPREAD: Final = 2

# Workers.
WINDOW_SECONDS: Final = 2.0
MIN_SAMPLES: Final = 10
SAMPLES_OF_ONE_STEP: Final = 20
# Differences below it matter to no application, and on a fast disk they are noise.
TOLERATED_SECONDS: Final = 0.0005
LOW_MARK: Final = 0.8
FAR_ABOVE: Final = 2.0
DOWN_SECONDS: Final = 1.0
UP_SECONDS: Final = 2.0
TRIAL_RANGES: Final = 16
SETTLE_SECONDS: Final = 0.5
MARK_SECONDS: Final = 10.0
MIN_GAIN: Final = 0.3
BUSY: Final = 0.8
BLOCKED_SECONDS: Final = 60.0
MAX_BLOCKED_SECONDS: Final = 600.0
# A baseline that changes by more makes earlier trials meaningless.
NEW_BASELINE: Final = 1.3


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that this share of the values does not exceed; there must be one."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class RangeSizer:
    """The rows of the next range.

    A range that is too slow halves them, and many that are not double them. A pace limits them further: the
    slowest tenth of the recent ranges must still reach its target of server time. So they shrink at once, and
    grow at most ``MAX_GROWTH`` times. They do not shrink where that would hardly make a range shorter, e.g.
    because a trigger takes most of its time. What a row costs in itself is that of the fastest tenth: where
    other sessions take the CPU, fewer rows do not make a range faster.
    """

    def __init__(self, max_rows: int) -> None:
        self._rows = self._max_rows = max_rows
        self._completed = 0
        self._recent = deque[tuple[int, float]](maxlen=RECENT_RANGES)
        self._rows_half_fixed = 0.0

    def shrink(self, rows: int) -> None:
        """Plan smaller ranges, since one of this many rows was too slow."""
        self._completed = 0
        self._rows = max(min(MIN_ROWS, self._max_rows), min(self._rows, rows // 2))

    def count_completed(self, rows: int, server_seconds: float) -> None:
        """Count a completed range of this many rows, which took this time on the server."""
        self._completed += 1
        if self._rows < self._max_rows and self._completed >= COMPLETED_BEFORE_GROWTH:
            self._completed = 0
            self._rows = min(self._max_rows, self._rows * 2)
        if rows:
            self._recent.append((rows, server_seconds))
            known = rows_half_fixed(self._recent)
            self._rows_half_fixed = self._rows_half_fixed if known is None else known

    def limit(self, max_rows: int) -> None:
        """Change the upper limit."""
        self._rows = max_rows if self._rows == self._max_rows else min(self._rows, max_rows)
        self._max_rows = max_rows

    def rows(self, limit: RangeLimit | None) -> int:
        """Return the rows of the next range; without a limit, its time does not matter."""
        if limit is None:
            return self._rows
        most = min(self._rows, max(limit.rows, int(self._rows_half_fixed * MIN_HALF_SHARE)))
        least = min(MIN_ROWS, most)
        if not self._recent:
            return min(most, int(limit.rows * START_SHARE))
        row_seconds = [max(0.0, seconds - FIXED_SECONDS) / rows for rows, seconds in self._recent]
        fitting = _quotient(max(0.0, limit.seconds - FIXED_SECONDS), percentile(row_seconds, 0.9))
        cheapest = _quotient(FIXED_SECONDS * (1 / MAX_FIXED_SHARE - 1), percentile(row_seconds, 0.1))
        worthwhile = max(cheapest, self._rows_half_fixed)
        grown = max(rows for rows, _ in self._recent) * MAX_GROWTH
        wanted = min(max(fitting, worthwhile), grown)
        return max(least, min(most, int(wanted)))


def _quotient(seconds: float, row_seconds: float) -> float:
    return seconds / row_seconds if row_seconds > 0 else math.inf


def rows_half_fixed(ranges: Sequence[tuple[int, float]]) -> float | None:
    """Return the rows below which a range spends most of its time on what does not depend on its rows.

    The line through the fastest of the smaller ranges and the fastest of the larger ones shows it. The others
    may have waited for the CPU, which is no cost of a range.

    ``ranges`` are the rows and the seconds of each range. The result is 0 if the time depends on the rows
    alone, and None if the ranges have similar sizes.
    """
    ordered, half = sorted(ranges), len(ranges) // 2
    if not half:
        return None
    (fewer, faster), (more, slower) = (
        min(part, key=lambda measured: measured[1] / measured[0]) for part in (ordered[:half], ordered[half:])
    )
    if more < MIN_SPREAD * fewer:
        return None
    slope = (slower - faster) / (more - fewer)
    # Not positive where the server has become slower or faster since then.
    return max(0.0, faster / slope - fewer) if slope > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The rotated rows and the completed ranges of a run, at some time."""

    at: float
    rows: int
    ranges: int


@dataclass(slots=True, kw_only=True)
class _Block:
    """A number of workers that failed, and the time of its next trial."""

    until: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """More workers than before, which have to be worth it."""

    workers_before: int
    rate_before: float


class Controller:
    """Moves the number of workers up and down while other sessions are at work, beginning with one.

    A number that was too much, or gained too little, is blocked for a minute, then for two, and so on.
    Otherwise it would swing between two values all the time. Times are seconds of a monotonic
    clock.

    Attributes:
        workers: The number of workers that are allowed now.
        baseline: The time of a commit without the rotation, in seconds; None while it is unknown.
    """

    def __init__(self, pace: Pace, *, max_workers: int, now: float) -> None:
        self._latency_limit = pace.latency_limit or math.inf
        self._max_workers = max_workers
        self.baseline: float | None = None
        self._samples = deque[tuple[float, float]]()
        self._blocks = dict[int, _Block]()
        self.workers = 1
        self._changed_at = now
        # The progress at some time with this number of workers.
        self._mark: Progress | None = None
        self._trial: _Trial | None = None
        self._doubles = True
        self._gauge = ""
        self._knee = ""

    @property
    def reason(self) -> str:
        """The reason of the present number of workers, as a phrase; empty without measurements."""
        return "; ".join(filter(None, [self._gauge, self._knee]))

    @property
    def is_stuck(self) -> bool:
        """Whether commits take longer than the limit even with one worker."""
        p90, limit = self.p90, self.limit
        return self.workers == 1 and p90 is not None and limit is not None and p90 > limit

    @property
    def limit(self) -> float | None:
        """The longest time of a commit, in seconds; None without a baseline."""
        if self.baseline is None:
            return None
        return max(self.baseline * self._latency_limit, self.baseline + TOLERATED_SECONDS)

    @property
    def p90(self) -> float | None:
        """The 90th percentile of the commits with these workers; None while there are too few."""
        return self._percentile(0.9) if len(self._samples) >= MIN_SAMPLES else None

    def set_max_workers(self, workers: int) -> None:
        """Change the upper limit of workers."""
        self._max_workers = workers
        self.workers = min(self.workers, workers)

    def set_baseline(self, seconds: float) -> None:
        """Set the 90th percentile of the commits without our own load."""
        before, self.baseline = self.baseline, seconds
        if before is not None and not 1 / NEW_BASELINE <= seconds / before <= NEW_BASELINE:
            self._blocks.clear()

    def add_commit(self, seconds: float, now: float) -> None:
        """Count a commit of the probe, which took this time."""
        self._samples.append((now, seconds))

    def restart(self, now: float) -> None:
        """Forget the measurements, since the number of workers has changed or ranges were held back."""
        self._samples.clear()
        self._changed_at, self._mark = now, None

    def decide(self, progress: Progress, *, busy: float) -> bool:
        """Change the number of workers where the measurements ask for it, and return whether it has changed.

        Too few measurements, or old ones, change nothing. ``busy`` is the mean number of workers that wrote a
        range since the last decision.
        """
        now = progress.at
        while self._samples and self._samples[0][0] < now - WINDOW_SECONDS:
            self._samples.popleft()
        is_old = self._mark is not None and now - self._mark.at > MARK_SECONDS and self._trial is None
        if is_old or (self._mark is None and now - self._changed_at >= SETTLE_SECONDS):
            self._mark = progress
        p90, limit = self.p90, self.limit
        if p90 is None or limit is None:
            return False
        sign = ">" if p90 > limit else "≤"
        self._gauge = f"commit p90 {p90 * 1000:.1f} ms {sign} {limit * 1000:.1f} ms"
        if not any(now < block.until for block in self._blocks.values()):
            self._knee = ""
        workers = self.workers
        if p90 > limit:
            self._go_down(p90, limit, now)
        elif self._trial is not None and self._is_measured(progress):
            self._end_trial(self._trial, progress)
        elif self._percentile(0.95) < LOW_MARK * limit and self._trial is None:
            self._go_up(p90, limit, progress, busy)
        if self.workers == workers:
            return False
        self.restart(now)
        return True

    def _go_down(self, p90: float, limit: float, now: float) -> None:
        if self.workers == 1:
            return
        if p90 > FAR_ABOVE * limit:
            lower = self.workers // 2
        elif len(self._samples) >= SAMPLES_OF_ONE_STEP and now - self._changed_at >= DOWN_SECONDS:
            lower = self.workers - 1
        else:
            return
        self._block(now)
        self.workers = lower if self._trial is None else self._trial.workers_before
        self._doubles, self._trial, self._knee = False, None, ""

    def _go_up(self, p90: float, limit: float, progress: Progress, busy: float) -> None:
        if not self._is_measured(progress) or busy < BUSY * self.workers:
            return
        for more in [2 * self.workers, self.workers + 1] if self._doubles else [self.workers + 1]:
            is_blocked = any(n <= more and progress.at < block.until for n, block in self._blocks.items())
            if is_blocked or not self.workers < more <= self._max_workers:
                continue
            # What our load adds grows with the workers.
            baseline = self.baseline or 0.0
            if baseline + max(0.0, p90 - baseline) * more / self.workers > limit:
                continue
            self._trial = _Trial(workers_before=self.workers, rate_before=self._rate(progress))
            self.workers = more
            return

    def _end_trial(self, trial: _Trial, progress: Progress) -> None:
        self._trial = None
        gain = self._rate(progress) / trial.rate_before - 1 if trial.rate_before else math.inf
        needed = MIN_GAIN * (self.workers - trial.workers_before) / self.workers
        if gain >= needed:
            return
        self._block(progress.at)
        self._doubles = False
        more = f"{self.workers} workers instead of {trial.workers_before}"
        self._knee = f"{more} changed rows/s by {gain:+.0%} < {needed:+.0%}"
        self.workers = trial.workers_before

    def _is_measured(self, progress: Progress) -> bool:
        """Return whether this number of workers has lasted for long enough to compare it."""
        if self._mark is None or progress.at - self._mark.at < UP_SECONDS - SETTLE_SECONDS:
            return False
        return progress.ranges - self._mark.ranges >= TRIAL_RANGES

    def _rate(self, progress: Progress) -> float:
        mark = self._mark
        return (
            (progress.rows - mark.rows) / (progress.at - mark.at) if mark and progress.at > mark.at else 0.0
        )

    def _block(self, now: float) -> None:
        """Block the present number of workers."""
        block = self._blocks.get(self.workers)
        # A number that lasted was not the failure of the same trial.
        is_repeated = block is not None and now - self._changed_at < BLOCKED_SECONDS
        seconds = min(MAX_BLOCKED_SECONDS, 2 * block.seconds) if block and is_repeated else BLOCKED_SECONDS
        self._blocks[self.workers] = _Block(until=now + seconds, seconds=seconds)

    def _percentile(self, share: float) -> float:
        return percentile((seconds for _, seconds in self._samples), share)
