"""The coordinator of a distributed rotation: plans wide spans, has them published, and watches them."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from psycopg import AsyncConnection

from rotator.events import (
    BrokerUnreachable,
    Observer,
    RangeCompleted,
    RangeDeferred,
    RangeRetried,
    RowFailed,
    WorkersSilent,
)
from rotator.exceptions import (
    BrokerError,
    RangeRejectedError,
    RowsLockedError,
    ServerLostError,
    ServerRefusedError,
)
from rotator.postgres import spans
from rotator.postgres.fence import Lease
from rotator.postgres.planner import IndexPlanner
from rotator.postgres.spans import SpanProgress
from rotator.ranges import Key, KeyInterval
from rotator.runner.engine import MAX_FAILED_ROWS

POLL_SECONDS: Final = 0.1
SILENT_SECONDS: Final = 30.0
# No message is heard of where there is no worker; after a while a new one is worth little.
MAX_PATIENCE_SECONDS: Final = 300.0
SPANS_OUTSTANDING: Final = 16
SPANS_OF_SMALL_TABLE: Final = 8
# A task opens its connections anew, which a few ranges would not be worth; and a host that is lost loses no
# more.
MIN_RANGES_PER_SPAN: Final = 10
MAX_RANGES_PER_SPAN: Final = 100


class SpanPublisher(Protocol):
    """Knows the broker."""

    async def publish(self, lease: Lease, span: int) -> None:
        """Have some worker rotate a span.

        Raises:
            BrokerError: The broker cannot be reached; the span was perhaps published all the same.
        """
        ...

    async def revoke(self) -> None:
        """Take back what no worker has begun, as well as that can be done."""
        ...


@dataclass(slots=True)
class _Outstanding:
    """A span that some worker has, or will have.

    Attributes:
        rows: How many of its rows are known to be rotated.
        ranges: In how many ranges.
        generation: How often a worker has begun with it.
        is_held: Whether a worker has it.
        last_change_at: When one of these last changed, or it was published.
        is_published: Whether the broker took it.
    """

    rows: int = 0
    ranges: int = 0
    generation: int = 0
    is_held: bool = False
    last_change_at: float = 0.0
    is_published: bool = False


class Distribution:
    """One pass over some gaps, by workers elsewhere."""

    def __init__(
        self,
        connection: AsyncConnection,
        planner: IndexPlanner,
        lease: Lease,
        publisher: SpanPublisher,
        *,
        batch: int,
        notify: Observer,
    ) -> None:
        """Take a connection in autocommit mode, for this pass's use alone."""
        self._connection = connection
        self._planner = planner
        self._claim = lease
        self._publisher = publisher
        self._batch = batch
        self._notify = notify
        self._outstanding: dict[int, _Outstanding] = {}
        self._is_broker_unreachable = False
        self._clock = asyncio.get_running_loop().time
        self._last_change_at = self._clock()
        self._patience_seconds = SILENT_SECONDS
        self._failed_rows = 0

    async def run(
        self,
        gaps: Sequence[KeyInterval],
        drain: asyncio.Event,
        *,
        rows_left: int,
        max_rows: int | None,
    ) -> None:
        """Have the gaps rotated, until a drain is asked for.

        Args:
            gaps: What is left to do.
            drain: Once set, no more is planned.
            rows_left: About how many rows that are.
            max_rows: How many of them are planned at the most; None for no limit.

        Raises:
            ServerRefusedError: A worker met what trying again does not mend.
            RangeRejectedError: More rows were refused than ``MAX_FAILED_ROWS``.
            ServerLostError: The spans are gone, so that what is done has to be read anew.
            SupersededError: This process does not own the rotation any more.
        """
        await spans.clear(self._connection, self._claim)
        left, limit = deque(gaps), max_rows
        span_rows = self._batch * ranges_per_span(rows_left, self._batch)
        while not drain.is_set():
            is_locked = False
            while left and len(self._outstanding) < SPANS_OUTSTANDING and limit != 0 and not is_locked:
                try:
                    limit = await self._plan(left, span_rows, limit)
                except RowsLockedError:
                    is_locked = True
                    self._notify(RangeDeferred(rows=0))
            await self._publish_again()
            if not self._outstanding and not is_locked:
                return
            await _wait(drain, POLL_SECONDS)
            await self._look()
        if not self._is_broker_unreachable:
            await self._publisher.revoke()

    async def _plan(self, left: deque[KeyInterval], span_rows: int, limit: int | None) -> int | None:
        gap = left[0]
        planned = await self._planner.next_range(gap, span_rows if limit is None else min(span_rows, limit))
        left.popleft()
        if planned.through != gap.through:
            left.appendleft(KeyInterval(after=planned.through, through=gap.through))
        number = await spans.plan(self._connection, self._claim, planned)
        self._outstanding[number] = _Outstanding()
        return None if limit is None else max(0, limit - planned.rows)

    async def _publish_again(self) -> None:
        """Publish what is not yet published, or of which nothing was heard for long."""
        due = [number for number, span in self._outstanding.items() if self._is_due(span)]
        silent_seconds = self._clock() - self._last_change_at
        if due and silent_seconds >= SILENT_SECONDS and not self._is_broker_unreachable:
            self._notify(WorkersSilent(seconds=silent_seconds))
            # Perhaps nobody will come for long, and messages are not to pile up until then.
            self._patience_seconds = min(2 * self._patience_seconds, MAX_PATIENCE_SECONDS)
        for number in due:
            span = self._outstanding[number]
            span.last_change_at = self._clock()
            try:
                await self._publisher.publish(self._claim, number)
            except BrokerError as error:
                span.is_published = False
                if not self._is_broker_unreachable:
                    self._notify(BrokerUnreachable(reason=str(error)))
                self._is_broker_unreachable = True
                return
            span.is_published = True
            self._is_broker_unreachable = False

    def _is_due(self, span: _Outstanding) -> bool:
        if not span.is_published:
            return True
        # One that nobody has may well wait for its turn, as long as anybody does anything.
        last_change_at = (
            span.last_change_at if span.is_held else max(span.last_change_at, self._last_change_at)
        )
        return self._clock() - last_change_at >= self._patience_seconds

    async def _look(self) -> None:
        found = await spans.read_progress(self._connection, list(self._outstanding))
        if len(found) < len(self._outstanding):
            raise ServerLostError("What was planned for the workers is gone from the database.")
        for progress in found:
            span = self._outstanding[progress.id]
            if progress.ranges > span.ranges:
                self._notify(
                    RangeCompleted(
                        rows=progress.rows - span.rows,
                        seconds=POLL_SECONDS,
                        retries=0,
                        ranges=progress.ranges - span.ranges,
                    )
                )
            if not progress.is_held and (span.is_held or progress.generation > span.generation):
                # A worker has begun with it and left it to others.
                span.is_published = False
            if (progress.generation, progress.ranges) != (span.generation, span.ranges):
                span.last_change_at = self._last_change_at = self._clock()
                self._patience_seconds = SILENT_SECONDS
            span.rows, span.ranges = progress.rows, progress.ranges
            span.generation, span.is_held = progress.generation, progress.is_held
            if progress.is_finished:
                del self._outstanding[progress.id]
                self._tell_end(progress)

    def _tell_end(self, progress: SpanProgress) -> None:
        for _ in range(progress.retries):
            self._notify(RangeRetried(rows=0, reason="reported by a worker", split=False))
        for key, reason in progress.failed_keys:
            self._failed_rows += 1
            self._notify(RowFailed(key=Key(key), reason=reason))
            if self._failed_rows > MAX_FAILED_ROWS:
                raise RangeRejectedError(reason, retryable=False)
        if progress.error:
            raise ServerRefusedError(progress.error)


def ranges_per_span(rows: int, batch: int) -> int:
    """Return how many ranges a span holds, so that small tables too have spans for several workers."""
    return max(MIN_RANGES_PER_SPAN, min(MAX_RANGES_PER_SPAN, rows // (batch * SPANS_OF_SMALL_TABLE)))


async def _wait(drain: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await drain.wait()
    except TimeoutError:
        return
