"""Streams ranges from the planner through a bounded queue to the workers."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import SystemRandom
from typing import Final, Protocol

from rotator.aio import unwrap_group
from rotator.events import Observer, RangeCompleted, RangeDeferred, RangeRetried, RowFailed
from rotator.exceptions import EveryRowRejectedError, RangeRejectedError, RangeTooSlowError, RowsLockedError
from rotator.ranges import KeyInterval, KeyRange
from rotator.runner.work_queue import Attempt, WorkQueue

_random = SystemRandom().random


def backoff_seconds(
    attempt: int, *, first: float, longest: float, random: Callable[[], float] = _random
) -> float:
    """Return an exponentially growing delay, of which the upper half is left to chance.

    Args:
        attempt: How often it was tried in vain; at least 1.
        first: The delay after the first attempt, in seconds.
        longest: No delay is longer, in seconds.
        random: Gives a number from 0 up to 1.
    """
    # The exponent is capped, since a float has no room for 2 ** 2000.
    most = min(longest, first * 2.0 ** min(attempt - 1, 64))
    return most * (0.5 + random() / 2)


COMPLETED_BEFORE_GROWTH: Final = 64
MIN_ROWS: Final = 16


class BatchSizer:
    """Halves on a range that took too long, and doubles again after many that did not."""

    def __init__(self, batch: int) -> None:
        """Begin with the batch that was asked for, which is never exceeded."""
        self._most = batch
        self._completed = 0
        self.batch = batch

    def shrink(self, rows: int) -> None:
        """Note that a range of this many rows took too long."""
        self._completed = 0
        self.batch = max(min(MIN_ROWS, self._most), min(self.batch, rows // 2))

    def completed(self) -> None:
        """Note that a range was completed."""
        self._completed += 1
        if self.batch < self._most and self._completed >= COMPLETED_BEFORE_GROWTH:
            self._completed = 0
            self.batch = min(self._most, self.batch * 2)


class RangePlanner(Protocol):
    """Knows the keys."""

    async def next_range(self, span: KeyInterval, batch: int) -> KeyRange:
        """The first ``batch`` rows of a span, or the whole of it where it holds fewer, or none.

        A span without rows is a range too: its checkpoint says that there was nothing to do.

        Raises:
            RowsLockedError: Somebody else holds all of them; it can be tried again later.
        """
        ...


class RangeWriter(Protocol):
    """Knows the rows."""

    async def rewrite(self, key_range: KeyRange) -> int:
        """Give a range's rows new values and checkpoint it, in one transaction.

        Returns:
            How many rows got a new value.

        Raises:
            RowsLockedError: Somebody else holds rows of it; nothing was written.
            RangeRejectedError: The server refused it; nothing was written.
        """
        ...


MAX_FAILED_ROWS: Final = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How a rotation is worked on.

    Attributes:
        concurrency: How many workers write at the same time.
        batch: How many rows a range holds, unless the server is too slow for that.
        max_rows: How many rows are planned at the most; None for no limit.
        queue_ranges: How many planned ranges may wait; the memory cap.
        waiting_ranges: How many ranges may wait for another attempt before workers turn to them first.
        deferral_seconds: How long a range with locked rows waits at first.
        deferrals_before_split: After how many of them it is split, so that only what is locked waits.
        max_wait_seconds: No range waits longer for another attempt.
        refusals_before_split: How often a range is tried again whole where that may help.
        refusals_of_one_row: How often a single row is tried where that may help.
        max_failed_rows: After how many rows that cannot be rotated the run gives up.
        max_failed_rows_at_start: After how many of them it gives up where no row was rotated at all.
        probe_delay_seconds: How long the rest of a refused range waits while no row was rotated, so that
            other ranges are tried first.
    """

    concurrency: int = 4
    batch: int = 2000
    max_rows: int | None = None
    queue_ranges: int = 16
    waiting_ranges: int = 16
    deferral_seconds: float = 0.1
    deferrals_before_split: int = 5
    max_wait_seconds: float = 5.0
    refusals_before_split: int = 3
    refusals_of_one_row: int = 8
    max_failed_rows: int = MAX_FAILED_ROWS
    max_failed_rows_at_start: int = 8
    probe_delay_seconds: float = 1.0


