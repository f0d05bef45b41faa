"""Delays that grow, are capped and are partly left to chance."""

from random import Random

import pytest

from rotator.runner import retry
from rotator.runner.retry import MAX_DELAY_SECONDS, backoff_seconds


class _Drawn(Random):
    """Draws the same share of each interval."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self._share


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2)])
def test_the_longest_delay_doubles_with_each_attempt(
    attempt: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_random", _Drawn(1.0))
    assert backoff_seconds(attempt, first=0.1) == pytest.approx(seconds)


@pytest.mark.parametrize(("drawn", "seconds"), [(0.0, 1.0), (0.5, 1.5), (0.999, 1.999)])
def test_chance_moves_a_delay_within_its_upper_half(
    drawn: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_random", _Drawn(drawn))
    assert backoff_seconds(3, first=0.5) == pytest.approx(seconds)


@pytest.mark.parametrize("attempt", [7, 65, 2000, 1_000_000])
def test_no_attempt_waits_longer_than_the_longest(attempt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_random", _Drawn(1.0))
    assert backoff_seconds(attempt) == MAX_DELAY_SECONDS


def test_two_processes_do_not_wait_in_step() -> None:
    assert len({backoff_seconds(3) for _ in range(20)}) > 1
