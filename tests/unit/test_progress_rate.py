import pytest

from rotator.stats import WINDOW_SECONDS, RecentRate


def steady(rate: RecentRate, *, begin: float, ranges: int, every: float, rows: int = 2000) -> float:
    """Complete ranges at a steady pace and return when the last one was."""
    now = begin
    for _ in range(ranges):
        now += every
        rate.add(rows, now=now, seconds=every)
    return now


def test_nothing_is_known_before_the_first_range() -> None:
    rate = RecentRate()
    assert rate.rows_per_second(5) is None
    assert rate.eta_seconds(1000, 5) is None


def test_nothing_is_said_while_warming_up() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=3, every=0.5)
    assert rate.rows_per_second(now) is None
    now = steady(rate, begin=now, ranges=2, every=0.5)
    assert rate.rows_per_second(now) == pytest.approx(4000)


def test_a_steady_pace_gives_its_rate_and_eta() -> None:
    rate = RecentRate()
    now = steady(rate, begin=100, ranges=600, every=0.1)
    assert rate.rows_per_second(now) == pytest.approx(20_000, rel=0.02)
    assert rate.eta_seconds(400_000, now) == pytest.approx(20, rel=0.02)


def test_the_rate_follows_the_recent_pace_not_the_mean() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=1000, every=0.1)
    now = steady(rate, begin=now, ranges=30, every=1.0)
    assert rate.rows_per_second(now) == pytest.approx(2000, rel=0.05)


def test_bursts_of_four_slow_workers_do_not_make_it_jump() -> None:
    rate = RecentRate()
    seen = []
    for tenth in range(1, 1200):
        now = tenth / 10
        if tenth % 80 == 0:
            for worker in range(4):
                rate.add(2000, now=now + worker / 100, seconds=8.0)
        known = rate.rows_per_second(now + 0.05)
        if known is not None:
            seen.append(known)
    assert len(seen) > 1000
    assert min(seen) > 900
    assert max(seen) < 1100


def test_slow_ranges_of_uneven_length_do_not_make_it_jump() -> None:
    rate, now, seen = RecentRate(), 0.0, []
    for turn in range(40):
        seconds = 2.0 if turn % 3 else 30.0
        now += seconds
        rate.add(2000, now=now, seconds=seconds)
        if turn >= 10:
            seen.append(rate.rows_per_second(now))
    assert seen == pytest.approx([6000 / 34] * 30, rel=0.3)


def test_silence_no_longer_than_a_range_changes_nothing() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=20, every=3.0)
    assert rate.rows_per_second(now + 2.9) == pytest.approx(rate.rows_per_second(now))


def test_a_stall_lets_the_rate_decay_and_takes_the_eta_away() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=600, every=0.1)
    rates = [rate.rows_per_second(now + silence) for silence in range(0, 300, 5)]
    assert all(rate is not None for rate in rates)
    known = [rate for rate in rates if rate is not None]
    assert known == sorted(known, reverse=True)
    assert 0 < known[-1] < known[0] / 50
    assert rate.eta_seconds(1000, now + 300) is None


def test_the_eta_is_taken_away_after_ten_silent_seconds() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=600, every=0.1)
    assert rate.eta_seconds(1_000_000, now + 9) is not None
    assert rate.eta_seconds(1_000_000, now + 11) is None


def test_a_stall_is_forgotten_a_window_after_it_ended() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=600, every=0.1)
    now = steady(rate, begin=now + 100, ranges=100, every=0.1)
    half = rate.rows_per_second(now)
    assert half == pytest.approx(10_000, rel=0.05)
    now = steady(rate, begin=now, ranges=110, every=0.1)
    assert rate.rows_per_second(now) == pytest.approx(20_000, rel=0.05)


def test_a_restart_forgets_everything() -> None:
    rate = RecentRate()
    now = steady(rate, begin=0, ranges=600, every=0.1)
    rate.restart()
    assert rate.rows_per_second(now) is None
    now = steady(rate, begin=now + 60, ranges=5, every=1.0)
    assert rate.rows_per_second(now) == pytest.approx(2000)


def test_what_is_left_is_never_negative() -> None:
    rate = RecentRate()
    assert rate.eta_seconds(0, 1) == 0
    assert rate.eta_seconds(-5, 1) == 0


def test_the_time_is_unknown_once_an_estimate_of_the_rows_is_exceeded() -> None:
    rate = RecentRate()
    assert rate.eta_seconds(0, 1, is_exact=False) is None
    assert rate.eta_seconds(-5, 1, is_exact=False) is None


def test_memory_does_not_grow_with_the_number_of_ranges() -> None:
    rate = RecentRate()
    for step in range(100_000):
        rate.add(100, now=step / 1000, seconds=0.01)
    assert rate.rows_per_second(100) == pytest.approx(100_000, rel=0.02)
    assert len(rate._samples) <= WINDOW_SECONDS / 0.25 + 2  # noqa: SLF001 - the memory cap is the point


def test_what_is_held_up_has_no_eta_although_little_is_left() -> None:
    rate = RecentRate()
    for step in range(100):
        rate.add(2000, now=step / 10, seconds=0.1)
    now = 9.9
    assert rate.eta_seconds(2000, now + 0.5) == pytest.approx(0.1, rel=0.1)
    assert rate.eta_seconds(2000, now + 1.1) is None
    # With much left, a second without a completed range says nothing.
    assert rate.eta_seconds(400_000, now + 1.1) is not None
