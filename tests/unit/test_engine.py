"""The engine over keys 1 to n, with planners and writers of the tests' own."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable

import pytest

from rotator.events import Event, RangeCompleted, RangeDeferred, RangeRetried, RowRejected
from rotator.exceptions import EveryRowRejectedError, RangeRejectedError, RangeTooSlowError, RowsLockedError
from rotator.options import PACES
from rotator.ranges import Key, KeyInterval, KeyRange, Written
from rotator.runner import engine as engine_module
from rotator.runner import retry
from rotator.runner.engine import Engine
from rotator.runner.gate import Gate


@pytest.fixture(autouse=True)
def _without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "backoff_seconds", lambda _attempt: 0.0)
    monkeypatch.setattr(engine_module, "PROBE_DELAY_SECONDS", 0.0)


def _number(key: Key | None) -> int:
    return json.loads(key)[0] if key else 0


def _span(after: int, through: int) -> KeyInterval:
    return KeyInterval(after=Key(f"[{after}]") if after else None, through=Key(f"[{through}]"))


class _Numbers:
    """Plans ranges of whole numbers and remembers how far it got."""

    def __init__(self) -> None:
        self.planned = 0
        self.batches = list[int]()

    async def next_range(self, span: KeyInterval, batch: int) -> KeyRange:
        after, last = _number(span.after), _number(span.through)
        through = min(after + batch, last)
        self.planned += 1
        self.batches.append(batch)
        return KeyRange(after=span.after, through=Key(f"[{through}]"), rows=through - after)


class _LockedTable(_Numbers):
    """The same for a table that another session has locked at first."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._times = times

    async def next_range(self, span: KeyInterval, batch: int) -> KeyRange:
        if self._times:
            self._times -= 1
            raise RowsLockedError("locked")
        return await super().next_range(span, batch)


# On the server.
ROW_SECONDS = 0.001


class _Rows:
    """Counts how often each row was written; some ranges find their rows locked at first."""

    def __init__(self, locked: dict[int, int] | None = None) -> None:
        self.written: Counter[int] = Counter()
        self.begun = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._locked = locked or {}

    async def rewrite(self, key_range: KeyRange) -> Written:
        self.begun += 1
        await self.gate.wait()
        through = _number(key_range.through)
        if self._locked.get(through, 0):
            self._locked[through] -= 1
            raise RowsLockedError("locked")
        self.written.update(range(_number(key_range.after) + 1, through + 1))
        return Written(
            rows=key_range.rows, has_other_writes=False, server_seconds=key_range.rows * ROW_SECONDS
        )


def _engine(
    planner: _Numbers,
    writer: _Rows,
    events: list[Event],
    *,
    concurrency: int = 4,
    batch: int = 2000,
    max_rows: int | None = None,
    has_rotated: bool = False,
) -> Engine:
    gate = Gate(concurrency=concurrency, rows=batch, notify=events.append)
    return Engine(
        planner.next_range,
        writer.rewrite,
        gate,
        notify=events.append,
        max_rows=max_rows,
        has_rotated=has_rotated,
    )


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
async def test_ranges_with_locked_rows_are_written_later(
    concurrency: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "QUEUE_RANGES", 1)
    monkeypatch.setattr(engine_module, "WAITING_RANGES", 2)
    rows, events = _Rows(locked=dict.fromkeys(range(10, 101, 10), 3)), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=concurrency, batch=10)
    await engine.run([_span(0, 100)], asyncio.Event())
    assert rows.written == Counter(range(1, 101))
    assert sum(isinstance(event, RangeDeferred) for event in events) == 30


async def test_the_planner_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "QUEUE_RANGES", 3)
    planner, rows = _Numbers(), _Rows()
    rows.gate.clear()
    engine = _engine(planner, rows, [], concurrency=2, batch=1)
    running = asyncio.create_task(engine.run([_span(0, 1000)], asyncio.Event()))
    for _ in range(100):
        await asyncio.sleep(0)
    # Two in flight, three in the queue, one in the planner's hand.
    assert planner.planned == 6
    rows.gate.set()
    await running
    assert rows.written == Counter(range(1, 1001))


async def test_a_locked_table_is_waited_for() -> None:
    rows, events = _Rows(), list[Event]()
    await _engine(_LockedTable(3), rows, events, batch=7).run([_span(0, 100)], asyncio.Event())
    assert rows.written == Counter(range(1, 101))
    assert events.count(RangeDeferred(rows=0)) == 3


async def test_a_drain_ends_the_waiting_for_a_locked_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "backoff_seconds", lambda _attempt: 1000.0)
    rows, drain = _Rows(), asyncio.Event()

    def notify(event: Event) -> None:
        assert isinstance(event, RangeDeferred)
        drain.set()

    engine = Engine(
        _LockedTable(1000).next_range,
        rows.rewrite,
        Gate(concurrency=4, rows=2000, notify=notify),
        notify=notify,
    )
    await engine.run([_span(0, 100)], drain)
    assert rows.written == Counter()


