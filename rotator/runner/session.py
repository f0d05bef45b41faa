"""The work of one generation: freeze the bound, rotate the gaps, confirm, complete."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.events import ConfirmationStarted, EndStatus, RotationStarted, RowsConfirmed, StopReason
from rotator.exceptions import RotatorError
from rotator.postgres import rotations
from rotator.postgres.identity import changed_target
from rotator.postgres.last_writers import count_unless_changed, find_older_rows
from rotator.postgres.ledger import Ledger
from rotator.postgres.planner import IndexPlanner, count_rows, gaps, last_key
from rotator.postgres.rotations import RotationState
from rotator.postgres.writer import RangeUpdate, write_placed, write_range
from rotator.ranges import KeyInterval
from rotator.runner.acquire import Acquired
from rotator.runner.context import RunContext
from rotator.runner.distribution import Distribution
from rotator.runner.engine import Engine
from rotator.runner.late_rows import LateRows, wait_for_older_writers
from rotator.runner.leaked_rows import LeakedRows
from rotator.runner.preflight import measured_update
from rotator.runner.proof import Proof

OLDER_WRITERS_SECONDS: Final = 5.0
COUNT_SECONDS: Final = 2.0
CONFIRMATIONS: Final = 5


@dataclass(slots=True)
class Session:
    """The work of one generation, until it is completed, drained, or loses a connection.

    No other task uses the connection; the pool is that of the workers.

    Attributes:
        owned: The state of the rotation; set by ``read_state()``, which comes first.
    """

    connection: AsyncConnection
    pool: AsyncConnectionPool
    acquired: Acquired
    context: RunContext
    owned: RotationState = field(init=False)
    _leaked_rows: LeakedRows | None = None

    async def read_state(self) -> RotationState:
        """Read the rotation's state; freeze its bound if there are rows and it is not frozen."""
        self.owned = await rotations.read_state(self.connection, self.acquired.lease)
        leaked = self.context.target.leaked
        if leaked is not None:
            self._leaked_rows = LeakedRows(self.connection, self.context, leaked)
            self.owned = await self._leaked_rows.find(self.owned)
        elif self.owned.bound is None:
            await self._freeze()
        return self.owned

    def start_event(self) -> RotationStarted:
        """Return the event that starts a run."""
        owned = self.owned
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

    async def work(self) -> EndStatus:
        """Rotate the rows and confirm every row; return ``completed`` if both succeeded."""
        if self._leaked_rows is not None:
            return await self._leaked_rows.rotate(self.owned)
        options, stop_signal = self.context.options, self.context.stop_signal
        ledger = await Proof(self.connection, self.pool, self.context).prepare(self.owned)
        if stop_signal.drain.is_set():
            return "interrupted"
        update = await self._prepare_update(ledger)
        await self._rotate_gaps(update)
        if stop_signal.drain.is_set():
            return "interrupted"
        if self.context.stats.rejected_keys:
            return "failed"
        # Planned rows that were deleted count towards the limit.
        if options.stop_after_rows is not None and await self._read_gaps():
            stop_signal.request(StopReason.STOP_AFTER)
        is_confirmed = not stop_signal.drain.is_set() and await self._confirm(update)
        if stop_signal.drain.is_set():
            return "interrupted"
        return "completed" if is_confirmed else "failed"

    async def complete(self) -> bool:
        """Mark the rotation completed, and return whether the checkpoints left no gap."""
        stats = self.context.stats
        rows_done = await rotations.complete(
            self.connection,
            self.context.table,
            self.owned.lease,
            self.owned.bound,
            figures=self.context.figures,
            unconfirmed_rows=stats.unconfirmed_rows,
        )
        if rows_done is None:
            return False
        stats.rows_done = rows_done
        return True

    async def _freeze(self) -> None:
        owned, table = self.owned, self.context.table
        # A row that is committed late and then updated by the application has a new xmin and a leaked value.
        # Only a range finds it, so the bound must include it.
        await wait_for_older_writers(
            self.connection, owned.started_xid, self.context, seconds=OLDER_WRITERS_SECONDS
        )
        bound = await last_key(self.connection, table)
        if bound is None:
            return
        rows_total, is_exact = await count_rows(self.connection, table, bound, seconds=COUNT_SECONDS)
        await rotations.freeze_bound(
            self.connection, owned.lease, bound=bound, rows_total=rows_total, is_exact=is_exact
        )
        self.owned = replace(owned, bound=bound, rows_total=rows_total, rows_total_is_exact=is_exact)

    async def _prepare_update(self, ledger: Ledger | None) -> RangeUpdate:
        """Return the update of ranges and of late rows, whose limits planning may have raised."""
        context = self.context
        if context.ask_for_help is None and self.owned.bound is not None:
            update = await measured_update(self.connection, context.table, context, self.owned.bound, ledger)
        else:
            update = RangeUpdate(context.table, context.target.source, context.options.limits, ledger)
        update.has_stored = self.owned.rows_done > 0
        return update

    async def _read_gaps(self) -> list[KeyInterval]:
        owned = self.owned
        return await gaps(self.connection, self.context.table, owned.lease.rotation, owned.bound)

    async def _rotate_gaps(self, update: RangeUpdate) -> None:
        context, owned = self.context, self.owned
        limit = context.options.stop_after_rows
        max_rows = None if limit is None else max(0, limit - context.stats.rows_this_run)
        left = await self._read_gaps()
        if context.ask_for_help is not None:
            distribution = Distribution(self.connection, owned.lease, context, context.ask_for_help)
            rows_left = max(0, owned.rows_total - owned.rows_done)
            await distribution.run(left, rows_left=rows_left, max_rows=max_rows)
        elif left:
            engine = Engine(
                IndexPlanner(self.connection, context.table).next_range,
                partial(write_range, self.pool, update, owned.lease, context.on_commit),
                context.gate,
                notify=context.notify,
                max_rows=max_rows,
                has_rotated=owned.rows_done > 0,
            )
            await engine.run(left, context.stop_signal.drain)

    async def _confirm(self, update: RangeUpdate) -> bool:
        """Rotate every row that no session has written since the rotation began.

        Return whether none is left; False also where a stop was requested or rows were rejected.

        Raises:
            TargetError: The target has changed since the rotation began.
            RotatorError: Rows are left that the rotation cannot reach.
        """
        context, owned = self.context, self.owned
        if not await wait_for_older_writers(self.connection, owned.started_xid, context):
            return False
        write = partial(write_placed, self.connection, update, owned.lease, context.on_commit)
        late_rows = LateRows(write, context.gate, context.stop_signal.drain, context.notify)
        context.notify(ConfirmationStarted())
        attempts = 0
        while True:
            writers = await context.stop_signal.run_until_stop(
                count_unless_changed(
                    self.connection,
                    context.table,
                    rotation=owned.lease.rotation,
                    started_xid=owned.started_xid,
                    identity=owned.identity,
                )
            )
            if writers is None:
                return False
            if isinstance(writers, str):
                raise changed_target(owned.lease.rotation, context.target.label, writers)
            if not writers.older:
                context.notify(RowsConfirmed(confirmed=writers.confirmed, unconfirmed=writers.others))
                return True
            found = find_older_rows(
                self.connection,
                context.table,
                rotation=owned.lease.rotation,
                started_xid=owned.started_xid,
                batch=context.gate.max_rows,
            )
            rotated = await late_rows.rotate_all(found)
            if context.stop_signal.drain.is_set() or context.stats.rejected_keys:
                return False
            attempts = 0 if rotated else attempts + 1
            if attempts >= CONFIRMATIONS:
                raise RotatorError(
                    f"{writers.older:,} rows of {context.target.label} have not been written since the "
                    f"rotation began, and {attempts} attempts did not reach them. Look for a trigger or a "
                    "policy that hides them, then run the same command again."
                )
