"""Connections to the server: how they are opened, their settings, and poolers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction, IsolationLevel, sql
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from rotator.aio import run_in_daemon_thread
from rotator.exceptions import ServerLostError
from rotator.postgres import values
from rotator.postgres.errors import read_only, translate_errors

APPLICATION_NAME: Final = "rotator"
CONNECT_SECONDS: Final = 10
OPEN_SECONDS: Final = 20.0

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
    """How the server is reached.

    Attributes:
        parameters: What libpq needs, as keyword arguments.
        role: The role to assume; None for the one that logs in.
        time_zone: That of its sessions, for conditions that have none; None for the server's own.
        search_path: The schemas that Django's own connection looks in; None for the role's own.
        read_parameters: Returns the parameters as they are now, for each connection again: a password or a
            token may have been replaced. None where they never change.
    """

    parameters: Mapping[str, Any]
    role: str | None = None
    time_zone: str | None = None
    search_path: str | None = None
    read_parameters: Callable[[], Mapping[str, Any]] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a connection."""
        return {
            **_KEEPALIVE,
            "application_name": APPLICATION_NAME,
            **self.parameters,
            "autocommit": True,
            # A range takes milliseconds and its parsing microseconds; poolers need not know what is prepared.
            "prepare_threshold": None,
        }

    async def read_arguments(self) -> dict[str, Any]:
        """Read the parameters again, and return the keyword arguments of a connection.

        Raises:
            ServerLostError: They cannot be read.
        """
        if self.read_parameters is None:
            return self.arguments()
        try:
            # It may ask another server for a password or a token.
            parameters = await run_in_daemon_thread(self.read_parameters)
        except Exception as error:  # noqa: BLE001 - whatever the project's code raises
            raise ServerLostError(
                f"Django's connection parameters cannot be read: {type(error).__name__}."
            ) from None
        return replace(self, parameters=parameters).arguments()

    async def configure(self, connection: AsyncConnection) -> None:
        """Make a new connection one of the rotator's.

        Raises:
            ServerLostError: The server is read-only.
        """
        try:
            await self._configure(connection)
        except BaseException:
            # The pool forgets it without closing it.
            await connection.close()
            raise

    async def _configure(self, connection: AsyncConnection) -> None:
        wanted = {"role": self.role, "search_path": self.search_path}
        # The driver reads times in this style alone.
        if not (connection.info.parameter_status("DateStyle") or "ISO").startswith("ISO"):
            wanted["DateStyle"] = "ISO"
        if isinstance(connection, OwnConnection):
            await connection.configure({name: value for name, value in wanted.items() if value is not None})
        # A setting that transaction poolers keep for each client.
        if self.time_zone and connection.info.parameter_status("TimeZone") != self.time_zone:
            await connection.execute("SELECT set_config('TimeZone', %s, false)", (self.time_zone,))


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[AsyncConnection]:
    """Open one connection in autocommit mode.

    Raises:
        ServerLostError: The server cannot be reached.
    """
    async with translate_errors():
        connection = await OwnConnection.connect(**await server.read_arguments())
    async with connection:
        async with translate_errors(connection):
            await server.configure(connection)
        yield connection


@asynccontextmanager
async def pooled(
    server: Server, size: int, *, seconds: float = OPEN_SECONDS
) -> AsyncIterator[AsyncConnectionPool]:
    """Open a pool of connections in autocommit mode, all of them at once.

    Args:
        server: Where.
        size: How many.
        seconds: How long to try.

    Raises:
        ServerLostError: The server does not give that many.
    """
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        connection_class=OwnConnection,
        kwargs=server.read_arguments,
        min_size=size,
        max_size=size,
        # Each is opened by one of them.
        num_workers=size,
        open=False,
        configure=server.configure,
        name="rotator workers",
    )
    async with translate_errors():
        try:
            await pool.open(wait=True, timeout=seconds)
        except PoolTimeout:
            raise ServerLostError(
                f"The server does not give {size} more connections; are too many in use?"
            ) from None
    async with pool:
        yield pool


# The limits of a role or a database are for the application's statements. Each transaction of the rotator
# has limits of its own.
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
    # The driver's literals.
    "standard_conforming_strings": "on",
    # The plans that decision 1 and the search for older rows depend on.
    "enable_seqscan": "on",
    "enable_indexscan": "on",
    "enable_indexonlyscan": "on",
    "enable_tidscan": "on",
    "enable_bitmapscan": "on",
    "enable_nestloop": "on",
    "enable_mergejoin": "on",
    "enable_hashjoin": "on",
    "enable_hashagg": "on",
    "enable_sort": "on",
    "enable_partition_pruning": "on",
}
_READ_ONLY: Final = "default_transaction_read_only"
# What a role has by default is for its other sessions. What a database, a server or a connection is set to
# is a decision about this session, too.
_ROLE_DEFAULTS: Final = ("user", "database user")

