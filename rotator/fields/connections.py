"""Django's own connections of this thread, which generators, receivers and row reads use."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext
from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from rotator.exceptions import OptionError, ServerLostError
from rotator.postgres.errors import connection_lost

T = TypeVar("T")


def is_in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Whether the program has a transaction open on this connection; asks the driver, not the server."""
    if connection.connection is None:
        return False
    # Also one that was begun by a plain BEGIN. The status of a broken connection is another one.
    status = getattr(getattr(connection.connection, "info", None), "transaction_status", None)
    is_begun = status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)
    return connection.in_atomic_block or not connection.autocommit or is_begun


def close_idle() -> None:
    """Close the connections of this thread that have no transaction open."""
    for connection in _initialized():
        if not is_in_transaction(connection):
            connection.close()


def open_aliases() -> frozenset[str]:
    """Return the aliases of the connections that this thread has open."""
    return frozenset(connection.alias for connection in _initialized() if connection.connection is not None)


def restore(aliases: frozenset[str]) -> None:
    """Leave open what was open, and close what was not, or what an outage has broken.

    Args:
        aliases: What :func:`open_aliases` returned before.
    """
    for connection in _initialized():
        if connection.connection is None or is_in_transaction(connection):
            continue
        if connection.alias not in aliases or not connection.is_usable():
            connection.close()


@contextmanager
def borrowed() -> Iterator[None]:
    """Leave this thread's connections as they were."""
    aliases = open_aliases()
    try:
        yield
    finally:
        restore(aliases)


@contextmanager
def unlogged(database: str) -> Iterator[None]:
    """Keep queries out of ``connection.queries``, which holds each of them while ``DEBUG`` is on."""
    connection = connections[database]
    with ExitStack() as stack:
        if "make_debug_cursor" not in vars(connection):
            vars(connection)["make_debug_cursor"] = connection.make_cursor
            stack.callback(vars(connection).pop, "make_debug_cursor", None)
        yield


def check_no_running_loop() -> None:
    """Refuse to block a running event loop.

    Raises:
        OptionError: One is running in this thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise OptionError(
        "An event loop is running in this thread, as in an async view or a Jupyter notebook, and would be "
        "blocked: use `await rotate()` of rotator.api instead."
    )


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function in an event loop of its own.

    Synchronous code of the project that it calls runs in one thread of its own: the thread that asgiref would
    take waits for this loop. That thread uses the connections of this one, which waits meanwhile.

    Raises:
        OptionError: An event loop is running in this thread.
    """
    check_no_running_loop()
    shared = _initialized()
    for connection in shared:
        connection.inc_thread_sharing()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_with_own_thread(main, shared))
    finally:
        for connection in shared:
            connection.dec_thread_sharing()


async def _with_own_thread(
    main: Callable[[], Coroutine[Any, Any, T]], shared: list[BaseDatabaseWrapper]
) -> T:
    def share() -> None:
        for connection in shared:
            connections[connection.alias] = connection

    executor = ThreadPoolExecutor(1, thread_name_prefix="rotator project", initializer=share)
    # What ThreadSensitiveContext(executor=...) does, which asgiref has from 3.13 on. The context is a copy
    # that only this run uses.
    own = ThreadSensitiveContext()
    SyncToAsync.thread_sensitive_context.set(own)
    SyncToAsync.context_to_thread_executor[own] = executor
    with suppress(AttributeError):
        del AsyncToSync.executors.current
    try:
        return await main()
    finally:
        # Those that this thread has opened, and the calling one does not have.
        await asyncio.get_running_loop().run_in_executor(executor, _close_others, shared)
        executor.shutdown(wait=False)


def _close_others(shared: list[BaseDatabaseWrapper]) -> None:
    for connection in _initialized():
        if connection not in shared:
            connection.close()


def _initialized() -> list[BaseDatabaseWrapper]:
    return list(connections.all(initialized_only=True))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if sys.platform == "win32":
        # The driver cannot work with Windows' default loop.
        return asyncio.SelectorEventLoop
    try:
        import uvloop  # noqa: PLC0415 - it cannot be built everywhere
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


@contextmanager
def lost_is_an_outage() -> Iterator[None]:
    """Turn the loss of one of Django's connections into an outage, and close what is dead.

    Raises:
        ServerLostError: A connection of this thread is gone.
    """
    try:
        yield
    except Error as error:
        if lost := lost_connection(error):
            raise lost from None
        raise


def lost_connection(error: BaseException) -> ServerLostError | None:
    """Return what a lost connection of Django's means; None for any other error.

    To be called in the thread that had the error. It closes this thread's dead connections.
    """
    if not isinstance(error, Error):
        return None
    cause = error.__cause__ or error
    if isinstance(cause, psycopg.Error):
        lost = connection_lost(cause)
    else:
        lost = ServerLostError("Django's own connection to the database was lost.")
        if all(each.connection is None or each.is_usable() for each in _opened()):
            return None
    if lost is not None:
        for each in _opened():
            each.close_if_unusable_or_obsolete()
    return lost


def _opened() -> Sequence[BaseDatabaseWrapper]:
    return connections.all(initialized_only=True)