async def test_draining_finishes_what_is_in_flight_and_begins_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "QUEUE_RANGES", 1)
    planner, rows, drain = _Numbers(), _Rows(), asyncio.Event()
    rows.gate.clear()
    engine = _engine(planner, rows, [], concurrency=2, batch=1)
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
        async def rewrite(self, key_range: KeyRange) -> Written:
            raise PermissionError(key_range.through)

    with pytest.raises(PermissionError):
        await _engine(_Numbers(), Broken(), []).run([_span(0, 10)], asyncio.Event())


class _Refusals(_Rows):
    """Rejects every range that holds one of these rows: always, or a limited number of times."""

    def __init__(
        self, refused: Iterable[int], *, retryable: bool = False, times: int | None = None, slow_rows: int = 0
    ) -> None:
        super().__init__()
        self.tried = list[tuple[int, int]]()
        self._refused = set(refused)
        self._retryable = retryable
        self._left = times
        self._slow_rows = slow_rows

    async def rewrite(self, key_range: KeyRange) -> Written:
        after, through = _number(key_range.after), _number(key_range.through)
        self.tried.append((after, through))
        if self._slow_rows and key_range.rows >= self._slow_rows:
            raise RangeTooSlowError("query_canceled")
        if self._left != 0 and any(after < row <= through for row in self._refused):
            if self._left is not None:
                self._left -= 1
            raise RangeRejectedError("check_violation of sober", retryable=self._retryable)
        return await super().rewrite(key_range)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("refused", [{1}, {37}, {100}, {50, 51}, {1, 2, 3, 64, 99, 100}])
async def test_refused_ranges_are_split_down_to_the_rows_at_fault(
    concurrency: int, refused: set[int]
) -> None:
    rows, events = _Refusals(refused), list[Event]()
    await _engine(_Numbers(), rows, events, concurrency=concurrency, batch=20).run(
        [_span(0, 100)], asyncio.Event()
    )
    assert rows.written == Counter(set(range(1, 101)) - refused)
    failed = [event for event in events if isinstance(event, RowRejected)]
    assert {(event.key, event.reason) for event in failed} == {
        (f"[{row}]", "check_violation of sober") for row in refused
    }
    assert len(failed) == len(refused)


async def test_a_refusal_for_good_is_never_tried_again_whole() -> None:
    rows, events = _Refusals({3}), list[Event]()
    await _engine(_Numbers(), rows, events, concurrency=1, batch=4).run([_span(0, 4)], asyncio.Event())
    assert sorted(rows.tried) == [(0, 1), (0, 4), (1, 2), (1, 4), (2, 3), (2, 4), (3, 4)]
    assert [(event.rows, event.split) for event in events if isinstance(event, RangeRetried)] == [
        (4, True),
        (3, True),
        (2, True),
    ]


async def test_a_refusal_that_passes_is_tried_again_whole() -> None:
    rows, events = _Refusals({3}, retryable=True, times=2), list[Event]()
    await _engine(_Numbers(), rows, events, concurrency=1, batch=4).run([_span(0, 4)], asyncio.Event())
    assert rows.tried == [(0, 4)] * 3
    assert [event.split for event in events if isinstance(event, RangeRetried)] == [False, False]


async def test_a_refusal_that_might_have_passed_is_split_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS_OF_RANGE", 2)
    monkeypatch.setattr(retry, "ATTEMPTS_OF_ROW", 5)
    rows, events = _Refusals({3}, retryable=True), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=1, batch=4)
    await engine.run([_span(0, 4)], asyncio.Event())
    assert Counter(rows.tried) == {
        (0, 4): 2,
        (0, 1): 1,
        (1, 4): 2,
        (1, 2): 1,
        (2, 4): 2,
        (2, 3): 5,
        (3, 4): 1,
    }
    assert [event.key for event in events if isinstance(event, RowRejected)] == ["[3]"]
    assert rows.written == Counter([1, 2, 4])


async def test_too_many_rows_at_fault_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_FAILED_ROWS", 5)
    refused = _Refusals(range(2, 101))
    engine = _engine(_Numbers(), refused, [], concurrency=2, batch=10)
    with pytest.raises(RangeRejectedError, match="check_violation of sober"):
        await engine.run([_span(0, 100)], asyncio.Event())


@pytest.mark.parametrize("retryable", [True, False])
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_fault_that_every_row_meets_ends_the_run_after_a_few_ranges(
    concurrency: int, *, retryable: bool
) -> None:
    rows, events = _Refusals(range(1, 100_001), retryable=retryable), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=concurrency, batch=1000)
    with pytest.raises(EveryRowRejectedError, match=r"the last .* rows .* check_violation of sober"):
        await engine.run([_span(0, 100_000)], asyncio.Event())
    assert len(rows.tried) < 250
    assert 8 <= sum(isinstance(event, RowRejected) for event in events) <= 8 + concurrency


