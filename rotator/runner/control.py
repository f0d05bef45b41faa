"""Applies what users request of a running rotation: pause, limits, cancel."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Final

from rotator.events import LimitsChanged
from rotator.exceptions import OptionError
from rotator.postgres.control import Requested
from rotator.postgres.owner import UNKNOWN_THROTTLES_SECONDS
from rotator.runner.aio import handled_signals
from rotator.runner.context import RunContext
from rotator.runner.gate import Gate

PAUSE: Final = "pause"
OWNER: Final = "owner"
SIGNAL: Final = "SIGUSR1"


@dataclass(slots=True)
class LiveControl:
    """Applies the control row of a rotation to the gate and the pace.

    Attributes:
        cancel: Is called with the user who cancels the rotation.
        revision: The latest revision that was applied.
    """

    context: RunContext
    cancel: Callable[[str], None]
    revision: int = 0
    _answered: int | None = None

    def apply(self, requested: Requested) -> None:
        """Apply the requests; do nothing where they have not changed."""
        options, gate, pacing = self.context.options, self.context.gate, self.context.pacing
        if self._answered is None:
            # A request to cancel is for the owner of that time. A message of Celery begins a new owner of a
            # rotation that no user has resumed.
            is_resumed_by_user = options.rotation is None
            self._answered = requested.revision if is_resumed_by_user else requested.applied_revision
        gate.hold(PAUSE, f"paused by {requested.paused_by}" if requested.paused else "", slowly=False)
        # A pace that only a newer version has changes nothing.
        with suppress(OptionError):
            pacing.set_pace(requested.pace or options.pace)
        concurrency = min(requested.concurrency or options.concurrency, gate.most_workers)
        rows = requested.batch or options.batch
        if (concurrency, rows) != (gate.concurrency, gate.max_rows):
            gate.set_limits(concurrency=concurrency, rows=rows)
            self.context.notify(LimitsChanged(concurrency=concurrency, batch=rows, by=requested.changed_by))
        if requested.cancel_revision > self._answered:
            self._answered = requested.cancel_revision
            self.cancel(requested.cancelled_by)
        self.revision = requested.revision

    def follow_owner(self, requested: Requested, *, has_throttles: bool) -> None:
        """Apply the requests, and what holds the owner, in a helper.

        Where the owner reads throttles, they are unknown while it is silent.
        """
        self.apply(requested)
        reason, silent_seconds = requested.throttle_reason, requested.silent_seconds
        limit = UNKNOWN_THROTTLES_SECONDS
        if not reason and has_throttles and silent_seconds > limit:
            reason = f"no heartbeat of the owner for {silent_seconds:.0f} s > {limit:.0f} s"
        self.context.gate.hold(OWNER, reason)


def pause_signals(gate: Gate) -> AbstractContextManager[None]:
    """Pause on SIGUSR1 and resume on SIGUSR2, where this is the main thread of a Unix system.

    They work while the database is unreachable, and end with the process.
    """
    if not hasattr(signal, SIGNAL):
        return nullcontext()
    return handled_signals(
        {
            signal.SIGUSR1: lambda: gate.hold(SIGNAL, "paused by SIGUSR1"),
            signal.SIGUSR2: lambda: gate.release(SIGNAL, slowly=False),
        },
        # A signal that comes just after the end of the run must not end the process before its summary.
        default=signal.SIG_IGN,
    )
