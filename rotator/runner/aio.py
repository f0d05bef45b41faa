"""Helpers for asyncio: waiting, signals, polling, and daemon threads."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, TypeVar

from rotator.exceptions import unwrap_group

T = TypeVar("T")

WATCH_SECONDS: Final = 0.25
CLOSE_SECONDS: Final = 1.0


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event at most so long, and return whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


@contextmanager
def handled_signals(
    handlers: Mapping[signal.Signals, Callable[[], object]], *, default: signal.Handlers = signal.SIG_DFL
) -> Iterator[None]:
    """Handle signals in the running loop, where this is the main thread of a Unix system.

    Afterwards, ``default`` handles those that had the default handler before.
    """
    loop = asyncio.get_running_loop()
    before = {}
    # Outside the main thread no handler can be set; the run works without.
    with suppress(ValueError, RuntimeError, NotImplementedError):
        for number, handle in handlers.items():
            previous = signal.getsignal(number)
            loop.add_signal_handler(number, handle)
            before[number] = previous
    try:
        yield
    finally:
        # The loop's own handlers would point to a closed loop, and lose a Ctrl-C during the summary.
        for number, previous in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, default if previous is signal.SIG_DFL else previous)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run some work next to the block, which cancels it at its end; an error of the work ends the block."""
    with unwrap_group():
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work, name=name)
            try:
                yield
            finally:
                task.cancel()


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run some work next to the block, which cancels it at its end, and only then raises its error.

    An error of the block comes first. A server that does not answer delays the end for ``CLOSE_SECONDS``.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=CLOSE_SECONDS)
    if task.done() and not task.cancelled():
        task.result()


async def act_when(is_due: Callable[[], bool], act: Callable[[], None]) -> None:
    """Poll until a condition is true, then act."""
    while not is_due():  # noqa: ASYNC110 - code outside the event loop changes it
        await asyncio.sleep(WATCH_SECONDS)
    act()


async def run_in_daemon_thread(call: Callable[[], T]) -> T:
    """Call in a new daemon thread, which may never return.

    When an event loop is closed, it waits for the threads of its own pool, but not for this one.
    """
    future = Future[T]()
    # From now on, only the thread ends it: a caller that is cancelled does not.
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - the caller gets any error
            future.set_exception(error)

    threading.Thread(target=work, name="rotator call", daemon=True).start()
    return await asyncio.wrap_future(future)
