"""How long a run puts up with a server that is away."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rotator.engine.backoff import backoff_seconds

FIRST_RECONNECT_SECONDS: Final = 0.2
LONGEST_RECONNECT_SECONDS: Final = 5.0


@dataclass(slots=True, kw_only=True)
class OutageBudget:
    """Counts from the moment the server went away until a range is completed again.

    A server that comes back and goes away at once has used up the same budget.

    Attributes:
        seconds: The budget.
        clock: Returns monotonic seconds.
    """

    seconds: float
    clock: Callable[[], float]
    _since: float | None = None
    _away_since: float | None = None
    _attempts: int = 0

    @property
    def is_away(self) -> bool:
        """Whether the server is away now."""
        return self._away_since is not None

    @property
    def left_seconds(self) -> float:
        """What is left of the budget; never negative."""
        return self.seconds if self._since is None else max(0.0, self._since + self.seconds - self.clock())

    def lost(self) -> None:
        """Note that the server is away, or still is."""
        self._attempts += 1
        if self._away_since is None:
            self._away_since = self.clock()
        if self._since is None:
            self._since = self._away_since

    def back(self) -> float:
        """Note that the server answers, and return how long it was away in seconds."""
        away_since, self._away_since = self._away_since, None
        return 0.0 if away_since is None else self.clock() - away_since

    def range_completed(self) -> None:
        """Begin anew: the server not only answers but works."""
        self._since = None
        self._attempts = 0

    def delay_seconds(self) -> float:
        """How long to wait before the next attempt."""
        delay = backoff_seconds(
            self._attempts, first=FIRST_RECONNECT_SECONDS, longest=LONGEST_RECONNECT_SECONDS
        )
        return min(delay, self.left_seconds)
