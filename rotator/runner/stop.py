"""Requests to stop: the first drains, the second cancels the work in flight."""

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from rotator.events import DrainStarted, Observer, StopReason

T = TypeVar("T")

# What a terminal's Ctrl-C, a service manager and a dropped connection send.
_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SAME_REQUEST_SECONDS: Final = 0.5


class StopSignal:
    """What has been asked of a run so far; belongs to one event loop."""

    def __init__(self, notify: Observer) -> None:
        self.drain = asyncio.Event()
        self.reason: StopReason | None = None
        self.signal: signal.Signals | None = None
        self.aborted = False
        self._work: asyncio.Task[object] | None = None
        self._notify = notify
        self._signalled_at = 0.0

    def request(self, reason: StopReason) -> None:
        """Begin to drain, unless that was asked for already."""
        if not self.drain.is_set():
            self.reason = reason
            self.drain.set()
            self._notify(DrainStarted(reason=reason))

    def request_by_signal(self, received: signal.Signals) -> None:
        """Begin to drain; the second time, cancel the work.

        One hang-up or shutdown can arrive as two signals: from the terminal and the shell, from a service
        manager and its helper. Only Ctrl-C twice is meant as twice at once.
        """
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled_at = received, now
            self.request(StopReason(received.name))
            return
        if received is not signal.SIGINT and now - self._signalled_at < SAME_REQUEST_SECONDS:
            return
        self.aborted = True
        if self._work is not None:
            self._work.cancel()

    async def wait(self, seconds: float) -> bool:
        """Wait for a stop, and return whether one was asked for within this time."""
        try:
            async with asyncio.timeout(seconds):
                await self.drain.wait()
        except TimeoutError:
            return False
        return True

    async def run_until_stop(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Await some work and return its result; cancel it and return None once a stop is asked for."""
        working = asyncio.create_task(work, name="rotator work until a stop")
        stop = asyncio.create_task(self.drain.wait(), name="rotator wait for a stop")
        try:
            await asyncio.wait([working, stop], return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            stop.cancel()
            await asyncio.gather(working, stop, return_exceptions=True)

    @contextmanager
    def aborting(self, work: "asyncio.Task[object]") -> Iterator[None]:
        """Cancel this task when the second signal comes."""
        self._work = work
        if self.aborted:
            work.cancel()
        try:
            yield
        finally:
            self._work = None

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Listen to the signals that ask for a stop, where this is the main thread."""
        loop = asyncio.get_running_loop()
        before = {}
        # Outside the main thread nothing can listen, and the run goes on without.
        with suppress(ValueError, RuntimeError, NotImplementedError):
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # Under nohup a hang-up is ignored on purpose.
                if number.name == "SIGHUP" and previous is signal.SIG_IGN:
                    continue
                loop.add_signal_handler(number, self.request_by_signal, number)
                before[number] = previous
        try:
            yield
        finally:
            # The loop's own handlers would point at a closed loop, and a Ctrl-C during the summary be lost.
            for number, previous in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, previous)
