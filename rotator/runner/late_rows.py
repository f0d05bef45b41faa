"""Waits for old transactions, and rotates the rows that no range has written."""

from collections.abc import Sequence
from typing import Final

from psycopg import AsyncConnection

from rotator.events import (
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    Observer,
    RangeDeferred,
    RangeRetried,
    RowFailed,
    RowsRotated,
)
from rotator.exceptions import RangeRejectedError, RowsLockedError
from rotator.postgres.activity import holders
from rotator.postgres.older_rows import OlderRows
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import OlderRow
from rotator.runner.context import OnCommit
from rotator.runner.engine import backoff_seconds
from rotator.runner.stop import StopSignal

POLL_SECONDS: Final = 0.25
_REFUSALS: Final = 3
_FIRST_WAIT_SECONDS: Final = 0.1
_MAX_WAIT_SECONDS: Final = 5.0


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
        connection: In autocommit mode.
        table: The target's table.
        started_xid: The transaction that began the rotation.
        seconds: How long to wait at the most; None for as long as it takes.
        stop_signal: A stop ends the waiting.
        notify: Is told whom it waits for.

    Returns:
        Whether they are over.
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


async def rotate_older_rows(
    older_rows: OlderRows,
    *,
    batch: int,
    stop_signal: StopSignal,
    notify: Observer,
    on_commit: OnCommit | None,
) -> int:
    """Rotate the rows that nothing has written since the start, until a stop is asked for.

    Returns:
        The number of rows that have new values.
    """
    rotation = _OlderRotation(older_rows, stop_signal, notify, on_commit)
    async for rows in older_rows.find(batch):
        await rotation.rotate(rows)
        if stop_signal.drain.is_set():
            break
    return rotation.rows


class _OlderRotation:
    def __init__(
        self, older_rows: OlderRows, stop_signal: StopSignal, notify: Observer, on_commit: OnCommit | None
    ) -> None:
        self._older_rows = older_rows
        self._stop_signal = stop_signal
        self._notify = notify
        self._on_commit = on_commit
        self.rows = 0

    async def rotate(self, rows: Sequence[OlderRow]) -> None:
        deferrals = refusals = 0
        while not self._stop_signal.drain.is_set():
            try:
                return await self._rotate_whole(rows)
            except RowsLockedError:
                deferrals += 1
                self._notify(RangeDeferred(rows=len(rows)))
            except RangeRejectedError as refused:
                refusals += 1
                tries_whole = refused.retryable and refusals < _REFUSALS
                if not tries_whole and len(rows) == 1:
                    return self._notify(RowFailed(key=rows[0].key, reason=refused.condition))
                self._notify(RangeRetried(rows=len(rows), reason=refused.condition, split=not tries_whole))
                if not tries_whole:
                    middle = len(rows) // 2
                    await self.rotate(rows[:middle])
                    return await self.rotate(rows[middle:])
            await self._stop_signal.wait(
                backoff_seconds(deferrals + refusals, first=_FIRST_WAIT_SECONDS, longest=_MAX_WAIT_SECONDS)
            )
        return None

    async def _rotate_whole(self, rows: Sequence[OlderRow]) -> None:
        written = await self._older_rows.rotate(rows)
        self.rows += written
        self._notify(LateRowsRotated(rows=written))
        if self._on_commit is not None:
            keys = tuple(row.key for row in rows)
            await self._on_commit(RowsRotated(rotation=self._older_rows.rotation, keys=keys, rows=written))
