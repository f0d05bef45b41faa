"""Names the sessions whose locks keep ranges from being written, or a statement from being run."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import Final

from psycopg import AsyncConnection

from rotator.events import Event, LockHeld, Observer, RangeDeferred, WorkersProgressed
from rotator.exceptions import RotatorError
from rotator.postgres.activity import blocking_transactions, open_transactions
from rotator.postgres.connection import Server, connected
from rotator.runner.aio import in_background

NAMED_AFTER_SECONDS: Final = 5.0
# Shorter than the lock timeout of a range, so that a waiting range is seen.
LOOK_SECONDS: Final = 0.04
IDLE_SECONDS: Final = 0.2
CHECK_SECONDS: Final = 0.5
# Longer than the longest delay between two attempts, and than a Celery worker takes to report one.
RECENT_SECONDS: Final = 8.0
# Most statements end sooner, and need no second connection.
PATIENCE_SECONDS: Final = 1.0


@dataclass(slots=True)
class LockWatch:
    """Reports the transactions of other sessions that have blocked ranges for ``NAMED_AFTER_SECONDS``.

    A range waits for a lock for a moment only, and then for its next attempt. So a transaction that was seen
    to block one is remembered until it ends, or until no range is deferred any more.

    Attributes:
        count_commits: Is called with the number of its queries, each of which is a transaction.
    """

    notify: Observer
    _: KW_ONLY
    count_commits: Callable[[int], None] = lambda _commits: None
    clock: Callable[[], float] = time.monotonic
    _deferred_at: float | None = None
    _since: dict[str, float] = field(default_factory=dict)
    _named: frozenset[str] = frozenset()

    def take(self, event: Event) -> None:
        """Take an event of the run."""
        if isinstance(event, RangeDeferred) or (isinstance(event, WorkersProgressed) and event.deferrals):
            self._deferred_at = self.clock()

    @property
    def is_needed(self) -> bool:
        """Whether ranges are deferred now."""
        return self._deferred_at is not None and self.clock() - self._deferred_at <= RECENT_SECONDS

    async def watch(self, control: AsyncConnection) -> None:
        """Look for holders until cancelled, on a connection that may be shared."""
        try:
            while True:
                if not self.is_needed:
                    self.report({})
                    await asyncio.sleep(IDLE_SECONDS)
                    continue
                await asyncio.sleep(CHECK_SECONDS if self._since else LOOK_SECONDS)
                self.count_commits(1)
                self.see(await blocking_transactions(control))
                if self._since:
                    self.count_commits(1)
                    self.report(await open_transactions(control, self._since))
        finally:
            self.report({})

    def see(self, transactions: frozenset[str]) -> None:
        """Remember transactions that block a range now."""
        now = self.clock()
        for transaction in transactions:
            self._since.setdefault(transaction, now)

    def report(self, phrases: Mapping[str, str]) -> None:
        """Report the transactions that have blocked ranges for long, and forget those without a phrase.

        They have ended.
        """
        now = self.clock()
        self._since = {name: since for name, since in self._since.items() if name in phrases}
        named = frozenset(name for name, since in self._since.items() if now - since >= NAMED_AFTER_SECONDS)
        if named or self._named:
            holders = tuple(phrase for name, phrase in phrases.items() if name in named)
            self.notify(LockHeld(holders=holders, is_new=bool(named - self._named)))
        self._named = named


def lock_holders_named(server: Server, notify: Observer) -> AbstractAsyncContextManager[None]:
    """Report the sessions for which a statement of the block waits, after ``NAMED_AFTER_SECONDS``.

    Unlike a range, a statement of the preflight or of a verification may wait for as long as it takes.
    """
    return in_background(_name_lock_holders(server, LockWatch(notify)), "rotator lock holders")


async def _name_lock_holders(server: Server, watch: LockWatch) -> None:
    await asyncio.sleep(PATIENCE_SECONDS)
    # The block itself notices the loss of the server.
    with suppress(RotatorError):
        async with connected(server) as connection:
            try:
                while True:
                    blocking = await blocking_transactions(connection)
                    watch.see(blocking)
                    watch.report(await open_transactions(connection, blocking))
                    await asyncio.sleep(CHECK_SECONDS)
            finally:
                watch.report({})
