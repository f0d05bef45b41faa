"""Django's own connections, which generators, receivers and row reads use, and the thread that uses them."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.db import Error, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.errors import QueryCanceled
from psycopg.pq import TransactionStatus

from rotator.exceptions import OptionError, RotatorError, ServerLostError, TargetError
from rotator.postgres.column_samples import BEGIN_READING, LOCK_SECONDS, STATEMENT_SECONDS
from rotator.postgres.errors import connection_lost

T = TypeVar("T")


def is_in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Return whether the program has a transaction open on this connection, without a query."""
    if connection.connection is None:
        return False
    # A plain BEGIN, which Django does not see, begins one too. A broken connection has another status.
    status = getattr(getattr(connection.connection, "info", None), "transaction_status", None)
    is_begun = status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)
    return connection.in_atomic_block or not connection.autocommit or is_begun


def check_postgresql(connection: BaseDatabaseWrapper) -> None:
    """Refuse a database of another kind."""
    if connection.vendor != "postgresql":
        raise TargetError(
            f"The database '{connection.alias}' is {connection.display_name}; only PostgreSQL is supported."
        )


def close_idle() -> None:
    """Close the connections of this thread that have no transaction open."""
    for connection in _initialized():
        if not is_in_transaction(connection):
            connection.close()


@contextmanager
def borrowed() -> Iterator[None]:
    """Leave this thread's connections as they were, except those that an outage has broken."""
    aliases = _open_aliases()
    try:
        yield
    finally:
        _restore(aliases)


@asynccontextmanager
async def borrowed_in_loop() -> AsyncIterator[None]:
    """Do the same for the thread of the project's synchronous code: generators and receivers."""
    aliases = await sync_to_async(_open_aliases)()
    try:
        yield
    finally:
        await sync_to_async(_restore)(aliases)


def _open_aliases() -> frozenset[str]:
    return frozenset(connection.alias for connection in _initialized() if connection.connection is not None)


def _restore(aliases: frozenset[str]) -> None:
    for connection in _initialized():
        if connection.connection is None or is_in_transaction(connection):
            continue
        if connection.alias not in aliases or not connection.is_usable():
            connection.close()


@contextmanager
def unlogged(database: str) -> Iterator[None]:
    """Keep queries out of ``connection.queries``, which would keep their values while ``DEBUG`` is on."""
    connection = connections[database]
    with ExitStack() as stack:
        if "make_debug_cursor" not in vars(connection):
            vars(connection)["make_debug_cursor"] = connection.make_cursor
            stack.callback(vars(connection).pop, "make_debug_cursor", None)
        yield


@contextmanager
def reading_rows(database: str) -> Iterator[None]:
    """Open a read-only transaction on Django's own connection, for the project's code too."""
    with unlogged(database), transaction.atomic(using=database):
        with connections[database].cursor() as cursor:
            limits = [f"{seconds * 1000:.0f}ms" for seconds in (STATEMENT_SECONDS, LOCK_SECONDS)]
            cursor.execute(BEGIN_READING, limits)
        yield


@contextmanager
def naming_timeouts(database: str) -> Iterator[None]:
    """Raise ServerLostError where the server cancels a statement of Django's own connection."""
    try:
        yield
    except Error as error:
        if not isinstance(error.__cause__, QueryCanceled):
            raise
        reason = error.__cause__.diag.message_primary
        raise ServerLostError(
            f"The server canceled a statement of Django's own session on the database '{database}': "
            f"{reason}. Raise the statement_timeout of the role, the database or the connection."
        ) from error


@contextmanager
def reading_times(database: str) -> Iterator[None]:
    """Raise RotatorError where the session returns times in a style that the driver cannot read."""
    try:
        yield
    except NotImplementedError:
        info = connections[database].connection.info
        dates, intervals = (info.parameter_status(name) or "" for name in ("DateStyle", "IntervalStyle"))
        if dates.startswith("ISO") and intervals == "postgres":
            # An error of the project's code.
            raise
        # Not chained, because the message contains a value.
        raise RotatorError(
            f"Django cannot read the times of the database '{database}', whose sessions have DateStyle = "
            f"{dates} and IntervalStyle = {intervals}. Set DateStyle = ISO and IntervalStyle = postgres for "
            "the role, the database or the connection."
        ) from None


def check_no_running_loop() -> None:
    """Refuse to block a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise OptionError(
        "An event loop is running in this thread, as in an async view or a Jupyter notebook, and would be "
        "blocked. Use `await rotate()` of rotator.api instead."
    )


def check_not_patched() -> None:
    """Refuse a process whose sockets and threads gevent or eventlet has replaced."""
    for patcher, module, check in (
        ("gevent", "gevent.monkey", "is_module_patched"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched"),
    ):
        if module in sys.modules and getattr(sys.modules[module], check)("socket"):
            raise OptionError(
                # The error of a Celery worker is shown by the command.
                f"{patcher} has monkey-patched the process {os.getpid()} on {socket.gethostname()}, and "
                "asyncio does not work there. Use a manage.py that does not patch, and Celery workers with "
                "--pool prefork."
            )


def run_in_new_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function in a new event loop.

    The project's synchronous code runs in one new thread, because the thread that asgiref would take waits
    for this loop. That thread uses the connections of the calling thread, which waits.
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
    # The same as ThreadSensitiveContext(executor=...), which asgiref has since 3.13. Only this run uses this
    # copy of the context.
    own = ThreadSensitiveContext()
    SyncToAsync.thread_sensitive_context.set(own)
    SyncToAsync.context_to_thread_executor[own] = executor
    with suppress(AttributeError):
        del AsyncToSync.executors.current
    try:
        return await main()
    finally:
        # The calling thread does not have the connections that this thread has opened.
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
        # psycopg does not work with the default loop of Windows.
        return asyncio.SelectorEventLoop
    try:
        import uvloop  # noqa: PLC0415 - not available everywhere
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


@contextmanager
def lost_is_an_outage() -> Iterator[None]:
    """Raise ServerLostError if one of Django's connections of this thread is lost, and close it."""
    try:
        yield
    except Error as error:
        if lost := lost_connection(error):
            raise lost from None
        raise


def lost_connection(error: BaseException) -> ServerLostError | None:
    """Return the outage that an error means; None for any other error.

    Must be called in the thread that had the error, because it closes this thread's lost connections.
    """
    if not isinstance(error, Error):
        return None
    cause = error.__cause__ or error
    if isinstance(cause, psycopg.Error):
        lost = connection_lost(cause)
    else:
        lost = ServerLostError("Django's own connection to the database was lost.")
        if all(each.connection is None or each.is_usable() for each in _initialized()):
            return None
    if lost is not None:
        for each in _initialized():
            each.close_if_unusable_or_obsolete()
    return lost
