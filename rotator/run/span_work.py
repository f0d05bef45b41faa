"""A worker's part of a distributed rotation: one span, with the same engine."""

import asyncio
from dataclasses import dataclass, field

from psycopg_pool import AsyncConnectionPool

from rotator.engine.backoff import backoff_seconds
from rotator.engine.engine import Engine, EngineOptions
from rotator.errors import RotatorError, ServerLostError, SupersededError
from rotator.events import Event, RangeDeferred, RangeRetried, RowFailed
from rotator.keys import Key
from rotator.postgres import spans
from rotator.postgres.connections import Server, connected, pooled
from rotator.postgres.planning import IndexPlanner
from rotator.postgres.spans import ClaimedSpan
from rotator.postgres.table import TargetTable
from rotator.postgres.transaction import Claim
from rotator.postgres.writing import PostgresWriter, RangeUpdate
from rotator.process import this_process
from rotator.run.announcing import AnnouncingWriter
from rotator.run.context import Announce
from rotator.run.examination import read_target
from rotator.run.options import RunOptions, RunTarget

_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0


@dataclass
class _Told:
    """What the engine tells, as far as the coordinator wants to know it."""

    retries: int = 0
    failed_keys: list[tuple[Key, str]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        match event:
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
        claim: Claim,
        announce: Announce | None,
    ) -> None:
        """Prepare it; the claim is the rotation's, as the task's message has it."""
        self._server = server
        self._target = target
        self._options = options
        self._claim = claim
        self._announce = announce

    async def rotate(self, span: int) -> None:
        """Rewrite what is left of a span; an error that trying again does not mend is noted with it.

        Whatever else this task was too late for is no error: the span is another task's, or nobody's.

        Raises:
            ServerLostError: The server was away for longer than the outage budget.
        """
        clock = asyncio.get_running_loop().time
        until, attempts = clock() + self._options.outage_budget_seconds, 0
        while True:
            try:
                return await self._attempt(span)
            except SupersededError:
                return None
            except ServerLostError:
                attempts += 1
                if clock() > until:
                    raise
                await asyncio.sleep(
                    backoff_seconds(attempts, first=_FIRST_WAIT_SECONDS, longest=_LONGEST_WAIT_SECONDS)
                )

    async def _attempt(self, span: int) -> None:
        async with connected(self._server) as connection:
            table = await read_target(connection, self._target)
            claimed = await spans.claim_span(connection, table, self._claim, span, worker=str(this_process()))
            if claimed is None:
                return
            told = _Told()
            error = ""
            try:
                async with (
                    connected(self._server) as side,
                    pooled(self._server, self._options.concurrency) as pool,
                ):
                    engine = self._engine(IndexPlanner(side, table), pool, table, claimed, told)
                    await engine.run(claimed.gaps, asyncio.Event())
            except (SupersededError, ServerLostError):
                raise
            except RotatorError as refused:
                error = str(refused)
            await spans.finish(
                connection, claimed.claim, retries=told.retries, failed_keys=told.failed_keys, error=error
            )

    def _engine(
        self,
        planner: IndexPlanner,
        pool: AsyncConnectionPool,
        table: TargetTable,
        claimed: ClaimedSpan,
        told: _Told,
    ) -> Engine:
        options = self._options
        update = RangeUpdate(table, self._target.source, options.limits)
        writer = PostgresWriter(pool, update, claimed.claim)
        announce = self._announce
        return Engine(
            planner,
            writer if announce is None else AnnouncingWriter(writer, announce, self._claim.rotation),
            notify=told,
            options=EngineOptions(concurrency=options.concurrency, batch=options.batch),
        )
