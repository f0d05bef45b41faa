"""Rebuilds the indexes after a rotation."""

import time
from typing import Final

from psycopg import AsyncConnection

from rotator.events import IndexRebuilt, ReindexSkipped, ReindexStarted
from rotator.exceptions import RotatorError
from rotator.postgres import maintenance
from rotator.postgres.connection import OwnConnection, connected
from rotator.postgres.maintenance import BUSY, STOPPED, IndexBuilder
from rotator.postgres.table import TargetTable
from rotator.runner.context import RunContext

# The delays before the rebuild of an index is retried that another session's lock has interrupted.
DELAYS_SECONDS: Final = (1.0, 4.0, 16.0)
# Rebuilding an index that has grown less is not worth advising.
MIN_GROWTH: Final = 1.1
MIN_GROWTH_BYTES: Final = 4 * 1024 * 1024


class Reindexing:
    """Rebuilds the indexes of the target's table; an obstacle is reported and never raises an error.

    The catalogs tell which indexes were rebuilt since the rotation began, so an interrupted run is resumed
    with the others.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context

    async def run(self, table: TargetTable, rotation: int) -> None:
        """Rebuild the indexes one at a time, until a stop is requested."""
        try:
            async with (
                connected(self._context.server) as control,
                connected(self._context.server) as connection,
            ):
                await self._rebuild_all(control, connection, table, rotation)
        except RotatorError as error:
            self._skip("", str(error))

    async def read_statements(
        self, control: AsyncConnection, table: TargetTable, rotation: int
    ) -> tuple[str, ...]:
        """Return the statements to run: without ``--reindex`` only for indexes that have grown a lot."""
        stale = await maintenance.find_stale_indexes(control, table, rotation)
        if self._context.options.reindex:
            leftovers = await maintenance.find_leftovers(control, table)
            return (
                *(maintenance.drop_statement(leftover) for leftover in leftovers),
                *(maintenance.rebuild_statement(index.name) for index in stale),
            )
        storage = self._context.stats.storage_before
        before = {index.name: index.size_bytes for index in storage.indexes} if storage else {}
        return tuple(
            maintenance.rebuild_statement(index.name)
            for index in stale
            if _has_grown(before.get(index.name, index.size_bytes), index.size_bytes)
        )

    async def _rebuild_all(
        self, control: AsyncConnection, connection: OwnConnection, table: TargetTable, rotation: int
    ) -> None:
        drain = self._context.stop_signal.drain
        builder = IndexBuilder(connection=connection, control=control, is_stopped=drain.is_set)
        if drain.is_set():
            self._skip("", STOPPED)
            return
        if not connection.is_direct:
            self._skip("", "REINDEX needs a direct connection to the server, without a pooler")
            return
        await self._drop_leftovers(builder, table)
        stale = await maintenance.find_stale_indexes(control, table, rotation)
        if stale:
            self._context.notify(ReindexStarted(indexes=len(stale)))
        for index in stale:
            if drain.is_set():
                return
            started = time.monotonic()
            reason = await self._rebuild(builder, table, index.name)
            if reason:
                self._skip(index.name, reason)
                continue
            self._context.notify(
                IndexRebuilt(
                    name=index.name,
                    seconds=time.monotonic() - started,
                    bytes_before=index.size_bytes,
                    bytes_now=await maintenance.read_size(control, index.name),
                )
            )

    async def _rebuild(self, builder: IndexBuilder, table: TargetTable, name: str) -> str:
        """Rebuild an index; return the reason where it was not rebuilt, else an empty text."""
        for delay_seconds in (0.0, *DELAYS_SECONDS):
            if await self._context.stop_signal.wait(delay_seconds):
                return STOPPED
            reason = await builder.rebuild(name)
            if reason:
                await self._drop_leftovers(builder, table)
            if reason != BUSY:
                return reason
        return BUSY

    async def _drop_leftovers(self, builder: IndexBuilder, table: TargetTable) -> None:
        for leftover in await maintenance.find_leftovers(builder.control, table):
            if reason := await builder.drop(leftover):
                self._skip(leftover, f"this invalid index could not be dropped, {reason}")

    def _skip(self, name: str, reason: str) -> None:
        self._context.notify(ReindexSkipped(name=name, reason=reason))


def _has_grown(bytes_before: int, bytes_now: int) -> bool:
    return bytes_now - bytes_before >= MIN_GROWTH_BYTES and bytes_now > MIN_GROWTH * bytes_before