class Engine:
    """One pass over some spans of keys."""

    def __init__(
        self, planner: RangePlanner, writer: RangeWriter, *, notify: Observer, options: EngineOptions
    ) -> None:
        self._planner = planner
        self._writer = writer
        self._notify = notify
        self._options = options
        self._failed_rows = 0
        self._has_rotated = False
        self._pace = BatchSizer(options.batch)

    async def run(self, spans: Iterable[KeyInterval], drain: asyncio.Event) -> None:
        """Rewrite every range of the spans, but for rows that the server refuses for good.

        A range with locked rows waits and is tried again, for as long as it takes. A range that the server
        refuses is tried again where that may help, and then split, down to the single row, which is given
        up and told of as :class:`RowFailed`. A range that takes too long is split at once, and the planner
        makes the next ones smaller.

        A fault that every row meets ends the run soon: while no row was rotated, the first row of each
        refused range is tried alone before the rest of it.

        Args:
            spans: Where no range is completed yet, in the order to plan them.
            drain: Once set, no more ranges are begun; those in flight are finished.

        Raises:
            RangeRejectedError: More rows were refused than ``max_failed_rows``.
            EveryRowRejectedError: No row was rotated, and ``max_failed_rows_at_start`` were refused.
            Exception: What the planner or the writer raised first, other than the above. The other workers
                are cancelled.
        """
        options = self._options
        flow = WorkQueue(drain, queue_ranges=options.queue_ranges, waiting_ranges=options.waiting_ranges)
        with unwrap_group():
            async with asyncio.TaskGroup() as tasks:
                planner = tasks.create_task(self._plan(spans, flow), name="rotator planner")
                await asyncio.wait(
                    [
                        tasks.create_task(self._work(flow), name=f"rotator worker {number}")
                        for number in range(1, options.concurrency + 1)
                    ]
                )
                # A drained planner may still wait for room that nobody makes any more.
                planner.cancel()

    async def _plan(self, spans: Iterable[KeyInterval], flow: WorkQueue) -> None:
        rows_left = self._options.max_rows
        for span in spans:
            rest = span
            while not flow.drain.is_set() and rows_left != 0:
                batch = self._pace.batch if rows_left is None else min(self._pace.batch, rows_left)
                key_range = await self._next_range(rest, batch, flow)
                if key_range is None:
                    break
                if rows_left is not None:
                    rows_left -= key_range.rows
                await flow.put(key_range)
                if key_range.through == span.through:
                    break
                rest = KeyInterval(after=key_range.through, through=span.through)
        await flow.close()

    async def _work(self, flow: WorkQueue) -> None:
        clock = asyncio.get_running_loop().time
        while (attempt := await flow.take()) is not None:
            started = clock()
            try:
                rows = await self._writer.rewrite(attempt.key_range)
            except RowsLockedError:
                await self._defer(attempt, flow)
            except RangeRejectedError as refused:
                await self._retry(attempt, refused, flow)
            else:
                self._pace.completed()
                self._has_rotated = self._has_rotated or rows > 0
                self._notify(
                    RangeCompleted(
                        rows=rows,
                        seconds=clock() - started,
                        retries=attempt.deferrals + attempt.refusals,
                    )
                )

    async def _defer(self, attempt: Attempt, flow: WorkQueue) -> None:
        key_range, deferrals = attempt.key_range, attempt.deferrals + 1
        self._notify(RangeDeferred(rows=key_range.rows))
        delay_seconds = backoff_seconds(
            deferrals, first=self._options.deferral_seconds, longest=self._options.max_wait_seconds
        )
        # Halves of many locked ranges would soon be more than the queue was bounded for.
        splits = deferrals >= self._options.deferrals_before_split and key_range.rows > 1 and not flow.is_full
        parts = await self._split(key_range, key_range.rows // 2, flow) if splits else [key_range]
        for part in parts:
            flow.requeue(Attempt(part, deferrals, attempt.refusals), delay_seconds=delay_seconds)

    async def _retry(self, attempt: Attempt, refused: RangeRejectedError, flow: WorkQueue) -> None:
        options, key_range, refusals = self._options, attempt.key_range, attempt.refusals + 1
        is_one_row = key_range.rows <= 1
        is_too_slow = isinstance(refused, RangeTooSlowError)
        if is_too_slow:
            self._pace.shrink(key_range.rows)
        most = options.refusals_of_one_row if is_one_row else options.refusals_before_split
        tries_whole = refused.retryable and refusals < most and (is_one_row or not is_too_slow)
        if is_one_row and not tries_whole:
            self._give_up(key_range, refused)
            return
        self._notify(RangeRetried(rows=key_range.rows, reason=refused.condition, split=not tries_whole))
        delay_seconds = (
            backoff_seconds(refusals, first=options.deferral_seconds, longest=options.max_wait_seconds)
            if refused.retryable
            else 0.0
        )
        if tries_whole:
            flow.requeue(Attempt(key_range, attempt.deferrals, refusals), delay_seconds=delay_seconds)
            return
        if not (self._has_rotated or is_too_slow or attempt.is_probed):
            first, *rest = await self._split(key_range, 1, flow)
            flow.requeue(Attempt(first, attempt.deferrals), delay_seconds=delay_seconds)
            for part in rest:
                waiting = Attempt(part, attempt.deferrals, is_probed=True)
                flow.requeue(waiting, delay_seconds=options.probe_delay_seconds)
            return
        for part in await self._split(key_range, key_range.rows // 2, flow):
            flow.requeue(Attempt(part, attempt.deferrals), delay_seconds=delay_seconds)

    def _give_up(self, key_range: KeyRange, refused: RangeRejectedError) -> None:
        self._failed_rows += 1
        self._notify(RowFailed(key=key_range.through, reason=refused.condition))
        if self._failed_rows > self._options.max_failed_rows:
            raise refused
        if not self._has_rotated and self._failed_rows >= self._options.max_failed_rows_at_start:
            raise EveryRowRejectedError(self._failed_rows, refused.condition)

    async def _next_range(self, span: KeyInterval, batch: int, flow: WorkQueue) -> KeyRange | None:
        """Plan a range, when nobody holds the whole table any more; None where a drain began before."""
        attempts = 0
        while True:
            try:
                return await self._planner.next_range(span, batch)
            except RowsLockedError:
                attempts += 1
                self._notify(RangeDeferred(rows=0))
            delay_seconds = backoff_seconds(
                attempts, first=self._options.deferral_seconds, longest=self._options.max_wait_seconds
            )
            if await flow.drained_within(delay_seconds):
                return None

    async def _split(self, key_range: KeyRange, rows: int, flow: WorkQueue) -> list[KeyRange]:
        """Split a range after the first of the rows that it holds now."""
        first = await self._next_range(key_range, rows, flow)
        if first is None:
            return [key_range]
        if first.through == key_range.through:
            # Rows were deleted meanwhile: what is left is no more than this part.
            return [first]
        rest = KeyRange(after=first.through, through=key_range.through, rows=key_range.rows - first.rows)
        return [first, rest]
