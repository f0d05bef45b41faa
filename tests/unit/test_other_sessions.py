"""Whether other sessions are at work, from the server's statistics, to which sessions add once a second."""

import random

import pytest

from rotator.postgres.probes import Activity
from rotator.runner.pacing import OtherSessions

STEP_SECONDS = 0.25


class _Server:
    """A server's statistics: each session adds its counts once a second, at its own time.

    Attributes:
        ranges_per_second: Of each of four workers; the planner's queries are counted apart.
        others_per_second: The commits of eight other sessions.
    """

    def __init__(self, seed: int = 1) -> None:
        chance = random.Random(seed)  # noqa: S311 - it must be reproducible
        self.at = 1000.0
        self.ranges_per_second = self.others_per_second = 0.0
        self._commits = self._ranges = self.ranges = 0.0
        # The time of the next report, and what it will contain.
        self._sessions = {
            name: [self.at + chance.random(), 0.0]
            for name in ("planner", *(f"worker {n}" for n in range(4)), *(f"other {n}" for n in range(8)))
        }

    def step(self) -> Activity:
        self.at += STEP_SECONDS
        for name, session in self._sessions.items():
            rate = self.others_per_second / 8 if name.startswith("other") else self.ranges_per_second
            session[1] += STEP_SECONDS * (rate / 4 if name.startswith("worker") else rate)
            if session[0] <= self.at:
                self._commits += session[1]
                self._ranges += session[1] if name.startswith("worker") else 0.0
                session[:] = [self.at + 1.0, 0.0]
        self.ranges += self.ranges_per_second * STEP_SECONDS
        return Activity(
            at=self.at, commits=int(self._commits), ranges=int(self._ranges), writes=0, recent_sessions=0
        )


def _seconds_until(others: OtherSessions, server: _Server, *, active: bool, limit: float = 60.0) -> float:
    began = server.at
    while server.at - began < limit:
        others.add(server.step(), ranges=int(server.ranges), own_commits=0)
        if others.are_active is active:
            return server.at - began
    return limit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranges_per_second", [1.0, 70.0, 300.0, 1000.0])
def test_our_own_ranges_are_not_other_sessions(ranges_per_second: float, seed: int) -> None:
    server = _Server(seed)
    server.ranges_per_second = ranges_per_second
    assert _seconds_until(OtherSessions(), server, active=True) == 60


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranges_per_second", [0.0, 70.0, 200.0])
def test_other_sessions_are_seen_within_2_seconds_and_their_end_within_8(
    ranges_per_second: float, seed: int
) -> None:
    server, others = _Server(seed), OtherSessions()
    server.ranges_per_second = ranges_per_second
    _seconds_until(others, server, active=True, limit=10)
    server.others_per_second = 400.0
    assert _seconds_until(others, server, active=True) <= 2
    assert _seconds_until(others, server, active=False, limit=30) == 30
    server.others_per_second = 0.0
    assert _seconds_until(others, server, active=False) <= 8


def test_a_few_sessions_are_seen_too() -> None:
    server, others = _Server(), OtherSessions()
    server.ranges_per_second, server.others_per_second = 20.0, 60.0
    assert _seconds_until(others, server, active=True) <= 6


def test_the_queries_of_a_start_are_not_other_sessions() -> None:
    others = OtherSessions()
    others.add(Activity(at=10.0, commits=1000, ranges=0, writes=0), ranges=0, own_commits=0)
    others.add(Activity(at=11.4, commits=1110, ranges=8, writes=2), ranges=0, own_commits=10)
    assert not others.are_active


def test_as_many_queries_at_once_are_other_sessions_later() -> None:
    others = OtherSessions()
    for step in range(40):
        others.add(
            Activity(at=step / 4, commits=1000, ranges=0, writes=0),
            ranges=0,
            own_commits=0,
        )
    others.add(Activity(at=11.4, commits=1110, ranges=8, writes=2), ranges=0, own_commits=10)
    assert others.are_active


def test_our_probes_are_not_other_sessions() -> None:
    others = OtherSessions()
    for step in range(100):
        others.add(
            Activity(at=step / 4, commits=1000 + 20 * step, ranges=0, writes=0),
            ranges=0,
            own_commits=20 * step,
        )
    assert not others.are_active


@pytest.mark.parametrize(("recent_sessions", "seconds"), [(0, 0.3), (1, 1.2)])
def test_sessions_that_were_seen_have_a_second_to_add_their_commits(
    recent_sessions: int, seconds: float
) -> None:
    others = OtherSessions()
    for at, is_known in ((0.0, False), (seconds - 0.01, False), (seconds, True)):
        counts = Activity(at=at, commits=0, ranges=0, writes=0, recent_sessions=recent_sessions)
        others.add(counts, ranges=0, own_commits=0)
        assert others.are_known == is_known
