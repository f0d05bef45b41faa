"""Reports what keeps VACUUM from removing dead rows while a rotation runs."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from psycopg import AsyncConnection

from rotator.events import HorizonHeld, Observer
from rotator.exceptions import RotatorError, ServerLostError
from rotator.postgres.activity import HorizonHolder, horizon_holders

LOOK_SECONDS: Final = 2.0
# Shorter transactions hold the horizon for a moment all the time.
HELD_SECONDS: Final = 5.0


class HorizonWatch:
    """Reports holders of the xmin horizon that have not advanced for ``HELD_SECONDS``.

    Rows that were deleted or updated after the horizon stay in the table, whatever VACUUM does.

    Attributes:
        held: One phrase for each holder that has not advanced for long.
    """

    def __init__(self, notify: Observer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._notify = notify
        self._clock = clock
        self._since = dict[tuple[str, str], float]()
        self._reported = frozenset[str]()
        self.held: tuple[str, ...] = ()

    async def watch(self, control: AsyncConnection) -> None:
        """Look for holders until cancelled, on a connection that may be shared."""
        while True:
            try:
                self.take(await horizon_holders(control))
            except ServerLostError:
                raise
            except RotatorError:
                # A role that may not read the views rotates all the same.
                return
            await asyncio.sleep(LOOK_SECONDS)

    def take(self, holders: tuple[HorizonHolder, ...]) -> None:
        """Compare the holders, the oldest first, with those that were seen before, and report new ones."""
        now = self._clock()
        seen = self._since
        self._since = {(each.name, each.xmin): seen.get((each.name, each.xmin), now) for each in holders}
        held = [each for each in holders if now - self._since[each.name, each.xmin] >= HELD_SECONDS]
        self.held = tuple(each.phrase for each in held)
        names = frozenset(each.name for each in held)
        if names - self._reported:
            self._notify(HorizonHeld(holders=self.held))
        self._reported = names
