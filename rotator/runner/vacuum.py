"""Runs VACUUM during and after the rotation, so that space is reused, and ANALYZE after it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.events import Analyzed, AnalyzeSkipped, Vacuumed, VacuumSkipped, VacuumStarted
from rotator.exceptions import RotatorError
from rotator.postgres.connection import connected
from rotator.postgres.maintenance import BUSY, STOPPED, analyze, is_scattered, may_vacuum, vacuum
from rotator.postgres.table import TargetTable
from rotator.runner.context import RunContext

# VACUUM reads every page that changed, and what the last one skipped is read again.
PART_OF_TABLE: Final = 8
# Ranges of random keys change each page many times, and the server prunes old rows when it needs room there.
PART_OF_SCATTERED_TABLE: Final = 2
MIN_ROWS: Final = 20_000
POLL_SECONDS: Final = 0.1
# The delays before the final VACUUM or ANALYZE is retried on a busy table; autovacuum may be working on it.
FINAL_DELAYS_SECONDS: Final = (0.5, 1.5, 4.0)


class Vacuuming:
    """Vacuums the target's table from time to time; an obstacle is reported and never raises an error."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._is_allowed = False
        self._vacuums = False
        self._part_of_table = PART_OF_TABLE
        self._reported = ""

    async def prepare(self, control: AsyncConnection, table: TargetTable) -> None:
        """Read whether this role may vacuum the table, and report it if not."""
        self._is_allowed = await may_vacuum(control, table)
        self._vacuums = self._is_allowed and self._context.options.vacuum
        if self._context.options.vacuum:
            if await is_scattered(control, table):
                self._part_of_table = PART_OF_SCATTERED_TABLE
            if not self._is_allowed:
                self._report("this role does not own the table, so only autovacuum cleans it")

    async def run_during_rotation(
        self, control: AsyncConnection, table: TargetTable, *, rows_total: int
    ) -> None:
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
                if reason := await self._vacuum(control, table, indexes=False):
                    self._report(reason, is_once=reason == BUSY)

    async def run_final(self, table: TargetTable) -> None:
        """Vacuum once more and analyze, unless or until a stop is requested."""
        stop_signal = self._context.stop_signal
        if self._vacuums and not stop_signal.drain.is_set():
            self._context.notify(VacuumStarted())
            vacuuming = self._while_busy(lambda control: self._vacuum(control, table, indexes=True))
            if reason := await stop_signal.run_until_stop(vacuuming):
                self._report(reason)
        if reason := await self._analyze_final(table):
            statement = f"ANALYZE {sql.Identifier(*table.path).as_string()};"
            self._context.notify(AnalyzeSkipped(reason=reason, statement=statement))

    async def _analyze_final(self, table: TargetTable) -> str:
        """Replace the statistics, which hold old values; return the reason where they were not replaced."""
        if not self._is_allowed:
            return "this role does not own the table"
        if self._context.stop_signal.drain.is_set():
            return STOPPED
        started = time.monotonic()
        analyzing = self._while_busy(lambda control: self._analyze(control, table))
        reason = await self._context.stop_signal.run_until_stop(analyzing)
        if reason == "":
            self._context.notify(Analyzed(seconds=time.monotonic() - started))
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

    async def _analyze(self, control: AsyncConnection, table: TargetTable) -> str:
        async with connected(self._context.server) as connection:
            return await analyze(connection, control, table)

    async def _vacuum(self, control: AsyncConnection, table: TargetTable, *, indexes: bool) -> str:
        """Vacuum the table; return the reason where that was skipped or cancelled."""
        started = time.monotonic()
        try:
            async with connected(self._context.server) as connection:
                is_slow = self._context.pacing.is_limited
                reason = await vacuum(connection, control, table, indexes=indexes, is_slow=is_slow)
        except RotatorError as error:
            return str(error)
        if not reason:
            self._context.notify(Vacuumed(seconds=time.monotonic() - started))
        return reason

    def _report(self, reason: str, *, is_once: bool = False) -> None:
        if is_once:
            self._context.notify(VacuumSkipped(reason=reason, is_once=True))
        elif reason != self._reported:
            self._reported = reason
            self._context.notify(VacuumSkipped(reason=reason))