async def test_a_fault_that_every_row_of_one_range_meets_ends_the_run_too() -> None:
    rows = _Refusals(range(1, 1001))
    with pytest.raises(EveryRowRejectedError):
        await _engine(_Numbers(), rows, [], concurrency=4, batch=1000).run([_span(0, 1000)], asyncio.Event())
    assert len(rows.tried) < 100


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_fault_that_every_row_meets_from_some_moment_on_ends_the_run_too(
    concurrency: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _Refusals(range(5001, 100_001))
    # It ends before the rest of the first range is due.
    monkeypatch.setattr(engine_module, "PROBE_DELAY_SECONDS", 1000.0)
    engine = _engine(_Numbers(), rows, [], concurrency=concurrency, batch=1000)
    with pytest.raises(EveryRowRejectedError, match=r"the last .* rows .* check_violation of sober"):
        await engine.run([_span(0, 100_000)], asyncio.Event())
    assert sum(rows.written.values()) == 5000
    assert len(rows.tried) < 60


@pytest.mark.parametrize("batch", [100, 1000])
async def test_a_block_of_rows_at_fault_does_not_keep_the_others_from_being_rotated(batch: int) -> None:
    refused = set(range(500, 1400))
    rows, events = _Refusals(refused), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=2, batch=batch)
    await engine.run([_span(0, 3000)], asyncio.Event())
    assert {_number(event.key) for event in events if isinstance(event, RowRejected)} == refused
    assert sum(rows.written.values()) == 2100

    # Resumed, the rejected rows are the first gaps.
    more = _Refusals(refused)
    engine = _engine(_Numbers(), more, events, concurrency=2, batch=batch, has_rotated=True)
    await engine.run([*(_span(key - 1, key) for key in sorted(refused)), _span(3000, 4000)], asyncio.Event())
    assert sum(more.written.values()) == 1000


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_neighbouring_rows_at_fault_are_all_named(concurrency: int) -> None:
    refused = {*range(1500, 1600), *range(9901, 10_001)}
    rows, events = _Refusals(refused), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=concurrency, batch=1000)
    await engine.run([_span(0, 10_000)], asyncio.Event())
    assert {_number(event.key) for event in events if isinstance(event, RowRejected)} == refused
    assert sum(rows.written.values()) == 10_000 - len(refused)


async def test_a_range_that_is_too_slow_is_split_at_once_and_the_next_ones_are_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "QUEUE_RANGES", 1)
    planner, rows = _Numbers(), _Refusals((), slow_rows=40)
    engine = _engine(planner, rows, [], concurrency=1, batch=128)
    await engine.run([_span(0, 1280)], asyncio.Event())
    assert rows.written == Counter(range(1, 1281))
    assert max(through - after for after, through in rows.tried[-10:]) < 40
    assert len(rows.tried) == len(set(rows.tried))


@pytest.mark.parametrize(("most", "planned"), [(0, []), (1, [1]), (7, [7]), (10, [10]), (25, [10, 10, 5])])
async def test_no_more_rows_are_planned_than_were_asked_for(most: int, planned: list[int]) -> None:
    planner, rows = _Numbers(), _Rows()
    engine = _engine(planner, rows, [], concurrency=2, batch=10, max_rows=most)
    await engine.run([_span(0, 100)], asyncio.Event())
    assert planner.batches == planned
    assert rows.written == Counter(range(1, most + 1))


async def test_rows_are_counted_over_all_spans() -> None:
    rows = _Rows()
    engine = _engine(_Numbers(), rows, [], concurrency=2, batch=10, max_rows=12)
    await engine.run([_span(0, 8), _span(20, 28)], asyncio.Event())
    assert rows.written == Counter([*range(1, 9), *range(21, 25)])


async def test_rows_that_stay_locked_hold_up_only_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "DEFERRALS_BEFORE_SPLIT", 2)
    rows, events = _Rows(locked={8: 40}), list[Event]()
    engine = _engine(_Numbers(), rows, events, concurrency=1, batch=8)
    await engine.run([_span(0, 32)], asyncio.Event())
    assert rows.written == Counter(range(1, 33))
    deferred = [event.rows for event in events if isinstance(event, RangeDeferred)]
    assert deferred[:4] == [8, 8, 4, 2]
    assert set(deferred[4:]) == {1}


async def test_ranges_that_were_planned_larger_than_the_pace_allows_are_cut() -> None:
    rows, events = _Rows(), list[Event]()
    rows.gate.clear()
    gate = Gate(concurrency=2, rows=100, notify=events.append)
    engine = Engine(_Numbers().next_range, rows.rewrite, gate, notify=events.append)
    running = asyncio.create_task(engine.run([_span(0, 2000)], asyncio.Event()))
    for _ in range(100):
        await asyncio.sleep(0)
    for _ in range(16):
        gate.count_completed(100, 100 * ROW_SECONDS)
    gate.allow(workers=1, range_limit=PACES["balanced"].range_limit)
    rows.gate.set()
    await running
    assert rows.written == Counter(range(1, 2001))
    sizes = [event.rows for event in events if isinstance(event, RangeCompleted)]
    assert sizes[:2] == [100, 100]
    assert max(sizes[2:]) <= 2 * 25
