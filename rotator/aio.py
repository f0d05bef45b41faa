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
    """Raise the first error of a task group's exception group in its place.

    The errors after it are those of a run that was falling apart already.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


async def watch(is_due: Callable[[], bool], act: Callable[[], None]) -> None:
    """Wait until a condition holds that nobody tells of, then act."""
    while not is_due():  # noqa: ASYNC110 - whoever it depends on knows no event loop
        await asyncio.sleep(WATCH_SECONDS)
    act()


async def run_in_daemon_thread(call: Callable[[], T]) -> T:
    """Call in a thread of its own, which may hang for good once nobody waits for it any more.

    The threads of the loop's own pool are waited for when the loop is closed.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[], None]) -> None:
        # Whoever waited may have left, and the loop with it.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if future.done() else settle())

    def work() -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for whoever waits
            failure = error
            tell(lambda: future.set_exception(failure))
        else:
            tell(lambda: future.set_result(result))

    threading.Thread(target=work, name="rotator call", daemon=True).start()
    return await future
