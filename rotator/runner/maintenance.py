"""Runs VACUUM during and after the rotation, so that space is reused, and ANALYZE and REINDEX after it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from psycopg import AsyncConnection, sql

from rotator import events
from rotator.exceptions import RotatorError
from rotator.postgres import maintenance
from rotator.postgres.connection import OwnConnection, connected
from rotator.postgres.maintenance import BUSY, STOPPED, IndexBuilder, analyze, vacuum
from rotator.runner.context import RunContext

# VACUUM reads every page that changed, and what the last one skipped is read again.
PART_OF_TABLE: Final = 8
# Ranges of random keys change each page many times, and the server prunes old rows when it needs room there.
PART_OF_SCATTERED_TABLE: Final = 2
MIN_ROWS: Final = 20_000
POLL_SECONDS: Final = 0.1
# The delays before the final VACUUM or ANALYZE is retried on a busy table; autovacuum may be working on it.
FINAL_DELAYS_SECONDS: Final = (0.5, 1.5, 4.0)
# The delays before the rebuild of an index is retried that another session's lock has interrupted.
INDEX_DELAYS_SECONDS: Final = (1.0, 4.0, 16.0)
# Rebuilding an index that has grown less is not worth advising.
MIN_GROWTH: Final = 1.1
MIN_GROWTH_BYTES: Final = 4 * 1024 * 1024


class Maintenance:
    """Vacuums and analyzes the target's table, and rebuilds its indexes.

    An obstacle is reported and never raises an error. Only VACUUM and ANALYZE need ``prepare()`` before.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._is_allowed = False
        self._vacuums = False
        self._part_of_table = PART_OF_TABLE
        self._reported = ""

    async def prepare(self, control: AsyncConnection) -> None:
        """Read whether this role may vacuum the table, and report it if not."""
        table, wants_vacuum = self._context.table, self._context.options.vacuum
        self._is_allowed = await maintenance.may_vacuum(control, table)
        self._vacuums = self._is_allowed and wants_vacuum
        if wants_vacuum:
            if await maintenance.is_scattered(control, table):
                self._part_of_table = PART_OF_SCATTERED_TABLE
            if not self._is_allowed:
                self._report("this role does not own the table, so only autovacuum cleans it")

    async def vacuum_during_rotation(self, control: AsyncConnection, *, rows_total: int) -> None:
        """Vacuum after each part of the table's rows, until cancelled; the connection may be shared."""
        if not self._vacuums:
            return
        stats = self._context.stats
        part_rows = max(MIN_ROWS, -(-rows_total // self._part_of_table))
        due_rows = stats.rows_done + part_rows
        while not await self._context.stop_signal.wait(POLL_SECONDS):
            # With less than half a part to go, the final VACUUM is soon enough.
            if due_rows <= stats.rows_done < rows_total - part_rows // 2:
                due_rows = stats.rows_done + part_rows
                if reason := await self._vacuum(control, indexes=False):
                    self._report(reason, is_once=reason == BUSY)

    async def vacuum_and_analyze(self) -> None:
        """Vacuum once more and analyze, unless or until a stop is requested."""
        stop_signal = self._context.stop_signal
        if self._vacuums and not stop_signal.drain.is_set():
            self._context.notify(events.VacuumStarted())
            vacuuming = self._while_busy(lambda control: self._vacuum(control, indexes=True))
            if reason := await stop_signal.run_until_stop(vacuuming):
                self._report(reason)
        if reason := await self._analyze_unless_stopped():
            statement = f"ANALYZE {sql.Identifier(*self._context.table.path).as_string()};"
            self._context.notify(events.AnalyzeSkipped(reason=reason, statement=statement))

    async def _analyze_unless_stopped(self) -> str:
        """Replace the statistics, which hold old values; return the reason where they were not replaced."""
        if not self._is_allowed:
            return "this role does not own the table"
        if self._context.stop_signal.drain.is_set():
            return STOPPED
        started = time.monotonic()
        reason = await self._context.stop_signal.run_until_stop(self._while_busy(self._analyze))
        if reason == "":
            self._context.notify(events.Analyzed(seconds=time.monotonic() - started))
        return STOPPED if reason is None else reason

    async def _while_busy(self, work: Callable[[AsyncConnection], Awaitable[str]]) -> str:
        """Retry while the table is busy; return the reason where the work was not done."""
        try:
            async with connected(self._context.server) as control:
                for delay_seconds in (0.0, *FINAL_DELAYS_SECONDS):
                    await asyncio.sleep(delay_seconds)
                    if (reason := await work(control)) != BUSY:
                        return reason
        except RotatorError as error:
            return str(error)
        return BUSY

    async def _analyze(self, control: AsyncConnection) -> str:
        async with connected(self._context.server) as connection:
            return await analyze(connection, control, self._context.table)

    async def _vacuum(self, control: AsyncConnection, *, indexes: bool) -> str:
        """Vacuum the table; return the reason where that was skipped or cancelled."""
        started = time.monotonic()
        try:
            async with connected(self._context.server) as connection:
                is_slow = self._context.pacing.is_limited
                reason = await vacuum(
                    connection, control, self._context.table, indexes=indexes, is_slow=is_slow
                )
        except RotatorError as error:
            return str(error)
        if not reason:
            self._context.notify(events.Vacuumed(seconds=time.monotonic() - started))
        return reason

    def _report(self, reason: str, *, is_once: bool = False) -> None:
        if is_once:
            self._context.notify(events.VacuumSkipped(reason=reason, is_once=True))
        elif reason != self._reported:
            self._reported = reason
            self._context.notify(events.VacuumSkipped(reason=reason))

    async def reindex(self, rotation: int) -> None:
        """Rebuild the indexes one at a time, until a stop is requested.

        The catalogs tell which indexes were rebuilt since the rotation began, so an interrupted run is
        resumed with the others.
        """
        server = self._context.server
        try:
            async with connected(server) as control, connected(server) as connection:
                await self._rebuild_all(control, connection, rotation)
        except RotatorError as error:
            self._skip_index("", str(error))

    async def read_reindex_statements(self, control: AsyncConnection, rotation: int) -> tuple[str, ...]:
        """Return the statements to run: without ``--reindex`` only for indexes that have grown a lot."""
        stale = await maintenance.find_stale_indexes(control, self._context.table, rotation)
        if self._context.options.reindex:
            leftovers = await maintenance.find_leftovers(control, self._context.table)
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

    async def _rebuild_all(self, control: AsyncConnection, connection: OwnConnection, rotation: int) -> None:
        drain = self._context.stop_signal.drain
        builder = IndexBuilder(connection=connection, control=control, is_stopped=drain.is_set)
        if drain.is_set():
            self._skip_index("", STOPPED)
            return
        if not connection.is_direct:
            self._skip_index("", "REINDEX needs a direct connection to the server, without a pooler")
            return
        await self._drop_leftovers(builder)
        stale = await maintenance.find_stale_indexes(control, self._context.table, rotation)
        if stale:
            self._context.notify(events.ReindexStarted(indexes=len(stale)))
        for index in stale:
            if drain.is_set():
                return
            started = time.monotonic()
            if reason := await self._rebuild(builder, index.name):
                self._skip_index(index.name, reason)
                continue
            self._context.notify(
                events.IndexRebuilt(
                    name=index.name,
                    seconds=time.monotonic() - started,
                    bytes_before=index.size_bytes,
                    bytes_now=await maintenance.read_size(control, index.name),
                )
            )

    async def _rebuild(self, builder: IndexBuilder, name: str) -> str:
        """Rebuild an index; return the reason where it was not rebuilt, else an empty text."""
        for delay_seconds in (0.0, *INDEX_DELAYS_SECONDS):
            if await self._context.stop_signal.wait(delay_seconds):
                return STOPPED
            reason = await builder.rebuild(name)
            if reason:
                await self._drop_leftovers(builder)
            if reason != BUSY:
                return reason
        return BUSY

    async def _drop_leftovers(self, builder: IndexBuilder) -> None:
        for leftover in await maintenance.find_leftovers(builder.control, self._context.table):
            if reason := await builder.drop(leftover):
                self._skip_index(leftover, f"this invalid index could not be dropped, {reason}")

    def _skip_index(self, name: str, reason: str) -> None:
        self._context.notify(events.ReindexSkipped(name=name, reason=reason))


def _has_grown(bytes_before: int, bytes_now: int) -> bool:
    return bytes_now - bytes_before >= MIN_GROWTH_BYTES and bytes_now > MIN_GROWTH * bytes_before
