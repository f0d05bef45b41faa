"""The work of one generation: freeze the bound, rotate the gaps, confirm, complete."""

from dataclasses import replace
from functools import partial
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.events import ConfirmationStarted, EndStatus, RotationStarted, RowsConfirmed, StopReason
from rotator.exceptions import RotatorError
from rotator.postgres import rotations
from rotator.postgres.identity import changed_target
from rotator.postgres.last_writers import LastWriters, count_unless_changed
from rotator.postgres.older_rows import find_older_rows
from rotator.postgres.planner import IndexPlanner, count_rows, gaps, last_key
from rotator.postgres.rotations import Figures, RotationState
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import RangeUpdate, write_placed, write_range
from rotator.runner.acquire import Acquired
from rotator.runner.context import RunContext
from rotator.runner.distribution import Distribution
from rotator.runner.engine import Engine, EngineOptions
from rotator.runner.late_rows import LateRows, wait_for_older_writers
from rotator.runner.leaked_rows import LeakedRows
from rotator.runner.preflight import measured_update
from rotator.runner.proof import Proof
from rotator.stats import Stats

OLDER_WRITERS_SECONDS: Final = 5.0
COUNT_SECONDS: Final = 2.0
CONFIRMATIONS: Final = 5


def figures_of(stats: Stats) -> Figures:
    """Return the figures of all runs of a rotation."""
    before = stats.started
    return Figures(
        active_seconds=stats.active_seconds,
        deferrals=stats.deferrals + (before.deferrals_before if before else 0),
        retries=stats.retries + (before.retries_before if before else 0),
        throttled_seconds=stats.held_seconds + (before.throttled_seconds_before if before else 0.0),
    )