_CONFIGURE: Final = (
    "WITH session AS (SELECT pg_backend_pid() = %(pid)s AS is_direct, CASE"
    " WHEN NOT current_setting('default_transaction_read_only')::boolean THEN false"
    " ELSE (SELECT s.source <> ALL (%(role_defaults)s::text[]) FROM pg_settings s"
    " WHERE s.name = 'default_transaction_read_only') END AS is_read_only),"
    # A setting that this version of the server does not have is NULL.
    " deviating AS (SELECT w.name, w.setting FROM unnest(%(names)s::text[], %(settings)s::text[])"
    " AS w (name, setting), session WHERE current_setting(w.name, true) <> w.setting"
    " AND NOT (w.name = 'default_transaction_read_only' AND session.is_read_only)),"
    " changed AS (SELECT d.name, CASE WHEN session.is_direct THEN set_config(d.name, d.setting, false) END"
    " FROM deviating d, session)"
    " SELECT session.is_direct, session.is_read_only OR pg_is_in_recovery(),"
    " (SELECT array_agg(c.name) FROM (SELECT * FROM changed OFFSET 0) AS c) FROM session"
)
_SET_LOCAL: Final = (
    "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)"
)


class OwnConnection(AsyncConnection):
    """A connection of the rotator.

    Behind a pooler that gives each transaction another session of the server, settings of the session would
    reach other clients. There, every transaction begins with the settings that it needs, and every single
    statement is a transaction.

    Attributes:
        local_settings: The settings that each transaction begins with; empty where the session has them.
        one_statement: Held by the task that executes a single statement; only where each is a transaction.
    """

    local_settings: Mapping[str, str] = {}
    one_statement: asyncio.Lock

    async def configure(self, wanted: Mapping[str, str]) -> None:
        """Set what deviates from what is needed.

        Args:
            wanted: Other settings of the session than those that every session needs.

        Raises:
            ServerLostError: The server is read-only.
        """
        values.register(self)
        await self.set_isolation_level(IsolationLevel.READ_COMMITTED)
        settings = _SETTINGS | dict(wanted)
        cursor = await self.execute(
            _CONFIGURE,
            {
                "pid": self.info.backend_pid,
                "role_defaults": list(_ROLE_DEFAULTS),
                "names": list(settings),
                "settings": list(settings.values()),
            },
        )
        is_direct, is_read_only, names = await cursor.fetchone() or (True, False, None)
        if is_read_only:
            raise read_only()
        if is_direct or not names:
            return
        self.local_settings = {name: settings[name] for name in names if name != _READ_ONLY}
        if _READ_ONLY in names:
            await self.set_read_only(False)
        self.one_statement = asyncio.Lock()
        self.cursor_factory = _LocalCursor

    @property
    def is_local(self) -> bool:
        """Whether each transaction begins with settings of its own."""
        return self.cursor_factory is _LocalCursor

    @asynccontextmanager
    async def transaction(
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,  # noqa: FBT001, FBT002 - the driver's signature
    ) -> AsyncIterator[AsyncTransaction]:
        """Do what the driver does, with the settings of this connection."""
        begins = self.pgconn.transaction_status == TransactionStatus.IDLE
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            if begins:
                await self.set_local()
            yield transaction

    async def set_local(self) -> None:
        """Change the settings of the transaction that has just begun."""
        if self.local_settings:
            settings = self.local_settings
            await AsyncCursor(self).execute(_SET_LOCAL, (list(settings), list(settings.values())))


class _LocalCursor(AsyncCursor):
    """Makes each single statement a transaction that begins with the connection's settings."""

    async def execute(self, *arguments: Any, **options: Any) -> "_LocalCursor":  # noqa: ANN401 - handed on
        """Execute a statement."""
        connection = self.connection
        # A pipeline has a transaction of its own. What it has queued does not show in the status.
        if not isinstance(connection, OwnConnection) or _is_in_pipeline(connection):
            return await super().execute(*arguments, **options)
        # The heartbeat's connection is shared.
        async with connection.one_statement:
            if connection.pgconn.transaction_status != TransactionStatus.IDLE:
                return await super().execute(*arguments, **options)
            async with connection.transaction():
                return await super().execute(*arguments, **options)


def _is_in_pipeline(connection: AsyncConnection) -> bool:
    return connection.pgconn.pipeline_status != PipelineStatus.OFF


async def begin(connection: AsyncConnection) -> None:
    """Begin a transaction that the caller ends by a statement."""
    local = connection if isinstance(connection, OwnConnection) and connection.is_local else None
    access = " READ WRITE" if local is not None and local.read_only is False else ""
    await execute_alone(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED{access}".encode())
    if local is not None:
        await local.set_local()


async def execute_alone(connection: AsyncConnection, statement: bytes | sql.Composed) -> AsyncCursor:
    """Execute a statement that cannot be part of a transaction, or begins one."""
    return await AsyncCursor(connection).execute(statement)
