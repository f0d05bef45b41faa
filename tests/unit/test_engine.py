"""The engine over keys 1 to n, with planners and writers of the tests' own."""

import asyncio
import json
from collections import Counter

import pytest

from rotator.engine.engine import Engine, EngineOptions
from rotator.errors import RowsLockedError
from rotator.events import Event, RangeCompleted, RangeDeferred
from rotator.keys import Key, KeyRange, KeySpan


def _number(key: Key | None) -> int:
    return json.loads(key)[0] if key else 0


def _span(after: int, through: int) -> KeySpan:
    return KeySpan(after=Key(f"[{after}]") if after else None, through=Key(f"[{through}]"))


class _Numbers:
    """Plans ranges of whole numbers and remembers how far it got."""

    def __init__(self) -> None:
        self.planned = 0

    async def next_range(self, span: KeySpan, batch: int) -> KeyRange:
        after, last = _number(span.after), _number(span.through)
        through = min(after + batch, last)
        self.planned += 1
        return KeyRange(after=span.after, through=Key(f"[{through}]"), rows=through - after)


class _Rows:
    """Counts how often each row was written; some ranges find their rows locked at first."""

    def __init__(self, locked: dict[int, int] | None = None) -> None:
        self.written: Counter[int] = Counter()
        self.begun = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._locked = locked or {}

    async def rewrite(self, key_range: KeyRange) -> int:
        self.begun += 1
        await self.gate.wait()
        through = _number(key_range.through)
        if self._locked.get(through, 0):
            self._locked[through] -= 1
            raise RowsLockedError("locked")
        self.written.update(range(_number(key_range.after) + 1, through + 1))
        return key_range.rows


def _engine(planner: _Numbers, writer: _Rows, events: list[Event], **options: int) -> Engine:
    return Engine(planner, writer, notify=events.append, options=EngineOptions(deferral_seconds=0, **options))


@pytest.mark.parametrize("concurrency", [1, 4, 50])
async def test_every_row_of_every_span_is_written_once(concurrency: int) -> None:
    rows, events = _Rows(), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=concurrency, batch=7)
    await engine.run([_span(0, 100), _span(150, 151)], asyncio.Event())
    assert rows.written == Counter([*range(1, 101), 151])
    assert sum(event.rows for event in events if isinstance(event, RangeCompleted)) == 101


async def test_no_span_ends_at_once() -> None:
    events = list[Event]()
    await _engine(_Numbers(), _Rows(), events).run([], asyncio.Event())
    assert events == []


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_ranges_with_locked_rows_are_written_later(concurrency: int) -> None:
    rows, events = _Rows(locked=dict.fromkeys(range(10, 101, 10), 3)), list[Event]()
    engine = _engine(
        _Numbers(), rows, events, concurrency=concurrency, batch=10, queue_ranges=1, waiting_ranges=2
    )
    await engine.run([_span(0, 100)], asyncio.Event())
    assert rows.written == Counter(range(1, 101))
    assert sum(isinstance(event, RangeDeferred) for event in events) == 30
    assert {event.retries for event in events if isinstance(event, RangeCompleted)} == {3}


async def test_the_planner_waits_for_room() -> None:
    planner, rows = _Numbers(), _Rows()
    rows.gate.clear()
    engine = _engine(planner, rows, [], concurrency=2, batch=1, queue_ranges=3)
    running = asyncio.create_task(engine.run([_span(0, 1000)], asyncio.Event()))
    for _ in range(100):
        await asyncio.sleep(0)
    # Two in flight, three in the queue, one in the planner's hand.
    assert planner.planned == 6
    rows.gate.set()
    await running
    assert rows.written == Counter(range(1, 1001))


async def test_draining_finishes_what_is_in_flight_and_begins_nothing() -> None:
    planner, rows, drain = _Numbers(), _Rows(), asyncio.Event()
    rows.gate.clear()
    engine = _engine(planner, rows, [], concurrency=2, batch=1, queue_ranges=1)
    running = asyncio.create_task(engine.run([_span(0, 1000)], drain))
    for _ in range(100):
        await asyncio.sleep(0)
    drain.set()
    rows.gate.set()
    await asyncio.wait_for(running, timeout=5)
    assert rows.written == Counter([1, 2])
    assert rows.begun == 2


async def test_an_error_of_the_writer_ends_the_run_as_itself() -> None:
    class Broken(_Rows):
        async def rewrite(self, key_range: KeyRange) -> int:
            raise PermissionError(key_range.through)

    with pytest.raises(PermissionError):
        await _engine(_Numbers(), Broken(), []).run([_span(0, 10)], asyncio.Event())
