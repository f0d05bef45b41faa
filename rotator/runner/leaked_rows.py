"""Rotates the rows whose values are in a list of leaked values, or counts them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from psycopg import AsyncConnection

from rotator.events import EndStatus, LeakedValuesFound, StopReason
from rotator.exceptions import RotatorError
from rotator.postgres import leaked, rotations
from rotator.postgres.connection import Server, connected
from rotator.postgres.leaked import LeakedValues
from rotator.postgres.rotations import RotationState
from rotator.postgres.writer import OlderRow, RangeUpdate, write_placed
from rotator.runner.context import RunContext, RunTarget
from rotator.runner.late_rows import LateRows, wait_for_older_writers
from rotator.runner.preflight import read_target

# The lines, or ranges of lines, that are named.
MOST_LINES: Final = 10_000
ATTEMPTS: Final = 5


@dataclass(slots=True)
class LeakedRows:
    """The rows with leaked values of one generation of a rotation.

    No other task uses the connection, which is in autocommit mode.
    """

    connection: AsyncConnection
    context: RunContext
    values: LeakedValues

    async def find(self, owned: RotationState) -> RotationState:
        """Send the list, search the table, and return the state with the number of rows.

        A stop during the search leaves the state as it is.
        """
        await leaked.load(self.connection, self.values)
        found = await self._search()
        if found is None:
            return owned
        rows_total = owned.rows_done + found
        await rotations.freeze_bound(
            self.connection, owned.lease, bound=None, rows_total=rows_total, is_exact=True
        )
        return replace(owned, rows_total=rows_total, rows_total_is_exact=True)

    async def _search(self) -> int | None:
        """Search the table, and return the number of rows found; None where a stop cancelled it."""
        return await self.context.stop_signal.run_until_stop(
            leaked.search(self.connection, self.context.table, self.values)
        )

    async def rotate(self, owned: RotationState) -> EndStatus:
        """Rotate the rows that were found, and search again until no row has a leaked value.

        Raises:
            RotatorError: Rows are left that the rotation cannot change.
        """
        context = self.context
        drain, notify = context.stop_signal.drain, context.notify
        update = RangeUpdate(context.table, context.target.source, context.options.limits)
        update.has_stored = owned.rows_done > 0
        write = partial(write_placed, self.connection, update, owned.lease, context.on_commit)
        late_rows = LateRows(write, context.gate, drain, notify)
        attempts = 0
        while not drain.is_set():
            notify(found_event(self.values))
            rotated = await late_rows.rotate_all(self._batches())
            if drain.is_set():
                break
            if context.stats.rejected_keys:
                return "failed"
            # A transaction that is still open can commit an old value.
            await wait_for_older_writers(self.connection, owned.started_xid, context)
            found = await self._search()
            if found is None or drain.is_set():
                break
            if not found:
                return "completed"
            attempts = 0 if rotated else attempts + 1
            if attempts >= ATTEMPTS:
                raise RotatorError(
                    f"{found:,} rows of {context.target.label} still have a leaked value after {attempts} "
                    "attempts. Look for a trigger or a session that writes it back, then run the same "
                    "command again."
                )
        return "interrupted"

    async def _batches(self) -> AsyncIterator[list[OlderRow]]:
        """Yield the rows that were found, until the limit of this run."""
        options, stats = self.context.options, self.context.stats
        async for rows in leaked.found_rows(self.connection, self.context.gate.max_rows):
            limit = options.stop_after_rows
            left = len(rows) if limit is None else limit - stats.rows_this_run
            if left > 0:
                yield rows[:left]
            # The next search leaves out rows that were read before, so it would not find the rest.
            if left < len(rows):
                self.context.stop_signal.request(StopReason.STOP_AFTER)
                return


def found_event(values: LeakedValues) -> LeakedValuesFound:
    """Return the account of the values that were found up to now, by line."""
    return LeakedValuesFound(
        values=len(values),
        found=values.found,
        found_lines=tuple(values.lines(found=True, most=MOST_LINES)),
        other_lines=tuple(values.lines(found=False, most=MOST_LINES)),
    )


async def count_leaked(server: Server, target: RunTarget, values: LeakedValues) -> LeakedValuesFound:
    """Return the account of the leaked values that rows have now; change nothing.

    Raises:
        RotatorError: The server cannot be reached, or the table cannot be rotated.
    """
    async with connected(server) as connection:
        table = await read_target(connection, target)
        await leaked.load(connection, values)
        await leaked.search(connection, table, values)
        # A row can move from a part that was not read yet to one that was.
        await leaked.search(connection, table, values)
    return found_event(values)
