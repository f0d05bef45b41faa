"""The bounded queue of planned ranges, and the ranges that wait for a retry."""

import asyncio
import heapq
from itertools import count
from typing import NamedTuple

from rotator.ranges import KeyRange


class Attempt(NamedTuple):
    """A range in a worker's hand.

    Attributes:
        key_range: What to write.
        deferrals: How often its rows were found locked.
        refusals: How often the server refused it.
        is_probed: Whether its first row was tried alone, while no row had been rotated.
    """

    key_range: KeyRange
    deferrals: int = 0
    refusals: int = 0
    is_probed: bool = False


class _Waiting(NamedTuple):
    due: float
    number: int
    attempt: Attempt


class WorkQueue:
    """Hands planned ranges to workers, and ranges that are due for another attempt before them."""

    def __init__(self, drain: asyncio.Event, *, queue_ranges: int, waiting_ranges: int) -> None:
        """Make the queue; to be called in the running loop.

        Args:
            drain: Once set, workers are handed nothing more.
            queue_ranges: How many planned ranges may wait; the memory cap.
            waiting_ranges: How many ranges may wait for another attempt before workers turn to them first.
        """
        self.drain = drain
        self._queue: asyncio.Queue[KeyRange | None] = asyncio.Queue(queue_ranges)
        self._waiting: list[_Waiting] = []
        self._waiting_ranges = waiting_ranges
        self._numbers = count()
        self._clock = asyncio.get_running_loop().time
        self._closed = False

    @property
    def is_full(self) -> bool:
        """Whether as many ranges wait for another attempt as may."""
        return len(self._waiting) >= self._waiting_ranges

    async def put(self, key_range: KeyRange) -> None:
        """Wait for room, then let a worker have the range."""
        await self._queue.put(key_range)

    async def close(self) -> None:
        """Tell the workers that no more ranges come."""
        await self._queue.put(None)

    def requeue(self, attempt: Attempt, *, delay_seconds: float) -> None:
        """Let a range wait for another attempt."""
        heapq.heappush(self._waiting, _Waiting(self._clock() + delay_seconds, next(self._numbers), attempt))

    async def take(self) -> Attempt | None:
        """The next range; None when this worker may go."""
        while not self.drain.is_set():
            if self._waiting and self._takes_waiting():
                first = heapq.heappop(self._waiting)
                return None if await self._drained_until(first.due) else first.attempt
            if self._closed:
                return None
            key_range = await self._get()
            if key_range is not None:
                return Attempt(key_range)
        return None

    def _takes_waiting(self) -> bool:
        return self._closed or self.is_full or self._waiting[0].due <= self._clock()

    async def drained_within(self, seconds: float) -> bool:
        """Wait for so long, or until the drain begins, and return whether it has."""
        return await self._drained_until(self._clock() + seconds)

    async def _drained_until(self, due: float) -> bool:
        try:
            async with asyncio.timeout_at(due):
                await self.drain.wait()
        except TimeoutError:
            return False
        return True

    async def _get(self) -> KeyRange | None:
        """The next planned range; None where a waiting one is due first, or the queue was closed."""
        until = self._waiting[0].due if self._waiting else None
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
