"""Waits for old transactions, and rotates the rows that no range has written."""

from collections.abc import Sequence
from typing import Final

from psycopg import AsyncConnection

from rotator.events import (
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    Observer,
    OnCommit,
    RangeDeferred,
    RangeRetried,
    RowRejected,
    RowsRotated,
)
from rotator.exceptions import RangeRejectedError, RowsLockedError
from rotator.postgres.activity import holders
from rotator.postgres.older_rows import OlderRows
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import OlderRow
from rotator.runner.gate import Gate
from rotator.runner.retry import NextStep, RetryPolicy
from rotator.runner.stop import StopSignal

POLL_SECONDS: Final = 0.25
_RETRY: Final = RetryPolicy()


async def wait_for_older_writers(
    connection: AsyncConnection,
    table: TargetTable,
    started_xid: int,
    *,
    seconds: float | None,
    stop_signal: StopSignal,
    notify: Observer,
) -> bool:
    """Wait for the transactions that wrote to the target before the rotation began.

    Args:
        connection: A connection in autocommit mode.
        table: The target's table.
        started_xid: The transaction that began the rotation.
        seconds: The maximum wait; None for no limit.
        stop_signal: A request to stop ends the wait.
        notify: Gets the names of the sessions that hold the transactions.

    Returns:
        Whether they have ended.
    """
    waited = 0.0
    is_waiting = False
    while holding := await holders(connection, table, started_xid):
        if seconds is not None and waited >= seconds:
            return False
        is_waiting = True
        notify(LateCommitsAwaited(holders=holding))
        if await stop_signal.wait(POLL_SECONDS):
            return False
        waited += POLL_SECONDS
    if is_waiting:
        notify(LateCommitsOver())
    return True


class LateRows:
    """Rotates the rows that no session has written since the rotation began.

    Attributes:
        rows: The number of rows that have new values.
    """

    def __init__(
        self,
        older_rows: OlderRows,
        gate: Gate,
        stop_signal: StopSignal,
        notify: Observer,
        on_commit: OnCommit | None,
    ) -> None:
        self._older_rows = older_rows
        self._gate = gate
        self._stop_signal = stop_signal
        self._notify = notify
        self._on_commit = on_commit
        self.rows = 0

    async def rotate_all(self) -> int:
        """Rotate all of them until a stop is requested, and return the number of rows with new values."""
        async for rows in self._older_rows.find(self._gate.rows):
            async with self._gate.passage(self._stop_signal.drain) as may_begin:
                if not may_begin:
                    break
                await self._rotate(rows)
        return self.rows

    async def _rotate(self, rows: Sequence[OlderRow]) -> None:
        deferrals = rejections = 0
        while not self._stop_signal.drain.is_set():
            try:
                return await self._rotate_once(rows)
            except RowsLockedError:
                deferrals += 1
                self._notify(RangeDeferred(rows=len(rows)))
            except RangeRejectedError as error:
                rejections += 1
                step = _RETRY.after_rejection(error, rows=len(rows), rejections=rejections)
                if step is NextStep.GIVE_UP:
                    return self._notify(RowRejected(key=rows[0].key, reason=error.condition))
                splits = step is NextStep.SPLIT
                self._notify(RangeRetried(rows=len(rows), reason=error.condition, split=splits))
                if splits:
                    middle = len(rows) // 2
                    await self._rotate(rows[:middle])
                    return await self._rotate(rows[middle:])
            await self._stop_signal.wait(_RETRY.delay_seconds(deferrals + rejections))
        return None

    async def _rotate_once(self, rows: Sequence[OlderRow]) -> None:
        written = await self._older_rows.rotate(rows)
        self.rows += written
        self._notify(LateRowsRotated(rows=written))
        if self._on_commit is not None:
            keys = tuple(row.key for row in rows)
            await self._on_commit(RowsRotated(rotation=self._older_rows.rotation, keys=keys, rows=written))
