"""The bounded queue of planned ranges, and the ranges that wait for a retry."""

import asyncio
import heapq
from itertools import count
from typing import NamedTuple

from rotator.ranges import KeyRange
from rotator.runner.aio import is_set_within


class Attempt(NamedTuple):
    """A range, and what has happened to it so far.

    Attributes:
        key_range: The range.
        deferrals: How often its rows were locked.
        rejections: How often the server rejected it.
        is_probed: Whether its first row was tried alone, and other ranges were tried before the rest.
    """

    key_range: KeyRange
    deferrals: int = 0
    rejections: int = 0
    is_probed: bool = False


class _Waiting(NamedTuple):
    due: float
    number: int
    attempt: Attempt


class WorkQueue:
    """Hands ranges to workers; those that are due for a retry go before planned ones."""

    def __init__(self, drain: asyncio.Event, *, queue_ranges: int, waiting_ranges: int) -> None:
        """Make the queue; to be called in the running loop.

        Args:
            drain: Once set, workers get no more ranges.
            queue_ranges: The maximum planned ranges in the queue, which caps memory.
            waiting_ranges: The number of ranges that wait for a retry at which workers prefer them.
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
        """Whether the maximum number of ranges wait for a retry."""
        return len(self._waiting) >= self._waiting_ranges

    async def put(self, key_range: KeyRange | None) -> None:
        """Add a planned range, as soon as there is room; None where no more follow."""
        await self._queue.put(key_range)

    def requeue(self, attempt: Attempt, *, delay_seconds: float) -> None:
        """Add a range that is due for a retry after a delay."""
        heapq.heappush(self._waiting, _Waiting(self._clock() + delay_seconds, next(self._numbers), attempt))

    async def take(self) -> Attempt | None:
        """Wait for the next range; None where no work is left for this worker."""
        while not self.drain.is_set():
            if self._waiting and (self._closed or self.is_full or self._waiting[0].due <= self._clock()):
                first = heapq.heappop(self._waiting)
                is_drained = await is_set_within(self.drain, first.due - self._clock())
                return None if is_drained else first.attempt
            if self._closed:
                return None
            key_range = await self._get()
            if key_range is not None:
                # A gap of one row is often one that was rejected before.
                return Attempt(key_range, is_probed=key_range.rows == 1)
        return None

    async def _get(self) -> KeyRange | None:
        """Wait for a planned range; None where a retry is due first, or the queue was closed."""
        until = self._waiting[0].due if self._waiting else None
        try:
            async with asyncio.timeout_at(until):
                key_range = await self._queue.get()
        except TimeoutError:
            return None
        if key_range is None:
            self._closed = True
            # For the next worker; there is room, since an item was just taken.
            self._queue.put_nowait(None)
        return key_range
