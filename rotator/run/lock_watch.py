"""Names the sessions that keep ranges waiting for locks."""

import asyncio
import time
from typing import Final

from psycopg import AsyncConnection

from rotator.events import Event, LockHeld, Observer, RangeDeferred
from rotator.postgres.lock_holders import lock_holders

NAMED_AFTER_SECONDS: Final = 5.0
# A range waits for a lock for a tenth of a second at a time.
LOOK_SECONDS: Final = 0.04
# No range waits longer between two attempts.
RECENT_SECONDS: Final = 6.0


class LockWatch:
    """Looks for holders while ranges are deferred again and again, and tells of each change once."""

    def __init__(self, notify: Observer) -> None:
        self._notify = notify
        self._since: float | None = None
        self._deferred_at = 0.0
        self._told = frozenset[int]()

    def take(self, event: Event) -> None:
        """Note a deferral."""
        if isinstance(event, RangeDeferred):
            now = time.monotonic()
            if self._since is None or now - self._deferred_at > RECENT_SECONDS:
                self._since, self._told = now, frozenset()
            self._deferred_at = now

    def _is_due(self) -> bool:
        now = time.monotonic()
        return (
            self._since is not None
            and now - self._since >= NAMED_AFTER_SECONDS
            and now - self._deferred_at <= RECENT_SECONDS
        )

    async def watch(self, control: AsyncConnection) -> None:
        """Look for holders until cancelled.

        Args:
            control: In autocommit mode; may be shared.
        """
        while True:
            if not self._is_due():
                await asyncio.sleep(1.0)
                continue
            await asyncio.sleep(LOOK_SECONDS)
            holders = await lock_holders(control, seconds=NAMED_AFTER_SECONDS)
            if not holders:
                continue
            if frozenset(holders) != self._told:
                self._told = frozenset(holders)
                self._notify(LockHeld(holders=tuple(holders[pid] for pid in sorted(holders))))
            # It is costly for the server's lock table, and the same holder is named once.
            await asyncio.sleep(NAMED_AFTER_SECONDS)