class Session:
    """The work of one generation, until it is completed, drained, or loses a connection."""

    def __init__(
        self,
        connection: AsyncConnection,
        pool: AsyncConnectionPool,
        table: TargetTable,
        acquired: Acquired,
        context: RunContext,
    ) -> None:
        """Take a connection that no other task uses, and those of the workers."""
        self._connection = connection
        self._pool = pool
        self._table = table
        self._acquired = acquired
        self._context = context
        self._limits = context.options.limits
        self._proof = Proof(connection, pool, table, context)
        leaked = context.target.leaked
        self._leaked_rows = None if leaked is None else LeakedRows(connection, table, context, leaked)

    async def read_state(self) -> RotationState:
        """Read the rotation's state; freeze its bound if there are rows and it is not frozen."""
        owned = await rotations.read_state(self._connection, self._acquired.lease)
        if self._leaked_rows is not None:
            return await self._leaked_rows.find(owned)
        return owned if owned.bound is not None else await self._freeze(owned)

    def start_event(self, owned: RotationState) -> RotationStarted:
        """Return the event that starts a run."""
        return RotationStarted(
            rotation=owned.lease.rotation,
            target=self._context.target.label,
            rows_total=owned.rows_total,
            rows_total_is_exact=owned.rows_total_is_exact,
            rows_done=owned.rows_done,
            late_rows=owned.late_rows,
            seconds_before=owned.before.active_seconds,
            deferrals_before=owned.before.deferrals,
            retries_before=owned.before.retries,
            throttled_seconds_before=owned.before.throttled_seconds,
            stopped_at=self._acquired.stopped_at,
            concurrency=self._context.options.concurrency,
            batch=self._context.options.batch,
            pace=self._context.pacing.pace,
        )

    async def work(self, owned: RotationState) -> EndStatus:
        """Rotate the rows; return ``completed`` if none is left."""
        if self._leaked_rows is not None:
            return await self._leaked_rows.rotate(owned)
        return await self._rotate_all(owned)

    async def _rotate_all(self, owned: RotationState) -> EndStatus:
        """Rotate the gaps and confirm every row; return ``completed`` if both succeeded."""
        options, stop_signal = self._context.options, self._context.stop_signal
        await self._proof.prepare(owned)
        if stop_signal.drain.is_set():
            return "interrupted"
        await self._rotate_gaps(owned)
        if stop_signal.drain.is_set():
            return "interrupted"
        if self._context.stats.rejected_keys:
            return "failed"
        # Planned rows that were deleted count towards the limit.
        if options.stop_after_rows is not None and await gaps(
            self._connection, self._table, owned.lease.rotation, owned.bound
        ):
            stop_signal.request(StopReason.STOP_AFTER)
            return "interrupted"
        is_confirmed = await self._confirm(owned)
        if stop_signal.drain.is_set():
            return "interrupted"
        return "completed" if is_confirmed else "failed"

    async def complete(self, owned: RotationState) -> bool:
        """Mark the rotation completed, and return whether the checkpoints left no gap."""
        stats = self._context.stats
        rows_done = await rotations.complete(
            self._connection,
            self._table,
            owned.lease,
            owned.bound,
            figures=figures_of(stats),
            unconfirmed_rows=stats.unconfirmed_rows,
        )
        if rows_done is None:
            return False
        stats.rows_done = rows_done
        return True

    async def _freeze(self, owned: RotationState) -> RotationState:
        # A row that is committed late and then updated by the application has a new xmin and a leaked value.
        # Only a range finds it, so the bound must include it.
        await wait_for_older_writers(
            self._connection, self._table, owned.started_xid, self._context, seconds=OLDER_WRITERS_SECONDS
        )
        bound = await last_key(self._connection, self._table)
        if bound is None:
            return owned
        rows_total, is_exact = await count_rows(self._connection, self._table, bound, seconds=COUNT_SECONDS)
        await rotations.freeze_bound(
            self._connection, owned.lease, bound=bound, rows_total=rows_total, is_exact=is_exact
        )
        return replace(owned, bound=bound, rows_total=rows_total, rows_total_is_exact=is_exact)

    async def _rotate_gaps(self, owned: RotationState) -> None:
        options = self._context.options
        limit = options.stop_after_rows
        max_rows = None if limit is None else max(0, limit - self._context.stats.rows_this_run)
        left = await gaps(self._connection, self._table, owned.lease.rotation, owned.bound)
        drain = self._context.stop_signal.drain
        planner, notify = IndexPlanner(self._connection, self._table), self._context.notify
        if self._context.ask_for_help is not None:
            distribution = Distribution(
                self._connection,
                planner,
                owned.lease,
                self._context.ask_for_help,
                batch=options.batch,
                notify=notify,
            )
            rows_left = max(0, owned.rows_total - owned.rows_done)
            await distribution.run(left, drain, rows_left=rows_left, max_rows=max_rows)
        elif owned.bound is not None:
            update = await measured_update(
                self._connection,
                self._table,
                self._context.target,
                options.limits,
                owned.bound,
                notify,
                ledger=self._proof.ledger,
            )
            self._limits = update.limits
            engine = Engine(
                planner.next_range,
                partial(write_range, self._pool, update, owned.lease, self._context.on_commit),
                self._context.gate,
                notify=notify,
                options=EngineOptions(max_rows=max_rows),
                has_rotated=owned.rows_done > 0,
            )
            await engine.run(left, drain)

    async def _confirm(self, owned: RotationState) -> bool:
        """Rotate every row that no session has written since the rotation began.

        Returns:
            Whether none is left; False also where a stop was requested or rows were rejected.

        Raises:
            TargetError: The target has changed since the rotation began.
            RotatorError: Rows are left that the rotation cannot reach.
        """
        stop_signal, notify = self._context.stop_signal, self._context.notify
        if not await wait_for_older_writers(self._connection, self._table, owned.started_xid, self._context):
            return False
        update = RangeUpdate(self._table, self._context.target.source, self._limits, self._proof.ledger)
        write = partial(write_placed, self._connection, update, owned.lease, self._context.on_commit)
        notify(ConfirmationStarted())
        attempts = 0
        while True:
            writers = await stop_signal.run_until_stop(self._count_last_writers(owned))
            if writers is None:
                return False
            if not writers.older:
                notify(RowsConfirmed(confirmed=writers.confirmed, unconfirmed=writers.others))
                return True
            found = find_older_rows(
                self._connection,
                self._table,
                rotation=owned.lease.rotation,
                started_xid=owned.started_xid,
                batch=self._context.gate.max_rows,
            )
            rotated = await LateRows(write, self._context.gate, stop_signal, notify).rotate_all(found)
            if stop_signal.drain.is_set() or self._context.stats.rejected_keys:
                return False
            attempts = 0 if rotated else attempts + 1
            if attempts >= CONFIRMATIONS:
                raise RotatorError(
                    f"{writers.older:,} rows of {self._context.target.label} have not been written since the "
                    f"rotation began, and {attempts} attempts did not reach them. Look for a trigger or a "
                    "policy that hides them, then run the same command again."
                )

    async def _count_last_writers(self, owned: RotationState) -> LastWriters:
        found = await count_unless_changed(
            self._connection,
            self._table,
            rotation=owned.lease.rotation,
            started_xid=owned.started_xid,
            identity=owned.identity,
        )
        if isinstance(found, str):
            raise changed_target(owned.lease.rotation, self._context.target.label, found)
        return found
