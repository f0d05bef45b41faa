"""How fast rows are done now, and when the rest will be: pure, with the clock as an argument."""

from collections import deque
from dataclasses import dataclass

WINDOW_SECONDS = 20.0
FEWEST_SAMPLES = 8
WARM_UP_SECONDS = 2.0
STALL_SECONDS = 10.0
HELD_UP_SECONDS = 1.0
MERGE_SECONDS = 0.25


@dataclass(slots=True)
class _Sample:
    at: float
    rows: int
    seconds: float


class RecentRate:
    """The rate of the last ``WINDOW_SECONDS``, steady although rows come a range at a time.

    Two things keep it from jumping: the window stretches until it holds ``FEWEST_SAMPLES``, so that a few
    slow ranges are not measured by which of them happen to be inside; and silence counts only once it is
    longer than a range takes, because until then it is merely the time between two ranges.

    Every ``now`` is a monotonic clock's value in seconds and never smaller than the one before.
    """

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def restart(self) -> None:
        """Forget everything, as after an outage: what was measured before says nothing any more."""
        self._samples.clear()

    def add(self, rows: int, *, now: float, seconds: float) -> None:
        """Count a range of ``rows`` that took ``seconds`` and was committed just now."""
        if not self._samples:
            self._samples.append(_Sample(now - seconds, 0, 0.0))
        if len(self._samples) > 1 and now - self._samples[-2].at < MERGE_SECONDS:
            last = self._samples[-1]
            last.at = now
            last.rows += rows
            last.seconds = max(last.seconds, seconds)
        else:
            self._samples.append(_Sample(now, rows, seconds))
        self._forget(now)

    def rows_per_second(self, now: float) -> float | None:
        """Return the recent rate; None until ``WARM_UP_SECONDS`` have been seen."""
        self._forget(now)
        if not self._samples:
            return None
        first, *counted = self._samples
        since = first.at
        if len(counted) >= FEWEST_SAMPLES and counted[0].at > now - WINDOW_SECONDS:
            # Only a silence can lie between `first` and the window; it is over and no longer recent.
            since = max(since, now - WINDOW_SECONDS)
        elapsed = max(counted[-1].at, now - self._patience()) - since
        if elapsed < WARM_UP_SECONDS:
            return None
        return sum(sample.rows for sample in counted) / elapsed

    def eta_seconds(self, rows_left: int, now: float) -> float | None:
        """Return the seconds until ``rows_left`` are done; None while it is unknown or nothing completes."""
        if rows_left <= 0:
            return 0.0
        rate = self.rows_per_second(now)
        if not rate:
            return None
        silent_seconds, patience_seconds = now - self._samples[-1].at, 2 * self._patience()
        # Where nothing was completed for longer than all the rest would take, something holds it up.
        is_held_up = silent_seconds > max(HELD_UP_SECONDS, patience_seconds, rows_left / rate)
        if is_held_up or silent_seconds > max(STALL_SECONDS, patience_seconds):
            return None
        return rows_left / rate

    def _forget(self, now: float) -> None:
        # The oldest sample's rows are not counted: it only says since when the others were done.
        while len(self._samples) > FEWEST_SAMPLES + 1 and self._samples[1].at <= now - WINDOW_SECONDS:
            self._samples.popleft()

    def _patience(self) -> float:
        return min(WINDOW_SECONDS, max(sample.seconds for sample in self._samples))
