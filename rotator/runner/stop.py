"""Requests to stop: the first drains, the second cancels the work in flight."""

import asyncio
import signal
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, TypeVar

from rotator.events import DrainStarted, Observer, StopReason
from rotator.runner.aio import handled_signals, is_set_within

T = TypeVar("T")

# Sent by Ctrl-C, by a service manager, and when a terminal closes.
_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SAME_REQUEST_SECONDS: Final = 0.5


class StopSignal:
    """The requests to stop that a run has received; belongs to one event loop.

    Attributes:
        drain: Set by the first request: no more ranges begin.
        by: The user who cancelled the rotation; empty for any other reason.
        aborted: Whether a second signal asked to cancel the ranges in flight.
        work: The task that the second signal cancels.
    """

    def __init__(self, notify: Observer) -> None:
        self.drain = asyncio.Event()
        self.reason: StopReason | None = None
        self.by = ""
        self.signal: signal.Signals | None = None
        self.aborted = False
        self.work: asyncio.Task[object] | None = None
        self._notify = notify
        self._signalled_at = 0.0

    def request(self, reason: StopReason, by: str = "") -> None:
        """Begin to drain, unless a drain has begun."""
        if not self.drain.is_set():
            self.reason, self.by = reason, by
            self.drain.set()
            self._notify(DrainStarted(reason=reason, by=by))
        elif reason is StopReason.CANCEL and self.reason is StopReason.WORKER_SHUTDOWN:
            # Otherwise another worker would resume the rotation.
            self.reason, self.by = reason, by

    def request_by_signal(self, received: signal.Signals) -> None:
        """Begin to drain on the first signal, and cancel the work on the second.

        One hang-up or shutdown can arrive as two signals: from the terminal and the shell, or from a service
        manager and its helper. Only a second Ctrl-C is always a second request.
        """
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled_at = received, now
            self.request(StopReason(received.name))
        elif received is signal.SIGINT or now - self._signalled_at >= SAME_REQUEST_SECONDS:
            self.aborted = True
            if self.work is not None:
                self.work.cancel()

    async def wait(self, seconds: float) -> bool:
        """Wait for a request at most so long, and return whether there was one."""
        return await is_set_within(self.drain, seconds)

    async def run_until_stop(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return the result of some work, or cancel it and return None on a request to stop."""
        working = asyncio.create_task(work, name="rotator work until a stop")
        stop = asyncio.create_task(self.drain.wait(), name="rotator wait for a stop")
        try:
            await asyncio.wait([working, stop], return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            stop.cancel()
            await asyncio.gather(working, stop, return_exceptions=True)

    def signals(self) -> AbstractContextManager[None]:
        """Handle the signals that request a stop, where this is the main thread."""
        return handled_signals(
            {
                number: partial(self.request_by_signal, number)
                for number in _SIGNALS
                # nohup ignores SIGHUP on purpose.
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
            }
        )
