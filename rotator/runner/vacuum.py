"""Runs VACUUM during and after the rotation, so that space is reused."""

import asyncio
import time
from typing import Final

from psycopg import AsyncConnection

from rotator.events import Vacuumed, VacuumSkipped, VacuumStarted
from rotator.exceptions import RotatorError
from rotator.postgres.connection import connected
from rotator.postgres.table import TargetTable
from rotator.postgres.vacuum import BUSY, is_scattered, may_vacuum, vacuum
from rotator.runner.context import RunContext

# A vacuum looks at every page that changed, and what the last one missed is looked at again.
PART_OF_TABLE: Final = 8
# Where ranges have rows on pages all over the table, and so meet each page again and again, the server itself
# removes old rows from a page when it needs room there.
PART_OF_SCATTERED_TABLE: Final = 2
MIN_ROWS: Final = 20_000
POLL_SECONDS: Final = 0.1


class Vacuuming:
    """Vacuums the target's table now and then; whatever keeps it from that is told, and never an error."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._is_allowed = False
        self._part_of_table = PART_OF_TABLE
        self._told = ""

    async def allow(self, control: AsyncConnection, table: TargetTable) -> None:
        """Find out whether there may be any, and tell if not.

        Args:
            control: In autocommit mode.
            table: The target's table.
        """
        if self._context.options.vacuum:
            self._is_allowed = await may_vacuum(control, table)
            if await is_scattered(control, table):
                self._part_of_table = PART_OF_SCATTERED_TABLE
            if not self._is_allowed:
                self._tell("this role does not own the table, and only autovacuum will clean it")

    async def beside(self, control: AsyncConnection, table: TargetTable, *, rows_total: int) -> None:
        """Vacuum after each part of the table's rows, until cancelled.

        Args:
            control: In autocommit mode; may be shared.
            table: The target's table.
            rows_total: How many rows the rotation has.
        """
        if not self._is_allowed:
            return
        figures = self._context.figures
        part_rows = max(MIN_ROWS, -(-rows_total // self._part_of_table))
        due_rows = figures.rows_done + part_rows
        while True:
            await asyncio.sleep(POLL_SECONDS)
            # With less than half a part to go, the one at the end is soon enough.
            if due_rows <= figures.rows_done < rows_total - part_rows // 2:
                due_rows = figures.rows_done + part_rows
                await self._vacuum(control, table, indexes=False)

    async def at_the_end(self, table: TargetTable) -> None:
        """Vacuum what the last part has left, unless or until a stop is asked for."""
        stop_signal = self._context.stop_signal
        if not self._is_allowed or stop_signal.drain.is_set():
            return
        self._context.notify(VacuumStarted())
        await stop_signal.run_until_stop(self._alone(table))

    async def _alone(self, table: TargetTable) -> None:
        try:
            async with connected(self._context.server) as control:
                await self._vacuum(control, table, indexes=True)
        except RotatorError as error:
            self._tell(str(error))

    async def _vacuum(self, control: AsyncConnection, table: TargetTable, *, indexes: bool) -> None:
        started = time.monotonic()
        try:
            async with connected(self._context.server) as connection:
                reason = await vacuum(connection, control, table, indexes=indexes)
        except RotatorError as error:
            self._tell(str(error))
            return
        if reason == BUSY:
            self._context.notify(VacuumSkipped(reason=reason, is_once=True))
        elif reason:
            self._tell(reason)
        else:
            self._context.notify(Vacuumed(seconds=time.monotonic() - started))

    def _tell(self, reason: str) -> None:
        if reason != self._told:
            self._told = reason
            self._context.notify(VacuumSkipped(reason=reason))
