"""Waits for old transactions, and rotates the rows that no range has written."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from psycopg import AsyncConnection

from rotator import events
from rotator.exceptions import RangeRejectedError, RangeTooSlowError, RowsLockedError
from rotator.postgres.activity import holders
from rotator.postgres.writer import OlderRow
from rotator.ranges import Written
from rotator.runner import retry
from rotator.runner.aio import is_set_within
from rotator.runner.context import RunContext
from rotator.runner.engine import MAX_FAILED_ROWS
from rotator.runner.gate import Gate

POLL_SECONDS: Final = 0.25


async def wait_for_older_writers(
    connection: AsyncConnection, started_xid: int, context: RunContext, *, seconds: float = inf
) -> bool:
    """Wait for the transactions that wrote to the target before the rotation began, or for a stop.

    Return whether they have ended.
    """
    waited = 0.0
    while holding := await holders(connection, context.table, started_xid):
        if waited >= seconds:
            return False
        context.notify(events.LateCommitsAwaited(holders=holding))
        if await context.stop_signal.wait(POLL_SECONDS):
            return False
        waited += POLL_SECONDS
    if waited:
        context.notify(events.LateCommitsOver())
    return True


@dataclass(slots=True)
class LateRows:
    """Rotates rows by their places: rows that no session has written since the start, or survivors.

    Attributes:
        write: Writes rows of one leaf in a transaction; see :func:`rotator.postgres.writer.write_placed`.
        max_failed_rows: The rejected rows after which it gives up; None for no limit.
    """

    write: Callable[[Sequence[OlderRow]], Awaitable[Written]]
    gate: Gate
    drain: asyncio.Event
    notify: events.Observer
    max_failed_rows: int | None = MAX_FAILED_ROWS
    _failed_rows: int = 0

    async def rotate_all(self, found: AsyncIterator[list[OlderRow]]) -> int:
        """Rotate all of them until a drain begins, and return the number of rows with new values.

        Raises:
            RangeRejectedError: More than ``max_failed_rows`` rows were rejected.
        """
        rotated = 0
        async for rows in found:
            rest = rows
            while rest:
                async with self.gate.passage(self.drain) as may_begin:
                    if not may_begin:
                        return rotated
                    # The pace may have changed since they were found.
                    batch = self.gate.rows
                    rotated += await self.rotate(rest[:batch])
                    rest = rest[batch:]
        return rotated

    async def rotate(self, rows: Sequence[OlderRow]) -> int:
        """Rotate rows of one leaf, and return their number; rows that the server rejects are reported."""
        deferrals = rejections = 0
        while not self.drain.is_set():
            try:
                written = await self.write(rows)
            except RowsLockedError:
                deferrals += 1
                self.notify(events.RangeDeferred(rows=len(rows)))
            except RangeRejectedError as error:
                rejections += 1
                if isinstance(error, RangeTooSlowError):
                    self.gate.sizer.shrink(len(rows))
                splits = not retry.may_help(error, rows=len(rows), rejections=rejections)
                if splits and len(rows) == 1:
                    self.notify(events.RowRejected(key=rows[0].key, reason=error.condition))
                    self._failed_rows += 1
                    if self.max_failed_rows is not None and self._failed_rows > self.max_failed_rows:
                        raise
                    break
                self.notify(events.RangeRetried(rows=len(rows), reason=error.condition, split=splits))
                if splits:
                    middle = len(rows) // 2
                    return await self.rotate(rows[:middle]) + await self.rotate(rows[middle:])
            else:
                self.gate.count_completed(written.rows, written.server_seconds)
                self.notify(events.LateRowsRotated(rows=written.rows))
                return written.rows
            await is_set_within(self.drain, retry.backoff_seconds(deferrals + rejections))
        return 0
