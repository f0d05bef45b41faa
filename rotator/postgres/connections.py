"""Connections of our own, beside Django's."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from rotator.errors import ServerLostError
from rotator.postgres.failures import answered
from rotator.postgres.sessions import OwnConnection
from rotator.tasks import in_abandonable_thread

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
            parameters = await in_abandonable_thread(self.read_parameters)
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
    async with answered():
        connection = await OwnConnection.connect(**await server.read_arguments())
    async with connection:
        async with answered(connection):
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
    async with answered():
        try:
            await pool.open(wait=True, timeout=seconds)
        except PoolTimeout:
            raise ServerLostError(
                f"The server does not give {size} more connections; are too many in use?"
            ) from None
    async with pool:
        yield pool
