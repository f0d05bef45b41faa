"""The gate that a worker passes before each range: whether ranges begin, how many, and of which size."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from rotator.events import Observer, Throttled, ThrottleEnded
from rotator.options import RangeLimit
from rotator.runner.aio import is_set_within
from rotator.runner.controller import RangeSizer

SLOW_SECONDS: Final = 5.0
EMPTY_POLL_SECONDS: Final = 0.002
MAX_OVERSIZE: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """The reason to keep the gate closed, e.g. ``replica lag 14 s > 10 s``, and the monotonic time since."""

    reason: str
    since: float


class Gate:
    """Lets workers begin ranges while no throttle closes it, and at most ``workers`` of them at a time.

    Throttles close and open it by ``hold()`` and ``release()``. The options, or an operator, set the upper
    limits by ``set_limits()``. The pace allows less than these by ``allow()``. The engine asks it by
    ``passage()`` and ``rows``.

    Attributes:
        most_workers: The upper limit of workers at the start; no later limit is higher.
        concurrency: The present upper limit of workers.
        max_rows: The upper limit of rows in a range.
        busy: The number of workers that write a range now.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        rows: int,
        notify: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most_workers = self.concurrency = concurrency
        self.max_rows = rows
        self.busy = 0
        self.rows_completed = self.ranges_completed = 0
        self._holds = dict[str, Hold]()
        self._notify = notify
        self._clock = clock
        self._allowed_workers: int | None = None
        self._range_limit: RangeLimit | None = None
        self.sizer = RangeSizer(rows)
        self._is_emptied = False
        self._slow_until = 0.0
        self._waiting = deque[asyncio.Future[None]]()

    @property
    def workers(self) -> int:
        """The number of workers that may write at the same time now."""
        return min(self.concurrency, self._allowed_workers or self.concurrency)

    @property
    def rows(self) -> int:
        """The number of rows in the next range."""
        return self.sizer.rows(self._range_limit)

    def is_too_large(self, rows: int) -> bool:
        """Return whether a range of so many rows was planned before the pace allowed much fewer."""
        return self._range_limit is not None and rows > MAX_OVERSIZE * self.rows

    @property
    def is_open(self) -> bool:
        """Whether no throttle closes the gate."""
        return not self._holds

    @property
    def holds(self) -> dict[str, Hold]:
        """The holds by their sources, the oldest first."""
        return dict(self._holds)

    def set_limits(self, *, concurrency: int, rows: int) -> None:
        """Change the upper limits."""
        self.concurrency = min(concurrency, self.most_workers)
        self.max_rows = rows
        self.sizer.limit(rows)
        self._admit()

    def allow(self, workers: int | None = None, range_limit: RangeLimit | None = None) -> None:
        """Allow less than the upper limits; None for all of it."""
        self._allowed_workers, self._range_limit = workers, range_limit
        self._admit()

    def count_completed(self, rows: int, server_seconds: float) -> None:
        """Count a completed range of this many rows, which took this time on the server."""
        self.rows_completed += rows
        self.ranges_completed += 1
        self.sizer.count_completed(rows, server_seconds)

    def hold(self, source: str, reason: str, *, slowly: bool = True) -> None:
        """Close the gate for a reason: no more ranges begin, and those in flight are finished.

        The reason is one phrase, ``signal value > limit`` if it is measured, which progress and page show. A
        source calls it again when its reason changes. An empty reason opens the gate, like ``release()``.
        """
        held = self._holds.get(source)
        if not reason:
            self.release(source, slowly=slowly)
        elif held is None or held.reason != reason:
            self._holds[source] = Hold(reason=reason, since=held.since if held else self._clock())
            self._notify(Throttled(source=source, reason=reason, is_new=held is None))

    def release(self, source: str, *, slowly: bool = True) -> None:
        """Open the gate, unless another source closes it; a source that does not hold it may call this too.

        It opens slowly at half speed: for some seconds, each worker pauses after a range for as long as the
        range took. Pauses lower the WAL and the lag.
        """
        held = self._holds.pop(source, None)
        if held is None:
            return
        now = self._clock()
        if slowly:
            self._slow_until = now + SLOW_SECONDS
        self._notify(ThrottleEnded(source=source, reason=held.reason, seconds=now - held.since))
        self._admit()

    @asynccontextmanager
    async def emptied(self, seconds: float) -> AsyncIterator[bool]:
        """Let no range begin until the block ends, and wait at most so long for those in flight.

        The result is whether none is in flight.
        """
        self._is_emptied = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while self.busy:  # noqa: ASYNC110 - it happens once a minute
                        await asyncio.sleep(EMPTY_POLL_SECONDS)
            yield not self.busy
        finally:
            self._is_emptied = False
            self._admit()

    @asynccontextmanager
    async def passage(self, drain: asyncio.Event) -> AsyncIterator[bool]:
        """Wait until a range may begin, and count the worker as busy until the block ends.

        Workers pass in the order in which they came. The result is False where a drain began before: then no
        range may begin.
        """
        if not await self._enter(drain):
            yield False
            return
        started = self._clock()
        try:
            yield True
            if (now := self._clock()) < self._slow_until:
                await is_set_within(drain, now - started)
        finally:
            self._leave()

    async def _enter(self, drain: asyncio.Event) -> bool:
        if drain.is_set():
            return False
        if self._has_room and not self._waiting:
            self.busy += 1
            return True
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(admitted)
        draining = asyncio.create_task(drain.wait(), name="rotator wait for a drain")
        either: list[asyncio.Future[Any]] = [admitted, draining]
        may_begin = False
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            may_begin = admitted.done() and not drain.is_set()
        finally:
            draining.cancel()
            if not admitted.done():
                self._waiting.remove(admitted)
            elif not may_begin:
                self._leave()
        return may_begin

    @property
    def _has_room(self) -> bool:
        return self.is_open and not self._is_emptied and self.busy < self.workers

    def _admit(self) -> None:
        while self._waiting and self._has_room:
            self.busy += 1
            self._waiting.popleft().set_result(None)

    def _leave(self) -> None:
        self.busy -= 1
        self._admit()
