"""A helper: a Celery task that claims spans and rewrites them."""

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.events import Event, OnCommit, RangeCompleted, ignore
from rotator.exceptions import RowsLockedError, ServerLostError, SupersededError
from rotator.options import RunOptions
from rotator.postgres import spans
from rotator.postgres.connection import Server, pooled
from rotator.postgres.control import read_requested
from rotator.postgres.fence import Lease
from rotator.postgres.identity import TargetIdentity, changed_target, read_identity
from rotator.postgres.ledger import find_ledger
from rotator.postgres.planner import IndexPlanner
from rotator.postgres.spans import ClaimedSpan
from rotator.postgres.writer import write_range
from rotator.runner.aio import act_when, is_set_within, running
from rotator.runner.context import RunContext, RunTarget, ShouldStop
from rotator.runner.control import LiveControl
from rotator.runner.engine import Engine
from rotator.runner.pacing import OWN_PER_SECOND_WITH_CELERY
from rotator.runner.preflight import measured_update, read_target
from rotator.runner.retry import OutageBudget
from rotator.stats import Stats

# For claims and leases, and for the planner.
OTHER_CONNECTIONS: Final = 2
RENEW_SECONDS: Final = 4.0
LOOK_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.2
# The owner plans the next spans within this time; a helper without spans leaves its process to other tasks.
IDLE_SECONDS: Final = 3.0


class Helper:
    """A Celery task that claims spans of a rotation and rewrites them, one after the other."""

    def __init__(
        self,
        server: Server,
        target: RunTarget,
        options: RunOptions,
        lease: Lease,
        number: int,
        on_commit: OnCommit | None,
        should_stop: ShouldStop,
    ) -> None:
        """Prepare it; ``number`` is the id of this task's row."""
        self._context = context = RunContext(
            server=server,
            target=target,
            options=options,
            notify=ignore,
            on_commit=on_commit,
            own_per_second=OWN_PER_SECOND_WITH_CELERY,
        )
        self._lease = lease
        self._number = number
        self._should_stop = should_stop
        self._drain = context.stop_signal.drain
        self._outage = OutageBudget(seconds=options.outage_budget_seconds)
        # The owner stops the rotation, which ends this task.
        self._live = LiveControl(context, cancel=lambda _by: None)
        self._is_wanted = True
        self._renewed_at = self._looked_at = 0.0

    async def work(self, identity: TargetIdentity | None) -> bool:
        """Rewrite spans until none is left, the rotation stops, or the task has to stop.

        Return whether another task is to continue. ``identity`` is that of the target when the rotation
        began; None where an older version began it.

        Raises:
            ServerLostError: The server was unreachable for longer than the outage budget.
            RotatorError: This worker cannot rotate the target.
        """
        async with running(act_when(self._should_stop, self._drain.set), "rotator watch for a stop"):
            while not self._drain.is_set():
                try:
                    await self._work_while_connected(identity)
                except ServerLostError:
                    self._outage.lost()
                    if not self._outage.left_seconds:
                        raise
                    await is_set_within(self._drain, self._outage.delay_seconds())
        return self._is_wanted

    async def _work_while_connected(self, identity: TargetIdentity | None) -> None:
        context = self._context
        async with (
            pooled(context.server, context.options.concurrency + OTHER_CONNECTIONS) as pool,
            pool.connection() as connection,
            pool.connection() as side,
            context.pacing.running(),
        ):
            context.table = await read_target(connection, context.target)
            difference = identity and identity.difference(await read_identity(connection, context.table))
            if difference:
                raise changed_target(self._lease.rotation, context.target.label, difference)
            self._outage.reached()
            await self._renew(connection, self._lease)
            planner, clock = IndexPlanner(side, context.table), time.monotonic
            idle_since = clock()
            while not self._drain.is_set():
                await self._look(connection)
                claimed = None
                # Where a transaction of an earlier helper could not be ended, the new lease expires, too.
                with suppress(RowsLockedError):
                    claimed = await spans.claim(
                        connection, context.table, self._lease, worker=str(context.owner)
                    )
                if claimed is not None:
                    with suppress(SupersededError):
                        await self._rewrite(claimed, planner, pool, connection)
                    idle_since = clock()
                elif clock() - idle_since > IDLE_SECONDS:
                    self._leave()
                else:
                    await self._renew(connection, self._lease)
                    await is_set_within(self._drain, POLL_SECONDS)

    async def _rewrite(
        self,
        claimed: ClaimedSpan,
        planner: IndexPlanner,
        pool: AsyncConnectionPool,
        connection: AsyncConnection,
    ) -> None:
        context, stats = self._context, Stats()

        def notify(event: Event) -> None:
            stats.take(event)
            if isinstance(event, RangeCompleted):
                self._outage.refill()

        if claimed.gaps:
            ledger = await find_ledger(connection, claimed.lease.rotation)
            update = await measured_update(
                connection, context.table, context, claimed.gaps[0].through, ledger
            )
            write = partial(write_range, pool, update, claimed.lease, context.on_commit)
            # A span without a rotated row is one gap.
            has_rotated = update.has_stored = len(claimed.gaps) > 1
            engine = Engine(planner.next_range, write, context.gate, notify=notify, has_rotated=has_rotated)
            async with running(self._keep_renewed(connection, claimed.lease, stats), "rotator lease"):
                await engine.run(claimed.gaps, self._drain)
        if self._drain.is_set():
            await spans.release(connection, claimed.lease, deferrals=stats.deferrals, retries=stats.retries)
        else:
            await spans.finish(
                connection,
                claimed.lease,
                deferrals=stats.deferrals,
                retries=stats.retries,
                failed_keys=stats.rejected_keys,
            )

    async def _keep_renewed(self, connection: AsyncConnection, lease: Lease, stats: Stats) -> None:
        while True:
            due_at = min(self._looked_at + LOOK_SECONDS, self._renewed_at + RENEW_SECONDS)
            await asyncio.sleep(due_at - time.monotonic())
            await self._look(connection)
            if stats.deferrals:
                # The owner looks for the sessions that hold the locks.
                deferrals, stats.deferrals = stats.deferrals, 0
                await spans.report_deferrals(connection, lease, deferrals)
            if time.monotonic() - self._renewed_at >= RENEW_SECONDS:
                await self._renew(connection, lease)

    async def _look(self, connection: AsyncConnection) -> None:
        """Apply what users request, and what holds the owner, once a second."""
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            requested = await read_requested(connection, self._lease.rotation)
            options, throttles = self._context.options, self._context.target.throttles
            has_throttles = options.has_throttles or bool(throttles.calls)
            self._live.follow_owner(requested, has_throttles=has_throttles)
            self._looked_at = time.monotonic()

    async def _renew(self, connection: AsyncConnection, lease: Lease) -> None:
        self._renewed_at = time.monotonic()
        if not await spans.renew(connection, lease, self._number):
            self._leave()

    def _leave(self) -> None:
        self._is_wanted = False
        self._drain.set()
