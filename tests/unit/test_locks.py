"""Which transactions that block ranges are named, and until when."""

import pytest

from rotator.events import Event, LockHeld, RangeDeferred, WorkersProgressed
from rotator.runner.locks import RECENT_SECONDS, LockWatch
from tests.unit.progress_fakes import Clock

PSQL = "pid 4711, psql"
OTHER = "pid 4712"


def test_a_transaction_is_named_after_five_seconds_until_it_ends() -> None:
    clock, events = Clock(), list[Event]()
    watch = LockWatch(events.append, clock=clock)
    for second in range(12):
        clock.now = second
        # It is seen only while a range waits.
        watch.see(frozenset({"3/1"} if second in (0, 9) else ()))
        watch.see(frozenset({f"4/{second}"}))
        watch.report({"3/1": PSQL} if second < 10 else {})
    assert events == [
        LockHeld(holders=(PSQL,), is_new=True),
        *[LockHeld(holders=(PSQL,), is_new=False)] * 4,
        LockHeld(holders=(), is_new=False),
    ]


def test_another_holder_is_new() -> None:
    clock, events = Clock(), list[Event]()
    watch = LockWatch(events.append, clock=clock)
    watch.see(frozenset({"3/1"}))
    clock.now = 3
    watch.see(frozenset({"4/1"}))
    for clock.now in (5, 8):
        watch.report({"3/1": PSQL, "4/1": OTHER})
    assert events == [LockHeld(holders=(PSQL,)), LockHeld(holders=(PSQL, OTHER))]


@pytest.mark.parametrize(
    "event",
    [RangeDeferred(rows=10), WorkersProgressed(ranges=0, rows=0, deferrals=1, retries=0, seconds=1)],
)
def test_it_looks_only_while_ranges_are_deferred(event: Event) -> None:
    clock = Clock()
    watch = LockWatch(lambda _event: None, clock=clock)
    assert not watch.is_needed
    watch.take(WorkersProgressed(ranges=1, rows=10, deferrals=0, retries=0, seconds=1))
    assert not watch.is_needed
    watch.take(event)
    assert watch.is_needed
    clock.now = RECENT_SECONDS + 0.1
    assert not watch.is_needed
