"""Connections of our own, beside Django's."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, IsolationLevel, sql
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from rotator.errors import ServerLostError
from rotator.postgres import arrays
from rotator.postgres.failures import answered

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
    """

    parameters: Mapping[str, Any]
    role: str | None = None
    time_zone: str | None = None
    search_path: str | None = None

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

    async def configure(self, connection: AsyncConnection) -> None:
        """Make a new connection one of the rotator's."""
        # A snapshot for each statement, whatever the role's default is: the fence depends on it.
        await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
        arrays.register(connection)
        if self.role is not None:
            await connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(self.role)))
        # Settings that transaction poolers keep for each client. The driver reads times in this style alone.
        if not (connection.info.parameter_status("DateStyle") or "ISO").startswith("ISO"):
            await connection.execute("SELECT set_config('DateStyle', 'ISO', false)")
        if self.time_zone and connection.info.parameter_status("TimeZone") != self.time_zone:
            await connection.execute("SELECT set_config('TimeZone', %s, false)", (self.time_zone,))
        if self.search_path is not None:
            # A project may set it on each of Django's connections, as those with a schema for each tenant do.
            await connection.execute(
                "SELECT set_config('search_path', %(path)s, false)"
                " WHERE current_setting('search_path') <> %(path)s",
                {"path": self.search_path},
            )


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[AsyncConnection]:
    """Open one connection in autocommit mode.

    Raises:
        ServerLostError: The server cannot be reached.
    """
    async with answered():
        connection = await AsyncConnection.connect(**server.arguments())
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
    pool = AsyncConnectionPool(
        kwargs=server.arguments(),
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
