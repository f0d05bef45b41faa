"""The signals that throttles read: replica lag, WAL to archive, WAL that slots keep.

No function raises an error of the server: a value that cannot be read is a :class:`Reading` with a problem.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection

from rotator.exceptions import OptionError, RotatorError
from rotator.postgres.connection import Server, fetch_rows, set_local
from rotator.postgres.errors import condition, connection_lost

READ_SECONDS: Final = 2.0
# A heartbeat comes each second, and expires after three of them.
STALE_SECONDS: Final = 3.0
_HEARTBEATS_KEPT: Final = 3600

# Complete segments only: the server does not archive the present one before it is full.
_UNARCHIVED: Final = (
    "SELECT GREATEST(0, div(pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0'), s.segment) * s.segment"
    " - (('x' || substr(a.last_archived_wal, 9, 8))::bit(32)::bigint * 4294967296"
    " + (('x' || substr(a.last_archived_wal, 17, 8))::bit(32)::bigint + 1) * s.segment))::bigint"
    " FROM pg_stat_archiver a,"
    " (SELECT pg_size_bytes(current_setting('wal_segment_size')) AS segment) AS s"
    # Other files are archived too: histories of timelines.
    " WHERE a.last_archived_wal ~ '^[0-9A-F]{24}'"
)
# A slot without a position keeps no WAL.
_SLOT: Final = (
    "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint,"
    " slot_name || CASE WHEN active THEN '' ELSE ' (not active)' END"
    " FROM pg_replication_slots WHERE restart_lsn IS NOT NULL ORDER BY 1 DESC LIMIT 1"
)
_SERVER: Final = (
    "SELECT (SELECT system_identifier FROM pg_control_system())::text, pg_postmaster_start_time(),"
    " pg_is_in_recovery()"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The value of a signal at one moment.

    Attributes:
        value: The value, in the unit of its limit; 0 with a problem.
        detail: What has this value, e.g. the name of a slot; or the reason that a callable has returned.
        problem: Why the value is unknown; empty where it is known.
    """

    value: float = 0.0
    detail: str = ""
    problem: str = ""


async def reading(read: Callable[[], Awaitable[Reading]]) -> Reading:
    """Return a reading; one with a problem where the server does not answer in time or reports an error."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await read()
    except TimeoutError:
        return Reading(problem=f"no answer within {READ_SECONDS:.0f} s")
    except psycopg.Error as error:
        return Reading(problem=str(connection_lost(error) or condition(error)).rstrip("."))
    except RotatorError as error:
        return Reading(problem=str(error).rstrip("."))


async def read_unarchived_wal(connection: AsyncConnection) -> Reading:
    """Return the bytes of complete WAL segments that wait for the archiver."""
    row = await (await connection.execute(_UNARCHIVED)).fetchone()
    if row is None:
        return Reading(problem="pg_stat_archiver shows no archived segment")
    return Reading(value=row[0])


async def read_slot_wal(connection: AsyncConnection) -> Reading:
    """Return the bytes of WAL that the slot keeps that keeps most, and its name."""
    row = await (await connection.execute(_SLOT)).fetchone()
    return Reading() if row is None else Reading(value=row[0], detail=row[1])


async def check_archiving(connection: AsyncConnection) -> None:
    """Refuse a limit of the WAL to archive where the server does not archive, or has archived nothing yet."""
    ((mode,),) = await fetch_rows(connection, "SELECT current_setting('archive_mode')")
    if mode == "off":
        raise OptionError(
            "--max-unarchived-wal: the server archives no WAL (archive_mode = off). Leave the option out."
        )
    found = await reading(lambda: read_unarchived_wal(connection))
    if found.problem:
        raise OptionError(
            f"--max-unarchived-wal: the WAL to archive is unknown: {found.problem}. Leave the option out, or "
            "run SELECT pg_switch_wal() as a superuser, and repeat the command when the segment is archived."
        )


async def check_slots(connection: AsyncConnection) -> None:
    """Refuse a limit of the WAL that slots keep where it cannot be read."""
    found = await reading(lambda: read_slot_wal(connection))
    if found.problem:
        raise OptionError(f"--max-slot-wal: the WAL that slots keep is unknown: {found.problem}.")


class Replica:
    """A replica with Django's alias, whose lag is that of the owner's heartbeat."""

    def __init__(self, alias: str, server: Server, *, clock: Callable[[], float]) -> None:
        self.alias = alias
        self._server = server
        self._clock = clock
        self._began: float | None = None
        self._beats = deque[tuple[datetime, float]](maxlen=_HEARTBEATS_KEPT)
        self._connection: AsyncConnection[Any] | None = None

    def note_beat(self, beat_at: datetime) -> None:
        """Record a heartbeat that was committed just now on the primary."""
        now = self._clock()
        self._beats.append((beat_at, now))
        self._began = now if self._began is None else self._began

    async def read_lag(self, rotation: int) -> Reading:
        """Return the age of the first heartbeat that the replica has not replayed; 0 where it has all.

        No clock of another host is needed: both times of the comparison come from the primary.
        """
        found = await reading(lambda: self._read_beat(rotation))
        if found.problem:
            await self.close()
            return found
        now = self._clock()
        if self._began is None or now - self._beats[-1][1] > STALE_SECONDS:
            return Reading(problem="the heartbeat of this process is late")
        if not found.detail:
            # The row of a new rotation has not arrived yet.
            lag = now - self._began
            problem = "the row of the rotation is not there" if lag > STALE_SECONDS else ""
            return Reading(value=lag, problem=problem)
        seen = datetime.fromisoformat(found.detail)
        while len(self._beats) > 1 and self._beats[0][0] <= seen:
            self._beats.popleft()
        first_at, noted_at = self._beats[0]
        return Reading(value=0.0 if first_at <= seen else now - noted_at)

    async def check(self, primary: AsyncConnection) -> None:
        """Raise OptionError for the primary itself, a replica of another server, and what cannot be read."""
        ((system, started_at, _),) = await fetch_rows(primary, _SERVER)
        replica = list[tuple[str, datetime, bool]]()

        async def look() -> Reading:
            connection = await self._connected()
            replica.extend(await (await connection.execute(_SERVER)).fetchall())
            return await self._read_beat(0)

        found = await reading(look)
        await self.close()
        if found.problem:
            raise OptionError(
                f"--lag-of {self.alias}: the heartbeat in rotator_rotation cannot be read there: "
                f"{found.problem}."
            )
        ((other_system, other_started_at, is_in_recovery),) = replica
        if (other_system, other_started_at) == (system, started_at):
            raise OptionError(
                f"--lag-of {self.alias} is the server that the rotation writes to. Name a replica of it."
            )
        if is_in_recovery and other_system != system:
            raise OptionError(
                f"--lag-of {self.alias} is a replica of another server. Name a replica of this one."
            )

    async def close(self) -> None:
        """Close the connection to the replica; the next reading opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                await connection.close()

    async def _connected(self) -> AsyncConnection[Any]:
        if self._connection is None:
            self._connection = await AsyncConnection.connect(**await self._server.read_arguments())
        return self._connection

    async def _read_beat(self, rotation: int) -> Reading:
        """Return the rotation's last heartbeat on the replica as a detail; empty where there is none."""
        connection = await self._connected()
        settings = {"statement_timeout": f"{READ_SECONDS:.0f}s", **self._server.settings}
        async with connection.transaction():
            await set_local(connection, settings)
            cursor = await connection.execute(
                "SELECT updated_at FROM rotator_rotation WHERE id = %s", (rotation,)
            )
            row = await cursor.fetchone()
        return Reading(detail="" if row is None else row[0].isoformat())
