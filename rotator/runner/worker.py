"""A Celery worker's part of a distributed rotation: one span, with the same engine."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.aio import watch
from rotator.events import Event, RangeCompleted, RangeDeferred, RangeRetried, RowFailed
from rotator.exceptions import RotatorError, ServerLostError, SupersededError
from rotator.options import RunOptions
from rotator.postgres import spans
from rotator.postgres.connection import Server, pooled
from rotator.postgres.fence import Lease
from rotator.postgres.identity import TargetIdentity, changed_target, read_identity
from rotator.postgres.owner import this_process
from rotator.postgres.planner import IndexPlanner
from rotator.postgres.spans import ClaimedSpan
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import PostgresWriter, RangeUpdate
from rotator.ranges import Key
from rotator.runner.context import AnnouncingWriter, OnCommit, RunTarget, ShouldStop
from rotator.runner.engine import Engine, EngineOptions
from rotator.runner.preflight import raised_limit, read_target, with_raised
from rotator.runner.retry import OutageBudget

# Beside the workers': the span's own, and the planner's.
OTHER_CONNECTIONS: Final = 2


@dataclass
class _EventCounter:
    """What the engine tells, as far as the coordinator wants to know it."""

    outage: OutageBudget
    retries: int = 0
    failed_keys: list[tuple[Key, str]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        match event:
            case RangeCompleted():
                self.outage.refill()
            case RangeDeferred() | RangeRetried():
                self.retries += 1
            case RowFailed():
                self.failed_keys.append((event.key, event.reason))
            case _:
                pass


class SpanWork:
    """One task's work on one span."""

    def __init__(
        self,
        server: Server,
        target: RunTarget,
        options: RunOptions,
        lease: Lease,
        on_commit: OnCommit | None,
        should_stop: ShouldStop,
    ) -> None:
        """Prepare it; the claim is the rotation's, as the task's message has it."""
        self._server = server
        self._target = target
        self._options = options
        self._claim = lease
        self._on_commit = on_commit
        self._should_stop = should_stop
        self._outage = OutageBudget(seconds=options.outage_budget_seconds, clock=time.monotonic)
        self._drain = asyncio.Event()

    async def rotate(self, span: int, identity: TargetIdentity | None) -> None:
        """Rewrite what is left of a span, or as much of it as can be done until the worker has to stop.

        What this task was too late for is no error: the span is another task's, or nobody's.

        Args:
            span: The span's id.
            identity: What the rotation was begun on; None where an older version began it.

        Raises:
            ServerLostError: The server was away for longer than the outage budget.
            RowsLockedError: Another task of the same span could not be ended.
            TargetError: It cannot be rotated by this worker.
            ServerRefusedError: This worker may not begin with it.
        """
        watching = asyncio.create_task(watch(self._should_stop, self._drain.set), name="rotator watch")
        try:
            while not self._drain.is_set():
                try:
                    return await self._attempt(span, identity)
                except SupersededError:
                    return None
                except ServerLostError:
                    self._outage.lost()
                    if not self._outage.left_seconds:
                        raise
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._outage.delay_seconds()):
                            await self._drain.wait()
        finally:
            watching.cancel()

    async def _attempt(self, span: int, identity: TargetIdentity | None) -> None:
        # All of its connections at once: a span takes less than a second where the server is near.
        async with (
            pooled(self._server, self._options.concurrency + OTHER_CONNECTIONS) as pool,
            pool.connection() as connection,
            pool.connection() as side,
        ):
            table = await read_target(connection, self._target)
            difference = identity and identity.difference(await read_identity(connection, table))
            if difference:
                raise changed_target(self._claim.rotation, self._target.label, difference)
            claimed = await spans.claim_span(connection, table, self._claim, span, worker=str(this_process()))
            self._outage.reached()
            if claimed is None:
                return
            told = _EventCounter(self._outage)
            error = ""
            try:
                update = await self._update(connection, table, claimed)
                engine = self._engine(IndexPlanner(side, table), pool, update, claimed, told)
                await engine.run(claimed.gaps, self._drain)
            except (SupersededError, ServerLostError):
                raise
            except RotatorError as refused:
                error = str(refused)
            if self._drain.is_set() and not error:
                # Whoever has it next finds out what is left, if anything.
                await spans.release(connection, claimed.lease, retries=told.retries)
                return
            await spans.finish(
                connection, claimed.lease, retries=told.retries, failed_keys=told.failed_keys, error=error
            )

    async def _update(
        self, connection: AsyncConnection, table: TargetTable, claimed: ClaimedSpan
    ) -> RangeUpdate:
        limits = self._options.limits
        update = RangeUpdate(table, self._target.source, limits)
        raised = await raised_limit(connection, update, limits, claimed.span.through)
        return (
            update if raised is None else RangeUpdate(table, self._target.source, with_raised(limits, raised))
        )

    def _engine(
        self,
        planner: IndexPlanner,
        pool: AsyncConnectionPool,
        update: RangeUpdate,
        claimed: ClaimedSpan,
        told: _EventCounter,
    ) -> Engine:
        options = self._options
        writer = PostgresWriter(pool, update, claimed.lease)
        on_commit = self._on_commit
        return Engine(
            planner,
            writer if on_commit is None else AnnouncingWriter(writer, on_commit, self._claim.rotation),
            notify=told,
            options=EngineOptions(concurrency=options.concurrency, batch=options.batch),
        )
