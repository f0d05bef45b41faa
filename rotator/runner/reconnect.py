"""The time budget for an unreachable server, and the delays between attempts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rotator.runner.engine import backoff_seconds

FIRST_RECONNECT_SECONDS: Final = 0.2
MAX_RECONNECT_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 30.0


@dataclass(slots=True, kw_only=True)
class OutageBudget:
    """Counts from the moment the server went away until it works again.

    It does when a range is completed, or when it has answered for ``STEADY_SECONDS``: there may be nothing
    left to complete but the waiting for others. A server that comes back and goes away at once has used up
    the same budget.

    Attributes:
        seconds: The budget.
        clock: Returns monotonic seconds.
    """

    seconds: float
    clock: Callable[[], float]
    _since: float | None = None
    _unreachable_since: float | None = None
    _back_at: float = 0.0
    _attempts: int = 0

    @property
    def is_unreachable(self) -> bool:
        """Whether the server is away now."""
        return self._unreachable_since is not None

    @property
    def left_seconds(self) -> float:
        """What is left of the budget; never negative."""
        return self.seconds if self._since is None else max(0.0, self._since + self.seconds - self.clock())

    def lost(self) -> None:
        """Note that the server is away, or still is."""
        if self._unreachable_since is None:
            self._unreachable_since = self.clock()
            if self._unreachable_since - self._back_at >= STEADY_SECONDS:
                self.works()
        self._attempts += 1
        if self._since is None:
            self._since = self._unreachable_since

    def back(self) -> float:
        """Note that the server answers, and return how long it was away in seconds."""
        unreachable_since, self._unreachable_since = self._unreachable_since, None
        self._back_at = self.clock()
        return 0.0 if unreachable_since is None else self._back_at - unreachable_since

    def works(self) -> None:
        """Begin anew: the server not only answers but works."""
        self._since = None
        self._attempts = 0

    def delay_seconds(self) -> float:
        """How long to wait before the next attempt."""
        delay = backoff_seconds(self._attempts, first=FIRST_RECONNECT_SECONDS, longest=MAX_RECONNECT_SECONDS)
        return min(delay, self.left_seconds)
