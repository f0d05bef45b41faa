"""How many rows the planner gives a range: as many as asked for, or fewer while the server is slow."""

from typing import Final

COMPLETED_BEFORE_GROWTH: Final = 64
LEAST_ROWS: Final = 16


class Pace:
    """Halves on a range that took too long, and doubles again after many that did not."""

    def __init__(self, batch: int) -> None:
        """Begin with the batch that was asked for, which is never exceeded."""
        self._most = batch
        self._completed = 0
        self.batch = batch

    def too_slow(self, rows: int) -> None:
        """Note that a range of this many rows took too long."""
        self._completed = 0
        self.batch = max(min(LEAST_ROWS, self._most), min(self.batch, rows // 2))

    def completed(self) -> None:
        """Note that a range was completed."""
        self._completed += 1
        if self.batch < self._most and self._completed >= COMPLETED_BEFORE_GROWTH:
            self._completed = 0
            self.batch = min(self._most, self.batch * 2)
