"""Retries: delays, the policy for locked and rejected rows, and the budget for an unreachable server."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from random import SystemRandom
from typing import Final

from rotator.exceptions import RangeRejectedError, RangeTooSlowError

FIRST_RECONNECT_SECONDS: Final = 0.2
MAX_RECONNECT_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 30.0

_random = SystemRandom().random


def backoff_seconds(
    attempt: int, *, first: float, longest: float, random: Callable[[], float] = _random
) -> float:
    """Return a delay that doubles with each attempt; its upper half is random.

    Args:
        attempt: The number of attempts that failed; at least 1.
        first: The delay after the first attempt, in seconds.
        longest: The maximum delay, in seconds.
        random: Returns a number from 0 up to 1.
    """
    # The exponent is capped, since a float cannot hold 2 ** 2000.
    delay = min(longest, first * 2.0 ** min(attempt - 1, 64))
    return delay * (0.5 + random() / 2)


class NextStep(Enum):
    """What to do with rows that the server rejected."""

    RETRY = auto()
    SPLIT = auto()
    GIVE_UP = auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How rows are retried that are locked, or that the server rejects.

    Attributes:
        first_delay_seconds: The delay after the first failed attempt.
        max_delay_seconds: The maximum delay.
        deferrals_before_split: The deferrals after which a range is split, so that only locked rows wait.
        rejections_before_split: The attempts for a whole range where a retry may help.
        rejections_of_one_row: The attempts for a single row where a retry may help.
    """

    first_delay_seconds: float = 0.1
    max_delay_seconds: float = 5.0
    deferrals_before_split: int = 5
    rejections_before_split: int = 3
    rejections_of_one_row: int = 8

    def delay_seconds(self, attempt: int) -> float:
        """Return the delay after this number of failed attempts."""
        return backoff_seconds(attempt, first=self.first_delay_seconds, longest=self.max_delay_seconds)

    def after_rejection(self, error: RangeRejectedError, *, rows: int, rejections: int) -> NextStep:
        """Return the next step after so many rejections of so many rows."""
        is_one_row = rows <= 1
        attempts = self.rejections_of_one_row if is_one_row else self.rejections_before_split
        # A range that is too slow as a whole stays too slow.
        may_help = error.retryable and (is_one_row or not isinstance(error, RangeTooSlowError))
        if may_help and rejections < attempts:
            return NextStep.RETRY
        return NextStep.GIVE_UP if is_one_row else NextStep.SPLIT


@dataclass(slots=True, kw_only=True)
class OutageBudget:
    """The time that a run waits for an unreachable server.

    The budget is full again when a range is completed, or when the server has answered for
    ``STEADY_SECONDS``. A server that is reachable only for a moment does not refill it.

    Attributes:
        seconds: The budget.
        clock: Returns monotonic seconds.
    """

    seconds: float
    clock: Callable[[], float]
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
        delay = backoff_seconds(self._attempts, first=FIRST_RECONNECT_SECONDS, longest=MAX_RECONNECT_SECONDS)
        return min(delay, self.left_seconds)
