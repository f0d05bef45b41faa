"""Enters the old values into the ledger before the first row is rotated, and adds the guard."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.events import GuardAdded, LedgerProgressed, LedgerReady, LedgerStarted
from rotator.exceptions import OptionError, RangeTooSlowError, RotatorError, RowsLockedError, unwrap_group
from rotator.postgres import rotations
from rotator.postgres.errors import translate_errors
from rotator.postgres.fence import Lease
from rotator.postgres.guard import add_guard, remove_guard
from rotator.postgres.ledger import (
    Ledger,
    create_ledger,
    find_ledger,
    finish_ledger,
    forget_ledger,
    index_ledger,
    load_range,
)
from rotator.postgres.planner import IndexPlanner
from rotator.postgres.rotations import RotationState
from rotator.postgres.survivors import control_ledger
from rotator.ranges import Key, KeyInterval, KeyRange
from rotator.runner import retry
from rotator.runner.context import RunContext
from rotator.runner.late_rows import wait_for_older_writers

LOAD_ROWS: Final = 20_000
GUARD_ATTEMPTS: Final = 100


@dataclass(frozen=True, slots=True)
class Proof:
    """Prepares the ledger and the guard of a rotation; a killed run is resumed where it stopped.

    No other task uses the connection, and the pool, that of the workers, is idle.
    """

    connection: AsyncConnection
    pool: AsyncConnectionPool
    context: RunContext

    async def prepare(self, owned: RotationState) -> Ledger | None:
        """Complete the ledger and add the guard, unless a stop is requested; None without a ledger.

        Raises:
            OptionError: The rotation has begun without a ledger.
            RotatorError: The control of the ledger failed, or the guard could not be added.
        """
        options, drain = self.context.options, self.context.stop_signal.drain
        rotation = owned.lease.rotation
        ledger = await find_ledger(self.connection, rotation)
        if ledger is None:
            if not options.prove:
                return None
            if await rotations.has_rows_done(self.connection, rotation):
                raise OptionError(
                    f"Rotation {rotation} has rotated rows without a ledger, so their old values are "
                    "unknown. Resume it without --prove, or begin again with --restart."
                )
        if ledger is None or not ledger.is_ready:
            ledger = await self._complete(owned, ledger)
        if ledger is not None and options.guard not in ("", ledger.guard) and not drain.is_set():
            await self._add_guard(ledger, options.guard)
        return ledger

    async def _complete(self, owned: RotationState, ledger: Ledger | None) -> Ledger | None:
        """Load the rest of the ledger, index it and test it; return None where a stop was requested."""
        context, lease = self.context, owned.lease
        started = time.monotonic()
        # Otherwise a row that is committed late could be rotated before its value enters the ledger.
        if not await wait_for_older_writers(self.connection, owned.started_xid, context):
            return None
        context.notify(LedgerStarted())
        if ledger is None:
            ledger = await create_ledger(self.connection, lease)
        bound, rows = owned.bound, 0
        if bound is not None:
            await self._load(owned.lease, ledger, bound)
        if context.stop_signal.drain.is_set():
            return None
        indexing = until_unlocked(partial(index_ledger, self.connection, lease, ledger), "index the ledger")
        await context.stop_signal.run_until_stop(indexing)
        if context.stop_signal.drain.is_set():
            return None
        if bound is not None:
            rows, found = await control_ledger(
                self.connection,
                context.table,
                ledger,
                started_xid=owned.started_xid,
                bound=bound,
                rows=owned.rows_total,
            )
            if found < rows:
                raise RotatorError(
                    f"The control of the ledger failed: {found:,} of {rows:,} rows were found in it, and all "
                    "of them must be. No row was rotated. Begin again with --restart."
                )
        ledger = await finish_ledger(self.connection, ledger, rows)
        context.notify(LedgerReady(seconds=time.monotonic() - started, control_rows=rows))
        return ledger

    async def _load(self, lease: Lease, ledger: Ledger, bound: Key) -> None:
        """Load the ranges up to the bound, several at a time; commit them in the order of their keys.

        The next ranges are planned in the meantime.
        """
        planner = IndexPlanner(self.connection, self.context.table)
        rest, drain = KeyInterval(after=ledger.through, through=bound), self.context.stop_signal.drain
        rows, attempts, planned = LOAD_ROWS, 0, list[KeyRange]()
        while rest.after != bound and not drain.is_set():
            try:
                async with self.context.gate.passage(drain) as may_begin:
                    if not may_begin:
                        return
                    planned = planned or await self._plan(planner, rest, rows)
                    following = replace(rest, after=planned[-1].through)
                    with unwrap_group():
                        async with asyncio.TaskGroup() as tasks:
                            planning = tasks.create_task(self._plan(planner, following, rows))
                            tasks.create_task(self._load_ranges(lease, ledger, planned))
                planned, attempts = planning.result(), 0
            except RowsLockedError:
                planned, attempts = [], attempts + 1
                await self.context.stop_signal.wait(retry.backoff_seconds(attempts))
            except RangeTooSlowError:
                if rows == 1:
                    raise
                planned, rows = [], rows // 2
            # Where one range failed, those before it are committed.
            found = await find_ledger(self.connection, lease.rotation)
            rest = replace(rest, after=None if found is None else found.through)

    async def _plan(self, planner: IndexPlanner, rest: KeyInterval, rows: int) -> list[KeyRange]:
        planned = list[KeyRange]()
        while len(planned) < self.pool.max_size and rest.after != rest.through:
            planned.append(await planner.next_range(rest, rows))
            rest = replace(rest, after=planned[-1].through)
        return planned

    async def _load_ranges(self, lease: Lease, ledger: Ledger, planned: Sequence[KeyRange]) -> None:
        committed = [asyncio.Event() for _ in planned]

        async def load(at: int) -> None:
            before = committed[at - 1] if at else None
            async with translate_errors(seconds=None), self.pool.connection() as connection:
                await load_range(connection, lease, self.context.table, ledger, planned[at], before)
            committed[at].set()
            self.context.notify(LedgerProgressed(rows=planned[at].rows))

        with unwrap_group():
            async with asyncio.TaskGroup() as tasks:
                for at in range(len(planned)):
                    tasks.create_task(load(at), name=f"rotator ledger {at + 1}")

    async def _add_guard(self, ledger: Ledger, action: str) -> None:
        table = self.context.table
        adding = until_unlocked(
            partial(add_guard, self.connection, ledger, table, action), f"add the guard to {table.found_name}"
        )
        await self.context.stop_signal.run_until_stop(adding)
        if not self.context.stop_signal.drain.is_set():
            self.context.notify(GuardAdded(action=action))


async def drop_ledger(connection: AsyncConnection, rotation: int, *, only_guard: bool) -> bool:
    """Remove the guard of a rotation, and its ledger unless ``only_guard``; return whether there was one.

    Raises:
        RotatorError: Other sessions held locks on the table at each attempt.
    """
    ledger = await find_ledger(connection, rotation)
    if ledger is None or (only_guard and not ledger.guard):
        return False
    if ledger.guard:
        await until_unlocked(partial(remove_guard, connection, ledger), "remove the guard")
    if not only_guard:
        await until_unlocked(partial(forget_ledger, connection, ledger), "drop the ledger")
    return True


async def until_unlocked(change: Callable[[], Awaitable[None]], what: str) -> None:
    """Retry a change of the table that other sessions' locks prevent; it waits for them for a short time.

    A caller may cancel it: the transaction of the change is rolled back then, or it was committed already.

    Raises:
        RotatorError: The table was locked at each attempt to do ``what``.
    """
    for attempt in range(1, GUARD_ATTEMPTS + 1):
        try:
            return await change()
        except RowsLockedError:
            await asyncio.sleep(retry.backoff_seconds(attempt))
    raise RotatorError(
        f"Cannot {what}: in {GUARD_ATTEMPTS} attempts, other sessions held locks on the table. "
        "End the long ones, then run the same command again."
    )
