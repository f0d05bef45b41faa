"""Connections to the server: how they are opened, their settings, and poolers."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, LiteralString, TypeAlias, TypeVar

from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction, IsolationLevel, sql
from psycopg.abc import Params
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import BaseRowFactory, tuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from rotator.exceptions import ServerLostError
from rotator.postgres import values
from rotator.postgres.errors import ANSWER_SECONDS, read_only, translate_errors

T = TypeVar("T")
Query: TypeAlias = LiteralString | bytes | sql.SQL | sql.Composed

APPLICATION_NAME: Final = "rotator"
IS_OWN_SESSION: Final = f"application_name ~ '^{APPLICATION_NAME}( |$)'"
"""A condition in SQL: the session is of any process of the rotator, whose project may have added a name."""
CONNECT_SECONDS: Final = 10
OPEN_SECONDS: Final = 20.0
# On a direct connection, a statement is prepared when it has been sent this many times.
PREPARED_AFTER: Final = 2

# A peer that vanished is noticed within half a minute, where the system can tell at all.
_KEEPALIVE: Final = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """The server, and the settings of the connections to it.

    Attributes:
        parameters: The keyword arguments for libpq.
        role: The role to assume; None for the role that logs in.
        time_zone: The time zone of the sessions, for conditions without one; None for the server's own.
        search_path: The search path of Django's own connection; None for the role's own.
        read_parameters: A function that returns the present parameters for each connection: a password or a
            token may have been replaced. None where they never change.
    """

    parameters: Mapping[str, Any]
    role: str | None = None
    time_zone: str | None = None
    search_path: str | None = None
    read_parameters: Callable[[], Awaitable[Mapping[str, Any]]] | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The settings that select the role and the search path of a session or a transaction."""
        wanted = {"role": self.role, "search_path": self.search_path}
        return {name: value for name, value in wanted.items() if value is not None}

    async def read_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a connection, with the present parameters."""
        try:
            parameters = self.parameters if self.read_parameters is None else await self.read_parameters()
        except Exception as error:  # noqa: BLE001 - any error of the project's code
            raise ServerLostError(
                f"Cannot read Django's connection parameters: {type(error).__name__}."
            ) from None
        # Tells these sessions from those of the application, for which the project may set a name.
        name = f"{APPLICATION_NAME} {parameters.get('application_name') or ''}".rstrip()
        return {
            **_KEEPALIVE,
            **parameters,
            "application_name": name,
            "autocommit": True,
            # Some poolers do not support prepared statements.
            "prepare_threshold": None,
        }

    async def configure(self, connection: "OwnConnection") -> None:
        """Apply the rotator's settings to a new connection; refuse a server that is read-only."""
        try:
            await connection.configure(self.settings)
            # Transaction poolers keep this setting for each client.
            if self.time_zone and connection.info.parameter_status("TimeZone") != self.time_zone:
                await connection.execute("SELECT set_config('TimeZone', %s, false)", (self.time_zone,))
        except BaseException:
            # The pool does not close it.
            await connection.close()
            raise


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator["OwnConnection"]:
    """Open one connection in autocommit mode, or raise ServerLostError."""
    async with translate_errors():
        connection = await OwnConnection.connect(**await server.read_arguments())
    async with connection:
        async with translate_errors(connection):
            await server.configure(connection)
        yield connection


class _LastReturnedFirst(deque[AsyncConnection]):
    """The idle connections of a pool, which takes them from the left and returns them to the right."""

    def popleft(self) -> AsyncConnection:
        """Return the connection that was returned last."""
        return self.pop()


@asynccontextmanager
async def pooled(
    server: Server, size: int, *, seconds: float = OPEN_SECONDS
) -> AsyncIterator[AsyncConnectionPool]:
    """Open a pool of ``size`` connections in autocommit mode at once, or raise ServerLostError.

    The connection that was returned last is used first. So one worker uses one session of the server. If its
    sessions took turns, each of them would have slept when its turn came, and the scheduler of the server's
    system would prefer it to the sessions of the application.
    """
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        connection_class=OwnConnection,
        kwargs=server.read_arguments,
        min_size=size,
        max_size=size,
        # One for each connection, so that all are opened at the same time.
        num_workers=size,
        open=False,
        configure=server.configure,
        name="rotator workers",
    )
    pool._pool = _LastReturnedFirst()  # noqa: SLF001 - the pool has no option for it
    async with translate_errors():
        try:
            await pool.open(wait=True, timeout=seconds)
        except PoolTimeout:
            raise ServerLostError(
                f"Cannot open {size} more connections: the server accepts no more. Close some, or raise the "
                "limit of the server, the database or the role."
            ) from None
    async with pool:
        yield pool


