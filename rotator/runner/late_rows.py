"""Waits for old transactions, and rotates the rows that no range has written."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from math import inf
from typing import Final, TypeAlias

from psycopg import AsyncConnection

from rotator.events import (
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    Observer,
    RangeDeferred,
    RangeRetried,
    RowRejected,
)
from rotator.exceptions import RangeRejectedError, RangeTooSlowError, RowsLockedError
from rotator.postgres.activity import holders
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import OlderRow
from rotator.ranges import Written
from rotator.runner.context import RunContext
from rotator.runner.gate import Gate
from rotator.runner.retry import NextStep, RetryPolicy
from rotator.runner.stop import StopSignal

POLL_SECONDS: Final = 0.25
_RETRY: Final = RetryPolicy()


async def wait_for_older_writers(
    connection: AsyncConnection,
    table: TargetTable,
    started_xid: int,
    context: RunContext,
    *,
    seconds: float = inf,
) -> bool:
    """Wait for the transactions that wrote to the target before the rotation began, or for a stop.

    Return whether they have ended.
    """
    waited = 0.0
    is_waiting = False
    while holding := await holders(connection, table, started_xid):
        if waited >= seconds:
            return False
        is_waiting = True
        context.notify(LateCommitsAwaited(holders=holding))
        if await context.stop_signal.wait(POLL_SECONDS):
            return False
        waited += POLL_SECONDS
    if is_waiting:
        context.notify(LateCommitsOver())
    return True


WritePlaced: TypeAlias = Callable[[Sequence[OlderRow]], Awaitable[Written]]
"""Writes rows of one leaf in a transaction; see :func:`rotator.postgres.writer.write_placed`."""


class LateRows:
    """Rotates rows by their places: rows that no session has written since the start, or survivors.

    Attributes:
        rows: The number of rows that have new values.
    """

    def __init__(self, write: WritePlaced, gate: Gate, stop_signal: StopSignal, notify: Observer) -> None:
        self._write = write
        self._gate = gate
        self._stop_signal = stop_signal
        self._notify = notify
        self.rows = 0

    async def rotate_all(self, found: AsyncIterator[list[OlderRow]]) -> int:
        """Rotate all of them until a stop is requested, and return the number of rows with new values."""
        async for rows in found:
            rest = rows
            while rest:
                async with self._gate.passage(self._stop_signal.drain) as may_begin:
                    if not may_begin:
                        return self.rows
                    # The pace may have changed since they were found.
                    batch = self._gate.rows
                    await self.rotate(rest[:batch])
                    rest = rest[batch:]
        return self.rows

    async def rotate(self, rows: Sequence[OlderRow]) -> None:
        """Rotate rows of one leaf; rows that the server rejects are reported."""
        deferrals = rejections = 0
        while not self._stop_signal.drain.is_set():
            try:
                written = await self._write(rows)
            except RowsLockedError:
                deferrals += 1
                self._notify(RangeDeferred(rows=len(rows)))
            except RangeRejectedError as error:
                rejections += 1
                if isinstance(error, RangeTooSlowError):
                    self._gate.shrink(len(rows))
                step = _RETRY.after_rejection(error, rows=len(rows), rejections=rejections)
                if step is NextStep.GIVE_UP:
                    return self._notify(RowRejected(key=rows[0].key, reason=error.condition))
                splits = step is NextStep.SPLIT
                self._notify(RangeRetried(rows=len(rows), reason=error.condition, split=splits))
                if splits:
                    middle = len(rows) // 2
                    await self.rotate(rows[:middle])
                    return await self.rotate(rows[middle:])
            else:
                self._gate.count_completed(written.rows, written.server_seconds)
                self.rows += written.rows
                return self._notify(LateRowsRotated(rows=written.rows))
            await self._stop_signal.wait(_RETRY.delay_seconds(deferrals + rejections))
        return None
