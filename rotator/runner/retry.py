"""Retries: delays, whether one may help, and the budget for an unreachable server."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom
from typing import Final

from rotator.exceptions import RangeRejectedError, RangeTooSlowError

FIRST_DELAY_SECONDS: Final = 0.1
FIRST_RECONNECT_SECONDS: Final = 0.2
MAX_DELAY_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 30.0
# The attempts where another one may help.
ATTEMPTS_OF_RANGE: Final = 3
ATTEMPTS_OF_ROW: Final = 8

_random = SystemRandom()


def backoff_seconds(attempt: int, *, first: float = FIRST_DELAY_SECONDS) -> float:
    """Return a delay that doubles with each failed attempt; its upper half is random."""
    # The exponent is capped, since a float cannot hold 2 ** 2000.
    longest = min(MAX_DELAY_SECONDS, first * 2.0 ** min(attempt - 1, 64))
    return longest * _random.uniform(0.5, 1.0)


def may_help(error: RangeRejectedError, *, rows: int, rejections: int) -> bool:
    """Return whether another attempt may help after so many rejections of the same rows.

    Otherwise, only smaller parts of them may succeed.
    """
    # A range that is too slow as a whole stays too slow.
    if not error.retryable or (rows > 1 and isinstance(error, RangeTooSlowError)):
        return False
    return rejections < (ATTEMPTS_OF_RANGE if rows > 1 else ATTEMPTS_OF_ROW)


@dataclass(slots=True, kw_only=True)
class OutageBudget:
    """The time that a run waits for an unreachable server.

    The budget is full again when a range is completed, or when the server has answered for
    ``STEADY_SECONDS``. A server that is reachable only for a moment does not refill it.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _since: float | None = None
    _unreachable_since: float | None = None
    _reachable_at: float = 0.0
    _attempts: int = 0

    @property
    def is_unreachable(self) -> bool:
        """Whether the server is unreachable now."""
        return self._unreachable_since is not None

    @property
    def left_seconds(self) -> float:
        """The rest of the budget; never negative."""
        return self.seconds if self._since is None else max(0.0, self._since + self.seconds - self.clock())

    def lost(self) -> None:
        """Record a failed attempt to reach the server."""
        if self._unreachable_since is None:
            self._unreachable_since = self.clock()
            if self._unreachable_since - self._reachable_at >= STEADY_SECONDS:
                self.refill()
        self._attempts += 1
        if self._since is None:
            self._since = self._unreachable_since

    def reached(self) -> float:
        """Record that the server is reachable, and return the seconds that it was not."""
        unreachable_since, self._unreachable_since = self._unreachable_since, None
        self._reachable_at = self.clock()
        return 0.0 if unreachable_since is None else self._reachable_at - unreachable_since

    def refill(self) -> None:
        """Start with a full budget: the server works."""
        self._since = None
        self._attempts = 0

    def delay_seconds(self) -> float:
        """Return the delay before the next attempt."""
        return min(backoff_seconds(self._attempts, first=FIRST_RECONNECT_SECONDS), self.left_seconds)