# The time limits of a role or a database are meant for the application. Each transaction of the rotator sets
# its own.
_SETTINGS: Final = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    # A snapshot for each statement: the fence depends on it.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "default_transaction_read_only": "off",
    # The driver writes its literals in this syntax.
    "standard_conforming_strings": "on",
    # The plans that decision 1 and the search for older rows depend on.
    **{
        f"enable_{method}": "on"
        for method in (
            *("seqscan", "indexscan", "indexonlyscan", "tidscan", "bitmapscan"),
            *("nestloop", "mergejoin", "hashjoin", "hashagg", "sort", "partition_pruning"),
        )
    },
}
_READ_ONLY: Final = "default_transaction_read_only"

_CONFIGURE: Final = (
    "WITH session AS (SELECT pg_backend_pid() = %(pid)s AS is_direct, CASE"
    " WHEN NOT current_setting('default_transaction_read_only')::boolean THEN false"
    # A default of the role is for its other sessions. A setting of the database, the server or the
    # connection also applies to this session.
    " ELSE (SELECT s.source NOT IN ('user', 'database user') FROM pg_settings s"
    " WHERE s.name = 'default_transaction_read_only') END AS is_read_only),"
    # A setting that this version of the server does not have is NULL.
    " deviating AS (SELECT w.name, w.setting FROM unnest(%(names)s::text[], %(settings)s::text[])"
    " AS w (name, setting), session WHERE current_setting(w.name, true) <> w.setting"
    " AND NOT (w.name = 'default_transaction_read_only' AND session.is_read_only)),"
    " changed AS (SELECT d.name, CASE WHEN session.is_direct THEN set_config(d.name, d.setting, false) END"
    " FROM deviating d, session)"
    " SELECT session.is_direct, session.is_read_only, pg_is_in_recovery(),"
    " (SELECT array_agg(c.name) FROM (SELECT * FROM changed OFFSET 0) AS c) FROM session"
)


class OwnConnection(AsyncConnection):
    """A connection of the rotator.

    Behind a pooler that gives each transaction another session of the server, settings of the session would
    reach other clients. There, every transaction begins with its own settings, and every single statement is
    a transaction.

    Attributes:
        is_direct: Whether no pooler is between this process and the server; False until it is configured.
        local_settings: The settings with which each transaction begins; empty where the session has them.
        one_statement: A lock for single statements; only where each of them is a transaction.
    """

    is_direct = False
    local_settings: Mapping[str, str] = {}
    one_statement: asyncio.Lock

    async def configure(self, wanted: Mapping[str, str]) -> None:
        """Change the settings that differ from those of every session, and from the wanted ones."""
        values.register(self)
        await self.set_isolation_level(IsolationLevel.READ_COMMITTED)
        settings = _SETTINGS | dict(wanted)
        # The driver reads times only in this style.
        if not (self.info.parameter_status("DateStyle") or "ISO").startswith("ISO"):
            settings["DateStyle"] = "ISO"
        parameters = {"names": list(settings), "settings": list(settings.values())}
        cursor = await self.execute(_CONFIGURE, {"pid": self.info.backend_pid, **parameters})
        ((self.is_direct, is_read_only, is_standby, names),) = await cursor.fetchall()
        if is_read_only or is_standby:
            raise read_only(is_standby=is_standby)
        if self.is_direct:
            # Prepared statements are planned with their real values, unless a transaction keeps its plans.
            await self.execute("SELECT set_config('plan_cache_mode', 'force_custom_plan', false)")
            self.prepare_threshold = PREPARED_AFTER
        if self.is_direct or not names:
            return
        self.local_settings = {name: settings[name] for name in names if name != _READ_ONLY}
        if _READ_ONLY in names:
            await self.set_read_only(False)
        self.one_statement = asyncio.Lock()
        self.cursor_factory = _LocalCursor

    @asynccontextmanager
    async def transaction(
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,  # noqa: FBT001, FBT002 - the driver's signature
    ) -> AsyncIterator[AsyncTransaction]:
        """Open a transaction or a savepoint as the driver does, with the settings of this connection."""
        begins = self.pgconn.transaction_status == TransactionStatus.IDLE
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            if begins and self.local_settings:
                await set_local(self, self.local_settings)
            yield transaction


