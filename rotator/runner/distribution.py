"""The owner of a distributed rotation: plans spans, asks Celery workers for help, and reads the progress."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from psycopg import AsyncConnection

from rotator import events
from rotator.exceptions import BrokerError, RangeRejectedError, RowsLockedError, ServerRefusedError
from rotator.postgres import spans
from rotator.postgres.fence import Lease
from rotator.postgres.planner import IndexPlanner
from rotator.postgres.spans import HelperState, Progress
from rotator.ranges import Key, KeyInterval
from rotator.runner.aio import is_set_within
from rotator.runner.context import AskForHelp, RunContext
from rotator.runner.engine import MAX_FAILED_ROWS

POLL_SECONDS: Final = 0.1
SPANS_AHEAD: Final = 16
SPANS_OF_SMALL_TABLE: Final = 8
# A claim costs a round trip, and a host that is lost loses no more.
MIN_RANGES_PER_SPAN: Final = 10
MAX_RANGES_PER_SPAN: Final = 100
# More helpers find nothing to claim.
MAX_HELPERS: Final = SPANS_AHEAD
FIRST_HELPERS: Final = 2
PATIENCE_SECONDS: Final = 30.0
MAX_PATIENCE_SECONDS: Final = 300.0
RETRY_BROKER_SECONDS: Final = 1.0


@dataclass(slots=True)
class Distribution:
    """One pass over some gaps, by Celery workers that claim the spans in the database.

    No other task uses the connection, which is in autocommit mode.
    """

    connection: AsyncConnection
    lease: Lease
    context: RunContext
    ask_for_help: AskForHelp
    _read_at: float = field(default_factory=time.monotonic)
    _alive_at: float = field(default_factory=time.monotonic)
    _failed_rows: int = 0
    _patience_seconds: float = PATIENCE_SECONDS
    _sending: asyncio.Task[list[int]] | None = None
    _is_broker_lost: bool = False

    async def run(self, gaps: Sequence[KeyInterval], *, rows_left: int, max_rows: int | None) -> None:
        """Have Celery workers rotate the gaps, which have about ``rows_left`` rows, until a drain begins.

        Raises:
            ServerRefusedError: A worker met a permanent error.
            RangeRejectedError: More than ``MAX_FAILED_ROWS`` rows were rejected.
            SupersededError: This process does not own the rotation any more.
        """
        settled = await spans.clear(self.connection, self.lease)
        progress = Progress(
            spans=0, deferrals=0, claimable=0, settled=settled, ranges=0, rows=0, settled_ranges=0
        )
        planner = IndexPlanner(self.connection, self.context.table)
        left, limit, batch = deque(gaps), max_rows, self.context.options.batch
        span_rows = batch * ranges_per_span(rows_left, batch)
        drain = self.context.stop_signal.drain
        try:
            while not drain.is_set():
                progress = await self._read(progress)
                is_sending = await self.is_sending()
                helpers = await spans.read_helpers(self.connection, self.lease.rotation)
                if error := next((helper.error for helper in helpers if helper.error), ""):
                    raise ServerRefusedError(error)
                if not is_sending and (progress.claimable or (left and not progress.spans)):
                    await self.ask(helpers)
                planned, is_locked = progress.spans, False
                while left and planned < SPANS_AHEAD and limit != 0 and not is_locked:
                    try:
                        limit = await self._plan(planner, left, span_rows, limit)
                        planned += 1
                    except RowsLockedError:
                        is_locked = True
                        self.context.notify(events.RangeDeferred(rows=0))
                if not planned and not is_locked:
                    return
                await is_set_within(drain, POLL_SECONDS)
        finally:
            if self._sending is not None:
                self._sending.cancel()

    async def _plan(
        self, planner: IndexPlanner, left: deque[KeyInterval], span_rows: int, limit: int | None
    ) -> int | None:
        gap = left[0]
        planned = await planner.next_range(gap, span_rows if limit is None else min(span_rows, limit))
        left.popleft()
        if planned.through != gap.through:
            left.appendleft(KeyInterval(after=planned.through, through=gap.through))
        await spans.plan(self.connection, self.lease, planned)
        return None if limit is None else max(0, limit - planned.rows)

    async def _read(self, before: Progress) -> Progress:
        """Read what the workers have done since the last time, and report it."""
        finished = await spans.collect_finished(self.connection, self.lease)
        progress = await spans.read_progress(self.connection, self.lease.rotation, since=before.settled)
        # Those that are not settled are counted again.
        ranges = progress.ranges - (before.ranges - before.settled_ranges)
        rows = progress.rows - (before.rows - before.settled_rows)
        deferrals = sum(s.deferrals for s in finished) + progress.deferrals - before.deferrals
        retries = sum(s.retries for s in finished)
        read_at = time.monotonic()
        if ranges or deferrals or retries:
            self.context.notify(
                events.WorkersProgressed(
                    ranges=ranges,
                    rows=rows,
                    deferrals=deferrals,
                    retries=retries,
                    seconds=read_at - self._read_at,
                )
            )
        self._read_at = read_at
        for key, reason in (failed for span in finished for failed in span.failed_keys):
            self._failed_rows += 1
            self.context.notify(events.RowRejected(key=Key(key), reason=reason))
            if self._failed_rows > MAX_FAILED_ROWS:
                raise RangeRejectedError(reason, retryable=False)
        return progress

    async def ask(self, helpers: Sequence[HelperState]) -> None:
        """Send more messages while workers answer, and another one instead of one that is lost.

        Few messages wait at a time where every worker is busy: one more than there are living helpers.
        """
        now, alive = time.monotonic(), sum(helper.is_alive for helper in helpers)
        if alive:
            self._alive_at, self._patience_seconds = now, PATIENCE_SECONDS
        patience_seconds = MAX_PATIENCE_SECONDS if alive else self._patience_seconds
        lost = [
            helper.id
            for helper in helpers
            if not helper.is_alive
            and (helper.seconds_since_sent is None or helper.seconds_since_sent >= patience_seconds)
        ]
        more = min(MAX_HELPERS, alive + max(FIRST_HELPERS, alive + 1)) - len(helpers)
        if not lost and more <= 0:
            return
        if lost and now - self._alive_at >= PATIENCE_SECONDS and not self._is_broker_lost:
            self.context.notify(events.WorkersSilent(seconds=now - self._alive_at))
            self._patience_seconds = min(2 * self._patience_seconds, MAX_PATIENCE_SECONDS)
        messages = [
            await spans.add_helper(self.connection, self.lease, instead_of=helper)
            for helper in [*lost, *[None] * more]
        ]
        self._sending = asyncio.create_task(self._send(messages), name="rotator messages")

    async def _send(self, messages: Sequence[int]) -> list[int]:
        """Send messages while the spans are planned, and return the ids of those that were sent."""
        sent = list[int]()
        try:
            for message in messages:
                await self.ask_for_help(self.lease.rotation, message)
                sent.append(message)
        except BrokerError as error:
            if not self._is_broker_lost:
                self.context.notify(events.BrokerUnreachable(reason=str(error)))
            self._is_broker_lost = True
            await asyncio.sleep(RETRY_BROKER_SECONDS)
        else:
            self._is_broker_lost = False
        return sent

    async def is_sending(self) -> bool:
        """Return whether messages are on their way; note those that were sent."""
        if self._sending is None:
            return False
        if not self._sending.done():
            return True
        sent, self._sending = self._sending.result(), None
        await spans.mark_sent(self.connection, sent)
        return False


def ranges_per_span(rows: int, batch: int) -> int:
    """Return how many ranges a span holds, so that small tables too have spans for several workers."""
    return max(MIN_RANGES_PER_SPAN, min(MAX_RANGES_PER_SPAN, rows // (batch * SPANS_OF_SMALL_TABLE)))
