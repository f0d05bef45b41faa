"""Delays that grow, are capped and are partly left to chance."""

import pytest

from rotator.runner.retry import backoff_seconds


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2)])
def test_the_longest_delay_doubles_with_each_attempt(attempt: int, seconds: float) -> None:
    delay = backoff_seconds(attempt, first=0.1, longest=5.0, random=lambda: 1.0)
    assert delay == pytest.approx(seconds)


@pytest.mark.parametrize(("drawn", "seconds"), [(0.0, 1.0), (0.5, 1.5), (0.999, 1.999)])
def test_chance_moves_a_delay_within_its_upper_half(drawn: float, seconds: float) -> None:
    delay = backoff_seconds(3, first=0.5, longest=5.0, random=lambda: drawn)
    assert delay == pytest.approx(seconds)


@pytest.mark.parametrize("attempt", [7, 65, 2000, 1_000_000])
def test_no_attempt_waits_longer_than_the_longest(attempt: int) -> None:
    assert backoff_seconds(attempt, first=0.1, longest=5.0, random=lambda: 1.0) == 5.0


def test_without_a_first_delay_there_is_none() -> None:
    assert backoff_seconds(4, first=0, longest=5.0) == 0


def test_two_processes_do_not_wait_in_step() -> None:
    assert len({backoff_seconds(3, first=0.1, longest=5.0) for _ in range(20)}) > 1
