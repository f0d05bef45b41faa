"""The work of one generation: freeze the bound, rotate the gaps, confirm, complete."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.events import ConfirmationStarted, EndStatus, RotationStarted, RowsConfirmed, StopReason
from rotator.exceptions import RotatorError
from rotator.options import WaitLimits
from rotator.postgres import rotations
from rotator.postgres.identity import changed_target
from rotator.postgres.last_writers import count_unless_changed, find_older_rows
from rotator.postgres.ledger import Ledger
from rotator.postgres.planner import IndexPlanner, count_rows, gaps, last_key
from rotator.postgres.rotations import Figures, RotationState
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import RangeUpdate, write_placed, write_range
from rotator.runner.acquire import Acquired
from rotator.runner.context import RunContext
from rotator.runner.distribution import Distribution
from rotator.runner.engine import Engine
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


@dataclass(slots=True)
class Session:
    """The work of one generation, until it is completed, drained, or loses a connection.

    No other task uses the connection; the pool is that of the workers.
    """

    connection: AsyncConnection
    pool: AsyncConnectionPool
    table: TargetTable
    acquired: Acquired
    context: RunContext
    _leaked_rows: LeakedRows | None = None

    async def read_state(self) -> RotationState:
        """Read the rotation's state; freeze its bound if there are rows and it is not frozen."""
        owned = await rotations.read_state(self.connection, self.acquired.lease)
        if self.context.target.leaked is not None:
            self._leaked_rows = LeakedRows(
                self.connection, self.table, self.context, self.context.target.leaked
            )
            return await self._leaked_rows.find(owned)
        return owned if owned.bound is not None else await self._freeze(owned)

    def start_event(self, owned: RotationState) -> RotationStarted:
        """Return the event that starts a run."""
        return RotationStarted(
            rotation=owned.lease.rotation,
            target=self.context.target.label,
            rows_total=owned.rows_total,
            rows_total_is_exact=owned.rows_total_is_exact,
            rows_done=owned.rows_done,
            late_rows=owned.late_rows,
            seconds_before=owned.figures.active_seconds,
            deferrals_before=owned.figures.deferrals,
            retries_before=owned.figures.retries,
            throttled_seconds_before=owned.figures.throttled_seconds,
            stopped_at=self.acquired.stopped_at,
            concurrency=self.context.options.concurrency,
            batch=self.context.options.batch,
            pace=self.context.pacing.pace,
        )

    async def work(self, owned: RotationState) -> EndStatus:
        """Rotate the rows and confirm every row; return ``completed`` if both succeeded."""
        if self._leaked_rows is not None:
            return await self._leaked_rows.rotate(owned)
        options, stop_signal = self.context.options, self.context.stop_signal
        ledger = await Proof(self.connection, self.pool, self.table, self.context).prepare(owned)
        if stop_signal.drain.is_set():
            return "interrupted"
        limits = await self._rotate_gaps(owned, ledger)
        if stop_signal.drain.is_set():
            return "interrupted"
        if self.context.stats.rejected_keys:
            return "failed"
        # Planned rows that were deleted count towards the limit.
        if options.stop_after_rows is not None and await gaps(
            self.connection, self.table, owned.lease.rotation, owned.bound
        ):
            stop_signal.request(StopReason.STOP_AFTER)
        is_confirmed = not stop_signal.drain.is_set() and await self._confirm(owned, limits, ledger)
        if stop_signal.drain.is_set():
            return "interrupted"
        return "completed" if is_confirmed else "failed"

    async def complete(self, owned: RotationState) -> bool:
        """Mark the rotation completed, and return whether the checkpoints left no gap."""
        stats = self.context.stats
        rows_done = await rotations.complete(
            self.connection,
            self.table,
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
            self.connection, self.table, owned.started_xid, self.context, seconds=OLDER_WRITERS_SECONDS
        )
        bound = await last_key(self.connection, self.table)
        if bound is None:
            return owned
        rows_total, is_exact = await count_rows(self.connection, self.table, bound, seconds=COUNT_SECONDS)
        await rotations.freeze_bound(
            self.connection, owned.lease, bound=bound, rows_total=rows_total, is_exact=is_exact
        )
        return replace(owned, bound=bound, rows_total=rows_total, rows_total_is_exact=is_exact)

    async def _rotate_gaps(self, owned: RotationState, ledger: Ledger | None) -> WaitLimits:
        """Rotate the gaps, and return the limits of a statement, which planning may have raised."""
        options = self.context.options
        limit = options.stop_after_rows
        max_rows = None if limit is None else max(0, limit - self.context.stats.rows_this_run)
        left = await gaps(self.connection, self.table, owned.lease.rotation, owned.bound)
        drain = self.context.stop_signal.drain
        planner, notify = IndexPlanner(self.connection, self.table), self.context.notify
        if self.context.ask_for_help is not None:
            distribution = Distribution(
                self.connection,
                planner,
                owned.lease,
                self.context.ask_for_help,
                batch=options.batch,
                notify=notify,
            )
            rows_left = max(0, owned.rows_total - owned.rows_done)
            await distribution.run(left, drain, rows_left=rows_left, max_rows=max_rows)
        elif owned.bound is not None:
            update = await measured_update(
                self.connection,
                self.table,
                self.context.target,
                options.limits,
                owned.bound,
                notify,
                ledger=ledger,
            )
            engine = Engine(
                planner.next_range,
                partial(write_range, self.pool, update, owned.lease, self.context.on_commit),
                self.context.gate,
                notify=notify,
                max_rows=max_rows,
                has_rotated=owned.rows_done > 0,
            )
            await engine.run(left, drain)
            return update.limits
        return options.limits

    async def _confirm(self, owned: RotationState, limits: WaitLimits, ledger: Ledger | None) -> bool:
        """Rotate every row that no session has written since the rotation began.

        Return whether none is left; False also where a stop was requested or rows were rejected.

        Raises:
            TargetError: The target has changed since the rotation began.
            RotatorError: Rows are left that the rotation cannot reach.
        """
        stop_signal, notify = self.context.stop_signal, self.context.notify
        if not await wait_for_older_writers(self.connection, self.table, owned.started_xid, self.context):
            return False
        update = RangeUpdate(self.table, self.context.target.source, limits, ledger)
        write = partial(write_placed, self.connection, update, owned.lease, self.context.on_commit)
        notify(ConfirmationStarted())
        attempts = 0
        while True:
            writers = await stop_signal.run_until_stop(
                count_unless_changed(
                    self.connection,
                    self.table,
                    rotation=owned.lease.rotation,
                    started_xid=owned.started_xid,
                    identity=owned.identity,
                )
            )
            if writers is None:
                return False
            if isinstance(writers, str):
                raise changed_target(owned.lease.rotation, self.context.target.label, writers)
            if not writers.older:
                notify(RowsConfirmed(confirmed=writers.confirmed, unconfirmed=writers.others))
                return True
            found = find_older_rows(
                self.connection,
                self.table,
                rotation=owned.lease.rotation,
                started_xid=owned.started_xid,
                batch=self.context.gate.max_rows,
            )
            rotated = await LateRows(write, self.context.gate, stop_signal, notify).rotate_all(found)
            if stop_signal.drain.is_set() or self.context.stats.rejected_keys:
                return False
            attempts = 0 if rotated else attempts + 1
            if attempts >= CONFIRMATIONS:
                raise RotatorError(
                    f"{writers.older:,} rows of {self.context.target.label} have not been written since the "
                    f"rotation began, and {attempts} attempts did not reach them. Look for a trigger or a "
                    "policy that hides them, then run the same command again."
                )