class _LocalCursor(AsyncCursor):
    """A cursor that makes each single statement a transaction with the connection's settings."""

    async def execute(self, *arguments: Any, **options: Any) -> "_LocalCursor":  # noqa: ANN401 - handed on
        """Execute a statement."""
        connection = self.connection
        # A pipeline has its own transaction. The status does not show its queued statements.
        is_in_pipeline = connection.pgconn.pipeline_status != PipelineStatus.OFF
        if is_in_pipeline or not isinstance(connection, OwnConnection):
            return await super().execute(*arguments, **options)
        # The heartbeat's connection is shared.
        async with connection.one_statement:
            if connection.pgconn.transaction_status != TransactionStatus.IDLE:
                return await super().execute(*arguments, **options)
            async with connection.transaction():
                return await super().execute(*arguments, **options)


async def fetch_as(
    connection: AsyncConnection,
    row_factory: BaseRowFactory[T],
    query: Query,
    parameters: Params = (),
    *,
    seconds: float | None = ANSWER_SECONDS,
) -> list[T]:
    """Return the rows of a query, as a row factory of the driver makes them; see :func:`translate_errors`."""
    async with translate_errors(connection, seconds=seconds):
        cursor = connection.cursor(row_factory=row_factory)
        await cursor.execute(query, parameters)
        return await cursor.fetchall()


def first(rows: Sequence[T]) -> T | None:
    """Return the first of some rows; None where there are none."""
    return rows[0] if rows else None


async def fetch_rows(
    connection: AsyncConnection,
    query: Query,
    parameters: Params = (),
    *,
    seconds: float | None = ANSWER_SECONDS,
) -> list[tuple[Any, ...]]:
    """Return the rows of a query."""
    return await fetch_as(connection, tuple_row, query, parameters, seconds=seconds)


async def fetch_row(
    connection: AsyncConnection, query: Query, parameters: Params = ()
) -> tuple[Any, ...] | None:
    """Return the first row of a query; None where it has none."""
    return first(await fetch_rows(connection, query, parameters))


async def fetch_column(connection: AsyncConnection, query: Query, parameters: Params = ()) -> tuple[Any, ...]:
    """Return the values of a query's first column."""
    return tuple(row[0] for row in await fetch_rows(connection, query, parameters))


async def execute(connection: AsyncConnection, statement: Query, parameters: Params = ()) -> int:
    """Execute a statement that returns no rows, and return the number of rows that it has changed."""
    async with translate_errors(connection):
        return (await connection.execute(statement, parameters)).rowcount


async def begin(connection: AsyncConnection) -> None:
    """Begin a transaction that the caller ends with COMMIT or a rollback."""
    access = " READ WRITE" if connection.read_only is False else ""
    await execute_alone(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED{access}".encode())
    if isinstance(connection, OwnConnection) and connection.local_settings:
        await set_local(connection, connection.local_settings)


@asynccontextmanager
async def transaction_with(
    connection: AsyncConnection, settings: Mapping[str, str], *, seconds: float | None = ANSWER_SECONDS
) -> AsyncIterator[None]:
    """Open a transaction with these settings; for ``seconds`` see :func:`translate_errors`."""
    async with translate_errors(connection, seconds=seconds), connection.transaction():
        await set_local(connection, settings)
        yield


async def set_local(connection: AsyncConnection, settings: Mapping[str, str]) -> None:
    """Change settings until the end of the open transaction."""
    await AsyncCursor(connection).execute(
        "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)",
        (list(settings), list(settings.values())),
    )


async def execute_alone(connection: AsyncConnection, statement: bytes | sql.Composed) -> AsyncCursor:
    """Execute a statement that begins a transaction, or cannot be part of one."""
    return await AsyncCursor(connection).execute(statement)
