"""The budget for an unreachable server, with an injected clock."""

from rotator.runner.retry import FIRST_RECONNECT_SECONDS, MAX_DELAY_SECONDS, STEADY_SECONDS, OutageBudget


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _budget(seconds: float = 60.0) -> tuple[OutageBudget, _Clock]:
    clock = _Clock()
    return OutageBudget(seconds=seconds, clock=clock), clock


def test_a_server_that_answers_uses_nothing_up() -> None:
    budget, clock = _budget()
    clock.now += 500
    assert not budget.is_unreachable
    assert budget.left_seconds == 60


def test_the_budget_runs_from_the_first_loss() -> None:
    budget, clock = _budget()
    budget.lost()
    clock.now += 20
    budget.lost()
    clock.now += 15
    assert budget.is_unreachable
    assert budget.left_seconds == 25


def test_the_budget_is_never_negative() -> None:
    budget, clock = _budget()
    budget.lost()
    clock.now += 61
    assert budget.left_seconds == 0


def test_a_server_that_is_back_says_how_long_it_was_away() -> None:
    budget, clock = _budget()
    budget.lost()
    clock.now += 12
    assert budget.reached() == 12
    assert not budget.is_unreachable


def test_a_server_that_was_never_away_was_away_for_no_time() -> None:
    budget, _ = _budget()
    assert budget.reached() == 0


def test_a_short_reconnection_does_not_refill_the_budget() -> None:
    budget, clock = _budget()
    budget.lost()
    clock.now += 10
    budget.reached()
    clock.now += 10
    budget.lost()
    assert budget.left_seconds == 40
    clock.now += 5
    # The time in between was no outage.
    assert budget.reached() == 5


def test_a_completed_range_gives_the_whole_budget_back() -> None:
    budget, clock = _budget()
    budget.lost()
    clock.now += 50
    budget.reached()
    budget.refill()
    assert budget.left_seconds == 60
    clock.now += 50
    budget.lost()
    clock.now += 1
    assert budget.left_seconds == 59


def test_delays_grow_and_are_capped() -> None:
    budget, _ = _budget(seconds=1000.0)
    budget.lost()
    assert FIRST_RECONNECT_SECONDS / 2 <= budget.delay_seconds() <= FIRST_RECONNECT_SECONDS
    for _ in range(20):
        budget.lost()
    assert MAX_DELAY_SECONDS / 2 <= budget.delay_seconds() <= MAX_DELAY_SECONDS


def test_no_delay_is_longer_than_what_is_left() -> None:
    budget, clock = _budget()
    for _ in range(20):
        budget.lost()
    clock.now += 59.5
    assert budget.delay_seconds() == 0.5


def test_a_server_that_has_answered_for_long_begins_a_new_budget() -> None:
    budget, clock = _budget()
    budget.lost()
    clock.now += 50
    budget.reached()
    clock.now += STEADY_SECONDS
    budget.lost()
    assert budget.left_seconds == 60
