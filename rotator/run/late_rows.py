"""The pass over rows that transactions older than the rotation have committed."""

from typing import Final

from psycopg import AsyncConnection

from rotator.engine.backoff import backoff_seconds
from rotator.errors import RangeRefusedError, RowsLockedError
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
from rotator.keys import Key
from rotator.postgres.late_commits import LatePass, holders
from rotator.postgres.table import TargetTable
from rotator.run.context import Announce
from rotator.run.stopping import StopRequests

POLL_SECONDS: Final = 0.25
_REFUSALS: Final = 3
_FIRST_WAIT_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 5.0


async def older_writers_are_over(
    connection: AsyncConnection,
    table: TargetTable,
    started_xid: int,
    *,
    seconds: float | None,
    requests: StopRequests,
    notify: Observer,
) -> bool:
    """Wait for the transactions that wrote to the target before the rotation began.

    Args:
        connection: In autocommit mode.
        table: The target's table.
        started_xid: The transaction that began the rotation.
        seconds: How long to wait at the most; None for as long as it takes.
        requests: A stop ends the waiting.
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
        if await requests.wait(POLL_SECONDS):
            return False
        waited += POLL_SECONDS
    if is_waiting:
        notify(LateCommitsOver())
    return True


async def rotate_late_rows(
    late_pass: LatePass, *, batch: int, requests: StopRequests, notify: Observer, announce: Announce | None
) -> None:
    """Rotate what was committed late, wherever in the table it is, until a stop is asked for."""
    rotation = _LateRotation(late_pass, requests, notify, announce)
    async for keys in late_pass.found(batch):
        await rotation.rotate(keys)
        if requests.drain.is_set():
            return


class _LateRotation:
    def __init__(
        self, late_pass: LatePass, requests: StopRequests, notify: Observer, announce: Announce | None
    ) -> None:
        self._late_pass = late_pass
        self._requests = requests
        self._notify = notify
        self._announce = announce

    async def rotate(self, keys: list[Key]) -> None:
        deferrals = refusals = 0
        while not self._requests.drain.is_set():
            try:
                return await self._rotate_whole(keys)
            except RowsLockedError:
                deferrals += 1
                self._notify(RangeDeferred(rows=len(keys)))
            except RangeRefusedError as refused:
                refusals += 1
                tries_whole = refused.passing and refusals < _REFUSALS
                if not tries_whole and len(keys) == 1:
                    return self._notify(RowFailed(key=keys[0], reason=refused.condition))
                self._notify(RangeRetried(rows=len(keys), reason=refused.condition, split=not tries_whole))
                if not tries_whole:
                    middle = len(keys) // 2
                    await self.rotate(keys[:middle])
                    return await self.rotate(keys[middle:])
            await self._requests.wait(
                backoff_seconds(
                    deferrals + refusals, first=_FIRST_WAIT_SECONDS, longest=_LONGEST_WAIT_SECONDS
                )
            )
        return None

    async def _rotate_whole(self, keys: list[Key]) -> None:
        rows = await self._late_pass.rotate(keys)
        self._notify(LateRowsRotated(rows=rows))
        if self._announce is not None:
            await self._announce(RowsRotated(rotation=self._late_pass.rotation, keys=tuple(keys), rows=rows))
