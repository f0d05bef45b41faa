"""The gate that workers pass before each range, on a clock that the tests advance."""

import asyncio

import pytest

from rotator.events import Event, Throttled, ThrottleEnded
from rotator.options import PACES
from rotator.runner.gate import SLOW_SECONDS, Gate


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class _Workers:
    """Workers that pass the gate and stay busy until a test lets them leave."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.drain = asyncio.Event()
        self.began = list[int]()
        self.turned_away = list[int]()
        self._leave = dict[int, asyncio.Event]()
        self.tasks = dict[int, asyncio.Task[None]]()

    async def start(self, *numbers: int) -> None:
        for number in numbers:
            self._leave[number] = asyncio.Event()
            self.tasks[number] = asyncio.create_task(self._work(number))
        await settle()

    async def _work(self, number: int) -> None:
        async with self.gate.passage(self.drain) as may_begin:
            (self.began if may_begin else self.turned_away).append(number)
            if may_begin:
                await self._leave[number].wait()

    async def let_leave(self, *numbers: int) -> None:
        for number in numbers:
            self._leave[number].set()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def _gate(events: list[Event] | None = None, clock: _Clock | None = None, *, concurrency: int = 4) -> Gate:
    notify = ([] if events is None else events).append
    return Gate(concurrency=concurrency, rows=2000, notify=notify, clock=clock or _Clock())


async def test_at_most_the_allowed_workers_write_and_the_others_follow_in_order() -> None:
    gate = _gate()
    gate.allow(workers=2, range_limit=PACES["balanced"].range_limit)
    workers = _Workers(gate)
    await workers.start(1, 2, 3, 4)
    assert workers.began == [1, 2]
    assert (gate.busy, gate.workers, gate.rows) == (2, 2, 250)
    await workers.let_leave(2)
    assert workers.began == [1, 2, 3]
    gate.allow()
    await settle()
    assert workers.began == [1, 2, 3, 4]
    assert (gate.workers, gate.rows) == (4, 2000)
    await workers.let_leave(1, 3, 4)
    assert gate.busy == 0


async def test_a_lower_limit_wins_over_what_the_controller_allows() -> None:
    gate = _gate()
    gate.allow(workers=3)
    gate.set_limits(concurrency=1, rows=200)
    assert (gate.workers, gate.rows) == (1, 200)
    gate.set_limits(concurrency=8, rows=200)
    assert (gate.workers, gate.rows) == (3, 200)


async def test_ranges_in_flight_are_finished_while_a_throttle_holds() -> None:
    events, clock = list[Event](), _Clock()
    gate = _gate(events, clock)
    workers = _Workers(gate)
    await workers.start(1)
    gate.hold("lag", "replica lag 14 s > 10 s")
    await workers.start(2)
    await workers.let_leave(1)
    assert workers.began == [1]
    assert gate.busy == 0
    clock.now += 3
    gate.hold("lag", "replica lag 20 s > 10 s")
    assert [hold.reason for hold in gate.holds.values()] == ["replica lag 20 s > 10 s"]
    assert gate.holds["lag"].since == 100.0
    clock.now += 2
    gate.release("lag", slowly=False)
    await settle()
    assert workers.began == [1, 2]
    await workers.let_leave(2)
    assert events == [
        Throttled(source="lag", reason="replica lag 14 s > 10 s"),
        Throttled(source="lag", reason="replica lag 20 s > 10 s", is_new=False),
        ThrottleEnded(source="lag", reason="replica lag 20 s > 10 s", seconds=5.0),
    ]


async def test_it_stays_closed_until_every_throttle_has_ended() -> None:
    gate = _gate()
    gate.hold("lag", "replica lag 14 s > 10 s")
    gate.hold("pause", "paused by ops")
    workers = _Workers(gate)
    await workers.start(1)
    gate.release("lag")
    gate.release("lag")
    await settle()
    assert workers.began == []
    assert [hold.reason for hold in gate.holds.values()] == ["paused by ops"]
    gate.release("pause")
    await settle()
    assert workers.began == [1]
    await workers.let_leave(1)


async def test_a_drain_turns_waiting_workers_away() -> None:
    gate = _gate(concurrency=1)
    workers = _Workers(gate)
    await workers.start(1, 2)
    workers.drain.set()
    await workers.start(3)
    assert workers.began == [1]
    assert sorted(workers.turned_away) == [2, 3]
    await workers.let_leave(1)
    assert gate.busy == 0


@pytest.mark.parametrize("frees_first", [False, True])
async def test_a_cancelled_worker_leaves_its_place_to_the_next(*, frees_first: bool) -> None:
    gate = _gate(concurrency=1)
    workers = _Workers(gate)
    await workers.start(1, 2, 3)
    if frees_first:
        # Worker 2 is admitted and cancelled before it runs.
        workers.tasks[1].cancel()
        await asyncio.sleep(0)
    workers.tasks[2].cancel()
    workers.tasks[1].cancel()
    await settle()
    assert workers.began == [1, 3]
    await workers.let_leave(3)
    assert gate.busy == 0


async def test_after_a_throttle_each_range_is_followed_by_a_pause_as_long_as_itself() -> None:
    clock = _Clock()
    gate = _gate(clock=clock, concurrency=1)
    gate.hold("lag", "replica lag 14 s > 10 s")
    gate.release("lag")
    workers = _Workers(gate)
    await workers.start(1, 2)
    clock.now += 0.2
    await workers.let_leave(1)
    assert workers.began == [1]
    await workers.tasks[1]
    await settle()
    assert workers.began == [1, 2]
    clock.now += SLOW_SECONDS
    await workers.start(3)
    await workers.let_leave(2)
    assert workers.began == [1, 2, 3]
    await workers.let_leave(3)
