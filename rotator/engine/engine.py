"""Streams ranges from the planner through a bounded queue to the workers."""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rotator.engine.ports import RangePlanner, RangeWriter
from rotator.errors import RowsLockedError
from rotator.events import Observer, RangeCompleted, RangeDeferred
from rotator.keys import KeyRange, KeySpan


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How a rotation is worked on.

    Attributes:
        concurrency: How many workers write at the same time.
        batch: How many rows a range holds.
        queue_ranges: How many planned ranges may wait; the memory cap.
        deferred_ranges: How many ranges with locked rows may wait before workers turn to them first.
        deferral_seconds: How long a range with locked rows waits at the least.
    """

    concurrency: int = 4
    batch: int = 2000
    queue_ranges: int = 16
    deferred_ranges: int = 16
    deferral_seconds: float = 0.1


class _Deferred(NamedTuple):
    due: float
    key_range: KeyRange
    retries: int


class Engine:
    """One pass over some spans of keys."""

    def __init__(
        self, planner: RangePlanner, writer: RangeWriter, *, notify: Observer, options: EngineOptions
    ) -> None:
        self._planner = planner
        self._writer = writer
        self._notify = notify
        self._options = options

    async def run(self, spans: Iterable[KeySpan], drain: asyncio.Event) -> None:
        """Rewrite every range of the spans.

        Args:
            spans: Where no range is completed yet, in the order to plan them.
            drain: Once set, no more ranges are begun; those in flight are finished.

        Raises:
            Exception: What the planner or the writer raised first, other than RowsLockedError. The
                other workers are cancelled.
        """
        flow = _Flow(self._options, drain)
        try:
            async with asyncio.TaskGroup() as tasks:
                planner = tasks.create_task(self._plan(spans, flow), name="rotator planner")
                await asyncio.wait(
                    [
                        tasks.create_task(self._work(flow), name=f"rotator worker {number}")
                        for number in range(1, self._options.concurrency + 1)
                    ]
                )
                # A drained planner may still wait for room that nobody makes any more.
                planner.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _plan(self, spans: Iterable[KeySpan], flow: "_Flow") -> None:
        for span in spans:
            rest = span
            while not flow.drain.is_set():
                key_range = await self._planner.next_range(rest, self._options.batch)
                if key_range is None:
                    break
                await flow.put(key_range)
                if key_range.through == span.through:
                    break
                rest = KeySpan(after=key_range.through, through=span.through)
        await flow.close()

    async def _work(self, flow: "_Flow") -> None:
        clock = asyncio.get_running_loop().time
        while (item := await flow.take()) is not None:
            key_range, retries = item
            started = clock()
            try:
                rows = await self._writer.rewrite(key_range)
            except RowsLockedError:
                flow.defer(key_range, retries + 1)
                self._notify(RangeDeferred(rows=key_range.rows))
            else:
                self._notify(RangeCompleted(rows=rows, seconds=clock() - started, retries=retries))


class _Flow:
    """The bounded queue, and beside it the ranges that wait for somebody else's locks."""

    def __init__(self, options: EngineOptions, drain: asyncio.Event) -> None:
        self.drain = drain
        self._options = options
        self._clock = asyncio.get_running_loop().time
        self._queue: asyncio.Queue[KeyRange | None] = asyncio.Queue(options.queue_ranges)
        self._deferred: deque[_Deferred] = deque()
        self._closed = False

    async def put(self, key_range: KeyRange) -> None:
        """Wait for room, then let a worker have the range."""
        await self._queue.put(key_range)

    async def close(self) -> None:
        """Tell the workers that no more ranges come."""
        await self._queue.put(None)

    def defer(self, key_range: KeyRange, retries: int) -> None:
        """Let a range wait for its locked rows."""
        self._deferred.append(_Deferred(self._clock() + self._options.deferral_seconds, key_range, retries))

    async def take(self) -> tuple[KeyRange, int] | None:
        """The next range and how often it was tried before; None when this worker may go."""
        while not self.drain.is_set():
            if self._deferred and self._must_turn_to_deferred():
                first = self._deferred.popleft()
                await asyncio.sleep(first.due - self._clock())
                return None if self.drain.is_set() else (first.key_range, first.retries)
            if self._closed:
                return None
            key_range = await self._get()
            if key_range is not None:
                return key_range, 0
        return None

    def _must_turn_to_deferred(self) -> bool:
        return (
            self._closed
            or len(self._deferred) >= self._options.deferred_ranges
            or self._deferred[0].due <= self._clock()
        )

    async def _get(self) -> KeyRange | None:
        """The next planned range; None where a deferred one is due first, or the queue was closed."""
        until = self._deferred[0].due if self._deferred else None
        try:
            async with asyncio.timeout_at(until):
                key_range = await self._queue.get()
        except TimeoutError:
            return None
        if key_range is None:
            self._closed = True
            # The next worker wants to hear it too; there is room, since one was just taken out.
            self._queue.put_nowait(None)
        return key_range
