"""Applies what users request of a running rotation: pause, limits, cancel."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final

from rotator.events import LimitsChanged, Observer
from rotator.exceptions import OptionError
from rotator.options import RunOptions
from rotator.postgres.control import Requested
from rotator.postgres.owner import UNKNOWN_THROTTLES_SECONDS
from rotator.runner.aio import handled_signals
from rotator.runner.gate import Gate
from rotator.runner.pacing import Pacing

PAUSE: Final = "pause"
OWNER: Final = "owner"
SIGNAL: Final = "SIGUSR1"


class LiveControl:
    """Applies the control row of a rotation to a gate.

    Attributes:
        revision: The latest revision that was applied.
    """

    def __init__(
        self,
        gate: Gate,
        pacing: Pacing,
        options: RunOptions,
        notify: Observer,
        *,
        cancel: Callable[[str], None],
    ) -> None:
        """Begin with the options of the run.

        Args:
            gate: The gate.
            pacing: What keeps the pace.
            options: The options of the run.
            notify: Is called with :class:`LimitsChanged`.
            cancel: Is called with the user who cancels the rotation.
        """
        self._gate = gate
        self._pacing = pacing
        self._options = options
        self._notify = notify
        self._cancel = cancel
        self._answered: int | None = None
        self.revision = 0

    def apply(self, requested: Requested) -> None:
        """Apply the requests; do nothing where they have not changed."""
        if self._answered is None:
            # A request to cancel is for the owner of that time. A message of Celery begins a new owner of a
            # rotation that no user has resumed.
            is_resumed_by_user = self._options.rotation is None
            self._answered = requested.revision if is_resumed_by_user else requested.applied_revision
        if requested.paused:
            self._gate.hold(PAUSE, f"paused by {requested.paused_by}")
        else:
            self._gate.release(PAUSE, slowly=False)
        self._limit(requested)
        if requested.cancel_revision > self._answered:
            self._answered = requested.cancel_revision
            self._cancel(requested.cancelled_by)
        self.revision = requested.revision

    def follow_owner(self, requested: Requested, *, has_throttles: bool) -> None:
        """Apply the requests, and what holds the owner, in a helper.

        Args:
            requested: What was read.
            has_throttles: Whether the owner reads throttles, so that they are unknown while it is silent.
        """
        self.apply(requested)
        reason, silent_seconds = requested.throttle_reason, requested.silent_seconds
        limit = UNKNOWN_THROTTLES_SECONDS
        if not reason and has_throttles and silent_seconds > limit:
            reason = f"no heartbeat of the owner for {silent_seconds:.0f} s > {limit:.0f} s"
        if reason:
            self._gate.hold(OWNER, reason)
        else:
            self._gate.release(OWNER)

    def _limit(self, requested: Requested) -> None:
        gate, options = self._gate, self._options
        # A pace that only a newer version has changes nothing.
        with suppress(OptionError):
            self._pacing.set_pace(requested.pace or options.pace)
        concurrency = min(requested.concurrency or options.concurrency, gate.most_workers)
        rows = requested.batch or options.batch
        if (concurrency, rows) != (gate.concurrency, gate.max_rows):
            gate.set_limits(concurrency=concurrency, rows=rows)
            self._notify(LimitsChanged(concurrency=concurrency, batch=rows, by=requested.changed_by))


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
