"""Helpers for asyncio: the first error of a task group, polling, and daemon threads."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

T = TypeVar("T")

WATCH_SECONDS: Final = 0.25


@contextmanager
def unwrap_group() -> Iterator[None]:
    """Raise the first error of a task group instead of its exception group; the others follow from it."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


async def watch(is_due: Callable[[], bool], act: Callable[[], None]) -> None:
    """Poll until a condition is true, then act."""
    while not is_due():  # noqa: ASYNC110 - code outside the event loop changes it
        await asyncio.sleep(WATCH_SECONDS)
    act()


async def run_in_daemon_thread(call: Callable[[], T]) -> T:
    """Call in a new daemon thread, which may never return.

    When an event loop is closed, it waits for the threads of its own pool, but not for this one.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(act: Callable[[], None]) -> None:
        # The loop may be closed by now.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if future.done() else act())

    def work() -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - the caller gets any error
            failure = error
            settle(lambda: future.set_exception(failure))
        else:
            settle(lambda: future.set_result(result))

    threading.Thread(target=work, name="rotator call", daemon=True).start()
    return await future
