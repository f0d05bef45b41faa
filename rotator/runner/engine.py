"""Streams ranges from the planner through a bounded queue to the workers."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from rotator.events import Observer, RangeCompleted, RangeDeferred, RangeRetried, RowRejected
from rotator.exceptions import (
    EveryRowRejectedError,
    RangeRejectedError,
    RangeTooSlowError,
    RowsLockedError,
    unwrap_group,
)
from rotator.ranges import KeyInterval, KeyRange, Written
from rotator.runner.aio import is_set_within
from rotator.runner.gate import Gate
from rotator.runner.retry import NextStep, RetryPolicy
from rotator.runner.work_queue import Attempt, WorkQueue

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


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """The limits of an engine.

    Attributes:
        max_rows: The maximum rows to plan; None for no limit.
        queue_ranges: The maximum planned ranges in the queue, which caps memory.
        waiting_ranges: The number of ranges that wait for a retry at which workers prefer them.
        retry: The policy for locked and rejected rows.
        max_failed_rows: The rejected rows after which the run gives up.
        probe_delay_seconds: The delay of the rest of a rejected range, so that other ranges are tried first.
    """

    max_rows: int | None = None
    queue_ranges: int = 16
    waiting_ranges: int = 16
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_failed_rows: int = MAX_FAILED_ROWS
    probe_delay_seconds: float = 1.0


class Engine:
    """Rewrites intervals of keys by a planner, a bounded queue and several workers."""

    def __init__(
        self,
        plan: PlanRange,
        write: WriteRange,
        gate: Gate,
        *,
        notify: Observer,
        options: EngineOptions | None = None,
        has_rotated: bool = False,
    ) -> None:
        """Prepare it.

        Args:
            plan: Plans a range.
            write: Writes a range.
            gate: Lets a range begin.
            notify: Is called with each event.
            options: The limits; None for the usual ones.
            has_rotated: Whether the rotation has rotated rows before.
        """
        self._plan_range = plan
        self._write_range = write
        self._gate = gate
        self._notify = notify
        self._options = options or EngineOptions()
        self._failed_rows = 0
        self._failed_rows_in_a_row = 0
        self._has_rotated = has_rotated

    async def run(self, intervals: Iterable[KeyInterval], drain: asyncio.Event) -> None:
        """Rewrite every range of the intervals, except for rows that the server rejects permanently.

        A range with locked rows is deferred, for as long as it takes. A rejected range is retried where that
        may help, and then split, down to the single row, which is reported as :class:`RowRejected`. A range
        that is too slow is split at once, and the planner makes the next ranges smaller.

        A fault that affects every row ends the run soon: the first row of each rejected range is tried alone
        before the rest of it.

        Args:
            intervals: The gaps to rewrite, in the order to plan them.
            drain: Once set, no more ranges begin; those in flight are finished.

        Raises:
            RangeRejectedError: More than ``max_failed_rows`` rows were rejected.
            EveryRowRejectedError: ``MAX_FAILED_ROWS_AT_START`` rows were rejected and none was rotated, or
                ``MAX_FAILED_ROWS_IN_A_ROW`` one after the other.
            Exception: The first error of the planner or the writer; the other workers are cancelled.
        """
        options = self._options
        queue = WorkQueue(drain, queue_ranges=options.queue_ranges, waiting_ranges=options.waiting_ranges)
        with unwrap_group():
            async with asyncio.TaskGroup() as tasks:
                planner = tasks.create_task(self._plan(intervals, queue), name="rotator planner")
                workers = [
                    tasks.create_task(self._work(queue), name=f"rotator worker {number}")
                    for number in range(1, self._gate.most_workers + 1)
                ]
                await asyncio.wait(workers)
                # After a drain the planner may still wait for room in the queue.
                planner.cancel()

    async def _plan(self, intervals: Iterable[KeyInterval], queue: WorkQueue) -> None:
        rows_left = self._options.max_rows
        for interval in intervals:
            rest = interval
            while not queue.drain.is_set() and rows_left != 0:
                batch = self._gate.rows if rows_left is None else min(self._gate.rows, rows_left)
                key_range = await self._next_range(rest, batch, queue)
                if key_range is None:
                    break
                if rows_left is not None:
                    rows_left -= key_range.rows
                await queue.put(key_range)
                if key_range.through == interval.through:
                    break
                rest = KeyInterval(after=key_range.through, through=interval.through)
        await queue.put(None)

    async def _work(self, queue: WorkQueue) -> None:
        while (attempt := await queue.take()) is not None:
            async with self._gate.passage(queue.drain) as may_begin:
                if may_begin:
                    await self._write(await self._cut(attempt, queue), queue)

    async def _cut(self, attempt: Attempt, queue: WorkQueue) -> Attempt:
        """Return the first part of a range that has become too large, and put the rest back."""
        if not self._gate.is_too_large(attempt.key_range.rows):
            return attempt
        first, *rest = await self._split(attempt.key_range, self._gate.rows, queue)
        for part in rest:
            queue.requeue(attempt._replace(key_range=part), delay_seconds=0)
        return attempt._replace(key_range=first)

    async def _write(self, attempt: Attempt, queue: WorkQueue) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            written = await self._write_range(attempt.key_range)
        except RowsLockedError:
            await self._defer(attempt, queue)
        except RangeRejectedError as error:
            await self._retry(attempt, error, queue)
        else:
            self._gate.count_completed(written.rows, written.server_seconds)
            if written.rows:
                self._has_rotated, self._failed_rows_in_a_row = True, 0
            self._notify(RangeCompleted(rows=written.rows, seconds=clock() - started))

    async def _defer(self, attempt: Attempt, queue: WorkQueue) -> None:
        retry, key_range, deferrals = self._options.retry, attempt.key_range, attempt.deferrals + 1
        self._notify(RangeDeferred(rows=key_range.rows))
        # The halves of many locked ranges would soon exceed the memory cap of the queue.
        splits = deferrals >= retry.deferrals_before_split and key_range.rows > 1 and not queue.is_full
        parts = await self._split(key_range, key_range.rows // 2, queue) if splits else [key_range]
        for part in parts:
            queue.requeue(
                attempt._replace(key_range=part, deferrals=deferrals),
                delay_seconds=retry.delay_seconds(deferrals),
            )

    async def _retry(self, attempt: Attempt, error: RangeRejectedError, queue: WorkQueue) -> None:
        retry, key_range, rejections = self._options.retry, attempt.key_range, attempt.rejections + 1
        is_too_slow = isinstance(error, RangeTooSlowError)
        if is_too_slow:
            self._gate.shrink(key_range.rows)
        # While no row has been rotated, the parts of the rest are probed again.
        was_probed = attempt.is_probed and self._has_rotated
        step = retry.after_rejection(error, rows=key_range.rows, rejections=rejections)
        if step is NextStep.GIVE_UP:
            self._give_up(attempt, error)
            return
        splits = step is NextStep.SPLIT
        self._notify(RangeRetried(rows=key_range.rows, reason=error.condition, split=splits))
        delay_seconds = retry.delay_seconds(rejections) if error.retryable else 0.0
        if not splits:
            queue.requeue(
                attempt._replace(rejections=rejections, is_probed=was_probed), delay_seconds=delay_seconds
            )
            return
        probes = not (is_too_slow or attempt.is_probed)
        first, *rest = await self._split(key_range, 1 if probes else key_range.rows // 2, queue)
        queue.requeue(Attempt(first, attempt.deferrals, is_probed=was_probed), delay_seconds=delay_seconds)
        for part in rest:
            queue.requeue(
                Attempt(part, attempt.deferrals, is_probed=probes or was_probed),
                delay_seconds=self._options.probe_delay_seconds if probes else delay_seconds,
            )

    def _give_up(self, attempt: Attempt, error: RangeRejectedError) -> None:
        self._failed_rows += 1
        if not (self._has_rotated and attempt.is_probed):
            self._failed_rows_in_a_row += 1
        self._notify(RowRejected(key=attempt.key_range.through, reason=error.condition))
        if self._failed_rows > self._options.max_failed_rows:
            raise error
        most = MAX_FAILED_ROWS_IN_A_ROW if self._has_rotated else MAX_FAILED_ROWS_AT_START
        if self._failed_rows_in_a_row >= most:
            raise EveryRowRejectedError(self._failed_rows_in_a_row, error.condition)

    async def _next_range(self, interval: KeyInterval, batch: int, queue: WorkQueue) -> KeyRange | None:
        """Plan a range as soon as the table is not locked; None where a drain began before."""
        attempts = 0
        while True:
            try:
                return await self._plan_range(interval, batch)
            except RowsLockedError:
                attempts += 1
                self._notify(RangeDeferred(rows=0))
            if await is_set_within(queue.drain, self._options.retry.delay_seconds(attempts)):
                return None

    async def _split(self, key_range: KeyRange, rows: int, queue: WorkQueue) -> list[KeyRange]:
        """Split a range after the first ``rows`` rows that it holds now."""
        first = await self._next_range(key_range, rows, queue)
        if first is None:
            return [key_range]
        if first.through == key_range.through:
            # Rows were deleted since it was planned: the rest is no more than this part.
            return [first]
        rest = KeyRange(after=first.through, through=key_range.through, rows=key_range.rows - first.rows)
        return [first, rest]
