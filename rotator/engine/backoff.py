"""How long to wait before trying again: pure, with the randomness as an argument."""

from collections.abc import Callable
from random import SystemRandom

_random = SystemRandom().random


def backoff_seconds(
    attempt: int, *, first: float, longest: float, random: Callable[[], float] = _random
) -> float:
    """Return an exponentially growing delay, of which the upper half is left to chance.

    Args:
        attempt: How often it was tried in vain; at least 1.
        first: The delay after the first attempt, in seconds.
        longest: No delay is longer, in seconds.
        random: Gives a number from 0 up to 1.
    """
    # The exponent is capped, since a float has no room for 2 ** 2000.
    most = min(longest, first * 2.0 ** min(attempt - 1, 64))
    return most * (0.5 + random() / 2)
