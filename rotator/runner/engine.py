"""Streams ranges from the planner through a bounded queue to the workers."""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from itertools import count
from typing import Final, NamedTuple, TypeAlias

from rotator.events import Observer, RangeCompleted, RangeDeferred, RangeRetried, RowRejected
from rotator.exceptions import (
    EveryRowRejectedError,
    RangeRejectedError,
    RangeTooSlowError,
    RowsLockedError,
    unwrap_group,
)
from rotator.ranges import KeyInterval, KeyRange, Written
from rotator.runner import retry
from rotator.runner.aio import is_set_within
from rotator.runner.gate import Gate

# The planned ranges in the queue, which caps memory.
QUEUE_RANGES: Final = 16
# The ranges that wait for a retry at which workers prefer them.
WAITING_RANGES: Final = 16
# The rest of a locked range is not held up by a few rows.
DEFERRALS_BEFORE_SPLIT: Final = 5
# The rest of a rejected range waits, so that other ranges are tried first.
PROBE_DELAY_SECONDS: Final = 1.0
# The rejected rows of a run, after which it gives up.
MAX_FAILED_ROWS: Final = 1000
# The same while the rotation has rotated no row.
MAX_FAILED_ROWS_AT_START: Final = 8
# The same for the first rows of ranges, if no row is rotated in between. With ranges of 100 rows or more,
# neighbouring rows at fault reach MAX_FAILED_ROWS first. Fewer than the ranges that wait for a retry.
MAX_FAILED_ROWS_IN_A_ROW: Final = 12


PlanRange: TypeAlias = Callable[[KeyInterval, int], Awaitable[KeyRange]]
"""Returns the first rows of an interval, at most this number, or all of it where it holds fewer.

A range may hold no rows: its checkpoint records that nothing was to be done. It raises
:class:`RowsLockedError` where another session has locked the table.
"""

WriteRange: TypeAlias = Callable[[KeyRange], Awaitable[Written]]
"""Writes new values and the checkpoint of a range in one transaction.

It raises :class:`RowsLockedError` where another session holds rows of the range, and
:class:`RangeRejectedError` where the server rejects it; nothing was written then.
"""


class Attempt(NamedTuple):
    """A range, and what has happened to it so far.

    Attributes:
        deferrals: How often its rows were locked.
        rejections: How often the server rejected it.
        is_probed: Whether its first row was tried alone, and other ranges were tried before the rest.
    """

    key_range: KeyRange
    deferrals: int = 0
    rejections: int = 0
    is_probed: bool = False


class WorkQueue:
    """Hands ranges to workers; those that are due for a retry go before planned ones."""

    def __init__(self, drain: asyncio.Event) -> None:
        """Make the queue in the running loop; once ``drain`` is set, workers get no more ranges."""
        self.drain = drain
        # None where no more follow.
        self.planned: asyncio.Queue[KeyRange | None] = asyncio.Queue(QUEUE_RANGES)
        # When each is due; the numbers keep the order of equal times.
        self._waiting: list[tuple[float, int, Attempt]] = []
        self._numbers = count()
        self._clock = asyncio.get_running_loop().time
        self._closed = False

    @property
    def is_full(self) -> bool:
        """Whether the maximum number of ranges wait for a retry."""
        return len(self._waiting) >= WAITING_RANGES

    def requeue(self, attempt: Attempt, *, delay_seconds: float) -> None:
        """Add a range that is due for a retry after a delay."""
        heapq.heappush(self._waiting, (self._clock() + delay_seconds, next(self._numbers), attempt))

    async def take(self) -> Attempt | None:
        """Wait for the next range; None where no work is left for this worker."""
        while not self.drain.is_set():
            if self._waiting and (self._closed or self.is_full or self._waiting[0][0] <= self._clock()):
                due, _, attempt = heapq.heappop(self._waiting)
                is_drained = await is_set_within(self.drain, due - self._clock())
                return None if is_drained else attempt
            if self._closed:
                return None
            key_range = await self._get()
            if key_range is not None:
                # A gap of one row is often one that was rejected before.
                return Attempt(key_range, is_probed=key_range.rows == 1)
        return None

    async def _get(self) -> KeyRange | None:
        """Wait for a planned range; None where a retry is due first, or the queue was closed."""
        until = self._waiting[0][0] if self._waiting else None
        try:
            async with asyncio.timeout_at(until):
                key_range = await self.planned.get()
        except TimeoutError:
            return None
        if key_range is None:
            self._closed = True
            # For the next worker; there is room, since an item was just taken.
            self.planned.put_nowait(None)
        return key_range


@dataclass(slots=True)
class Engine:
    """Rewrites intervals of keys by a planner, a bounded queue and several workers.

    Attributes:
        max_rows: The maximum rows to plan; None for no limit.
        has_rotated: Whether the rotation has rotated rows before.
    """

    plan_range: PlanRange
    write_range: WriteRange
    gate: Gate
    _: KW_ONLY
    notify: Observer
    max_rows: int | None = None
    has_rotated: bool = False
    _queue: WorkQueue = field(init=False)
    _failed_rows: int = 0
    _failed_rows_in_a_row: int = 0

    async def run(self, intervals: Iterable[KeyInterval], drain: asyncio.Event) -> None:
        """Rewrite every range of the intervals, except for rows that the server rejects permanently.

        Once ``drain`` is set, no more ranges begin; those in flight are finished.

        A range with locked rows is deferred, for as long as it takes. A rejected range is retried where that
        may help, and then split, down to the single row, which is reported as :class:`RowRejected`. A range
        that is too slow is split at once, and the planner makes the next ranges smaller.

        A fault that affects every row ends the run soon: the first row of each rejected range is tried alone
        before the rest of it.

        Raises:
            RangeRejectedError: More than ``MAX_FAILED_ROWS`` rows were rejected.
            EveryRowRejectedError: ``MAX_FAILED_ROWS_AT_START`` rows were rejected and none was rotated, or
                ``MAX_FAILED_ROWS_IN_A_ROW`` one after the other.
            Exception: The first error of the planner or the writer; the other workers are cancelled.
        """
        self._queue = WorkQueue(drain)
        with unwrap_group():
            async with asyncio.TaskGroup() as tasks:
                planner = tasks.create_task(self._plan(intervals), name="rotator planner")
                workers = [
                    tasks.create_task(self._work(), name=f"rotator worker {number}")
                    for number in range(1, self.gate.most_workers + 1)
                ]
                await asyncio.wait(workers)
                # After a drain the planner may still wait for room in the queue.
                planner.cancel()

    async def _plan(self, intervals: Iterable[KeyInterval]) -> None:
        queue, rows_left = self._queue, self.max_rows
        for interval in intervals:
            rest = interval
            while not queue.drain.is_set() and rows_left != 0:
                batch = self.gate.rows if rows_left is None else min(self.gate.rows, rows_left)
                key_range = await self._next_range(rest, batch)
                if key_range is None:
                    break
                if rows_left is not None:
                    rows_left -= key_range.rows
                await queue.planned.put(key_range)
                if key_range.through == interval.through:
                    break
                rest = KeyInterval(after=key_range.through, through=interval.through)
        await queue.planned.put(None)

    async def _work(self) -> None:
        while (attempt := await self._queue.take()) is not None:
            async with self.gate.passage(self._queue.drain) as may_begin:
                if may_begin:
                    await self._write(await self._cut(attempt))

    async def _cut(self, attempt: Attempt) -> Attempt:
        """Return the first part of a range that has become too large, and put the rest back."""
        if not self.gate.is_too_large(attempt.key_range.rows):
            return attempt
        first, *rest = await self._split(attempt.key_range, self.gate.rows)
        for part in rest:
            self._queue.requeue(attempt._replace(key_range=part), delay_seconds=0)
        return attempt._replace(key_range=first)

    async def _write(self, attempt: Attempt) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            written = await self.write_range(attempt.key_range)
        except RowsLockedError:
            await self._defer(attempt)
        except RangeRejectedError as error:
            await self._retry(attempt, error)
        else:
            self.gate.count_completed(written.rows, written.server_seconds)
            if written.rows:
                self.has_rotated, self._failed_rows_in_a_row = True, 0
            self.notify(RangeCompleted(rows=written.rows, seconds=clock() - started))

    async def _defer(self, attempt: Attempt) -> None:
        key_range, deferrals = attempt.key_range, attempt.deferrals + 1
        self.notify(RangeDeferred(rows=key_range.rows))
        # The halves of many locked ranges would soon exceed the memory cap of the queue.
        splits = deferrals >= DEFERRALS_BEFORE_SPLIT and key_range.rows > 1 and not self._queue.is_full
        parts = await self._split(key_range, key_range.rows // 2) if splits else [key_range]
        for part in parts:
            deferred = attempt._replace(key_range=part, deferrals=deferrals)
            self._queue.requeue(deferred, delay_seconds=retry.backoff_seconds(deferrals))

    async def _retry(self, attempt: Attempt, error: RangeRejectedError) -> None:
        queue, key_range, rejections = self._queue, attempt.key_range, attempt.rejections + 1
        is_too_slow = isinstance(error, RangeTooSlowError)
        if is_too_slow:
            self.gate.sizer.shrink(key_range.rows)
        # While no row has been rotated, the parts of the rest are probed again.
        was_probed = attempt.is_probed and self.has_rotated
        splits = not retry.may_help(error, rows=key_range.rows, rejections=rejections)
        if splits and key_range.rows <= 1:
            self._give_up(attempt, error)
            return
        self.notify(RangeRetried(rows=key_range.rows, reason=error.condition, split=splits))
        delay_seconds = retry.backoff_seconds(rejections) if error.retryable else 0.0
        if not splits:
            rejected = attempt._replace(rejections=rejections, is_probed=was_probed)
            queue.requeue(rejected, delay_seconds=delay_seconds)
            return
        probes = not (is_too_slow or attempt.is_probed)
        first, *rest = await self._split(key_range, 1 if probes else key_range.rows // 2)
        queue.requeue(Attempt(first, attempt.deferrals, is_probed=was_probed), delay_seconds=delay_seconds)
        for part in rest:
            queue.requeue(
                Attempt(part, attempt.deferrals, is_probed=probes or was_probed),
                delay_seconds=PROBE_DELAY_SECONDS if probes else delay_seconds,
            )

    def _give_up(self, attempt: Attempt, error: RangeRejectedError) -> None:
        self._failed_rows += 1
        if not (self.has_rotated and attempt.is_probed):
            self._failed_rows_in_a_row += 1
        self.notify(RowRejected(key=attempt.key_range.through, reason=error.condition))
        if self._failed_rows > MAX_FAILED_ROWS:
            raise error
        most = MAX_FAILED_ROWS_IN_A_ROW if self.has_rotated else MAX_FAILED_ROWS_AT_START
        if self._failed_rows_in_a_row >= most:
            raise EveryRowRejectedError(self._failed_rows_in_a_row, error.condition)

    async def _next_range(self, interval: KeyInterval, batch: int) -> KeyRange | None:
        """Plan a range as soon as the table is not locked; None where a drain began before."""
        attempts = 0
        while True:
            try:
                return await self.plan_range(interval, batch)
            except RowsLockedError:
                attempts += 1
                self.notify(RangeDeferred(rows=0))
            if await is_set_within(self._queue.drain, retry.backoff_seconds(attempts)):
                return None

    async def _split(self, key_range: KeyRange, rows: int) -> list[KeyRange]:
        """Split a range after the first ``rows`` rows that it holds now."""
        first = await self._next_range(key_range, rows)
        if first is None:
            return [key_range]
        if first.through == key_range.through:
            # Rows were deleted since it was planned: the rest is no more than this part.
            return [first]
        rest = KeyRange(after=first.through, through=key_range.through, rows=key_range.rows - first.rows)
        return [first, rest]
