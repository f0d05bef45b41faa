"""One run of a rotation: own it, plan, write, find what came late, complete; through outages too."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from signal import Signals
from typing import Final

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from rotator.engine.engine import Engine, EngineOptions
from rotator.engine.tasks import first_error_alone
from rotator.errors import RotatorError, ServerLostError, StoppedBeforeStartError, SupersededError
from rotator.events import (
    EndStatus,
    Event,
    Observer,
    OutageEnded,
    OutageStarted,
    RangeCompleted,
    RotationStarted,
    RotationStopped,
    Tick,
)
from rotator.keys import KeySpan
from rotator.postgres import ownership
from rotator.postgres.catalog import check_server, read_table
from rotator.postgres.connections import Server, connected, pooled
from rotator.postgres.failures import superseded
from rotator.postgres.late_commits import LatePass
from rotator.postgres.ownership import Owned
from rotator.postgres.planning import IndexPlanner, count_rows, gaps, last_key
from rotator.postgres.table import TargetTable
from rotator.postgres.writing import PostgresWriter
from rotator.process import this_process
from rotator.run.acquiring import Acquired, Acquisition
from rotator.run.figures import Figures
from rotator.run.late_rows import older_writers_are_over, rotate_late_rows
from rotator.run.options import RunOptions, RunTarget
from rotator.run.outage import OutageBudget
from rotator.run.stopping import StopRequests

HEARTBEAT_SECONDS: Final = 1.0
OLDER_WRITERS_SECONDS: Final = 5.0
COUNT_SECONDS: Final = 2.0
RECORD_SECONDS: Final = 5.0
STOP_AFTER: Final = "--stop-after"
# Beside the workers': one for the owner's row, one for the planner and the pass over late rows.
OTHER_CONNECTIONS: Final = 2


class Run:
    """One process's work on one rotation."""

    def __init__(self, server: Server, target: RunTarget, options: RunOptions, observer: Observer) -> None:
        """Prepare a run; to be called in the running loop."""
        self._server = server
        self._target = target
        self._options = options
        self._observer = observer
        self._owner = this_process()
        self._figures = Figures()
        self._outage = OutageBudget(seconds=options.outage_budget_seconds, clock=time.monotonic)
        self._requests = StopRequests(self._notify)
        self._acquired: Acquired | None = None
        self._late_rows_before = 0

    @property
    def signal(self) -> Signals | None:
        """The signal that asked for a stop, if one did."""
        return self._requests.signal

    @property
    def stopped_by_option(self) -> bool:
        """Whether the run ended because an option told it to."""
        return self._requests.reason == STOP_AFTER

    async def rotate(self) -> RotationStopped:
        """Work until the rotation is completed, somebody asks for a stop, or it cannot go on.

        Raises:
            OwnedElsewhereError: Another process is alive and owns the rotation.
            TargetError: The target cannot be rotated.
            OptionError: The server cannot do it with these options.
            ServerLostError: The server could not be reached in the first place.
        """
        with self._requests.signals():
            timer = asyncio.create_task(self._stop_in_time(), name="rotator --stop-after")
            work = asyncio.create_task(self._through_outages(), name="rotator run")
            try:
                with self._requests.aborting(work):
                    stopped = await work
            except asyncio.CancelledError:
                if not self._requests.aborted:
                    raise
                stopped = await self._leave("interrupted", self._asked())
            finally:
                timer.cancel()
        self._notify(stopped)
        return stopped

    async def _stop_in_time(self) -> None:
        if self._options.stop_after_seconds is not None:
            await asyncio.sleep(self._options.stop_after_seconds)
            self._requests.ask(STOP_AFTER)

    async def _through_outages(self) -> RotationStopped:
        while True:
            try:
                async with connected(self._server) as control:
                    acquired = await self._own(control)
                    status = await self._heartbeat_beside(control, acquired)
            except ServerLostError as lost:
                if self._acquired is None:
                    raise
                if not await self._outlast(lost):
                    return await self._leave("interrupted", self._asked() or str(lost))
            except RotatorError as error:
                return await self._give_up(error)
            else:
                if status == "completed":
                    return self._stopped("completed", "")
                return await self._leave(status, self._asked())

    async def _give_up(self, error: RotatorError) -> RotationStopped:
        status: EndStatus = "interrupted" if isinstance(error, SupersededError) else "failed"
        await self._record(status, str(error))
        if not self._figures.has_started:
            raise error
        return self._stopped(status, str(error))

    def _asked(self) -> str:
        return f"Stopped by {self._requests.reason}." if self._requests.drain.is_set() else ""

    async def _own(self, control: AsyncConnection) -> Acquired:
        """Own the rotation, the first time or again after an outage."""
        if self._acquired is None:
            await check_server(
                control,
                connections=self._options.concurrency + OTHER_CONNECTIONS,
                concurrency=self._options.concurrency,
            )
            # Looked up here too, so that a wrong target changes nothing.
            await self._read_table(control)
            acquisition = Acquisition(
                control,
                self._target,
                self._options,
                owner=self._owner,
                requests=self._requests,
                notify=self._notify,
            )
            self._acquired = await acquisition.acquire()
            return self._acquired
        # Nobody knows what the lost connections were about to commit. Under the exclusive lock, with a
        # new generation, they have committed it or never will.
        claim = await ownership.take_over(
            control, self._acquired.claim, owner=self._owner, options=self._options.saved()
        )
        if claim is None:
            raise superseded()
        self._acquired = replace(self._acquired, claim=claim)
        return self._acquired

    async def _heartbeat_beside(self, control: AsyncConnection, acquired: Acquired) -> EndStatus:
        with first_error_alone():
            async with asyncio.TaskGroup() as tasks:
                heart = tasks.create_task(self._beat(control, acquired), name="rotator heartbeat")
                status = await self._work(control, acquired)
                heart.cancel()
        return status

    async def _beat(self, control: AsyncConnection, acquired: Acquired) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await ownership.beat(
                control,
                acquired.claim,
                rows_done=self._figures.rows_done,
                active_seconds=self._figures.active_seconds,
            )
            self._notify(Tick())

    async def _work(self, control: AsyncConnection, acquired: Acquired) -> EndStatus:
        table = await self._read_table(control)
        owned = await self._freeze(control, table, await ownership.read_owned(control, acquired.claim))
        self._tell_started(acquired, owned)
        async with connected(self._server) as side, pooled(self._server, self._options.concurrency) as pool:
            while not self._requests.drain.is_set():
                await self._rotate_gaps(control, side, pool, table, owned)
                if self._requests.drain.is_set():
                    break
                if self._figures.failed_keys:
                    return "failed"
                # Rows that were deleted since they were planned leave the limit unreached, and end it too.
                if self._options.stop_after_rows is not None and await self._gaps(control, table, owned):
                    self._requests.ask(STOP_AFTER)
                    break
                if await self._complete(control, side, table, owned):
                    return "completed"
        return "failed" if self._figures.failed_keys else "interrupted"

    async def _read_table(self, control: AsyncConnection) -> TargetTable:
        target = self._target
        return await read_table(control, path=target.path, key=target.key, column=target.column)

    async def _freeze(self, control: AsyncConnection, table: TargetTable, owned: Owned) -> Owned:
        """Freeze the bound, unless an earlier run has."""
        if owned.bound is not None:
            return owned
        # Before the bound: a row that is committed late and then written again, title or whatever, has a
        # new xmin and a leaked token, and only planning it finds it.
        await older_writers_are_over(
            control,
            table,
            owned.started_xid,
            seconds=OLDER_WRITERS_SECONDS,
            requests=self._requests,
            notify=self._notify,
        )
        bound = await last_key(control, table)
        if bound is None:
            return owned
        rows_total, is_exact = await count_rows(control, table, bound, seconds=COUNT_SECONDS)
        await ownership.freeze_bound(
            control, owned.claim, bound=bound, rows_total=rows_total, is_exact=is_exact
        )
        return replace(owned, bound=bound, rows_total=rows_total, rows_total_is_exact=is_exact)

    def _tell_started(self, acquired: Acquired, owned: Owned) -> None:
        if self._outage.is_away:
            self._notify(OutageEnded(seconds=self._outage.back(), rows_done=owned.rows_done))
        if self._figures.has_started:
            return
        self._late_rows_before = owned.late_rows
        self._notify(
            RotationStarted(
                rotation=owned.claim.rotation,
                target=self._target.label,
                rows_total=owned.rows_total,
                rows_total_is_exact=owned.rows_total_is_exact,
                rows_done=owned.rows_done,
                seconds_before=owned.seconds_before,
                stopped_at=acquired.stopped_at,
                concurrency=self._options.concurrency,
                batch=self._options.batch,
            )
        )

    async def _gaps(self, control: AsyncConnection, table: TargetTable, owned: Owned) -> list[KeySpan]:
        if owned.bound is None:
            return []
        return await gaps(control, table, owned.claim.rotation, owned.bound)

    async def _rotate_gaps(
        self,
        control: AsyncConnection,
        side: AsyncConnection,
        pool: AsyncConnectionPool,
        table: TargetTable,
        owned: Owned,
    ) -> None:
        engine = Engine(
            IndexPlanner(side, table),
            PostgresWriter(pool, table, owned.claim, self._target.make_values, self._options.limits),
            notify=self._notify,
            options=EngineOptions(
                concurrency=self._options.concurrency,
                batch=self._options.batch,
                rows_at_most=self._rows_left_of_limit(),
            ),
        )
        await engine.run(await self._gaps(control, table, owned), self._requests.drain)

    def _rows_left_of_limit(self) -> int | None:
        limit = self._options.stop_after_rows
        return None if limit is None else max(0, limit - self._figures.rows_this_run)

    async def _complete(
        self, control: AsyncConnection, side: AsyncConnection, table: TargetTable, owned: Owned
    ) -> bool:
        """Rotate what was committed late and mark the rotation completed, if nothing is left."""
        requests, notify = self._requests, self._notify
        if not await older_writers_are_over(
            side, table, owned.started_xid, seconds=None, requests=requests, notify=notify
        ):
            return False
        late_pass = LatePass(
            side,
            table,
            owned.claim,
            started_xid=owned.started_xid,
            make_values=self._target.make_values,
            limits=self._options.limits,
        )
        await rotate_late_rows(late_pass, batch=self._options.batch, requests=requests, notify=notify)
        if requests.drain.is_set() or self._figures.failed_keys:
            return False
        rows_done = await ownership.complete(
            control, table, owned.claim, owned.bound, active_seconds=self._figures.active_seconds
        )
        if rows_done is None:
            return False
        self._figures.rows_done = rows_done
        return True

    async def _outlast(self, lost: ServerLostError) -> bool:
        """Wait before the next attempt; False where the budget is used up or a stop was asked for."""
        if not self._outage.is_away:
            self._notify(OutageStarted(reason=str(lost), budget_seconds=self._outage.left_seconds))
        self._outage.lost()
        if self._outage.left_seconds <= 0:
            return False
        return not await self._requests.wait(self._outage.delay_seconds())

    async def _leave(self, status: EndStatus, error: str) -> RotationStopped:
        await self._record(status, error)
        if not self._figures.has_started:
            raise StoppedBeforeStartError(self._requests.signal)
        return self._stopped(status, error)

    async def _record(self, status: EndStatus, error: str) -> None:
        """Tell the database how the run leaves its rotation, as well as that can be done now."""
        if self._acquired is None:
            return
        with suppress(ServerLostError, SupersededError, TimeoutError):
            async with asyncio.timeout(RECORD_SECONDS), connected(self._server) as connection:
                self._figures.rows_done = await ownership.stop(
                    connection,
                    self._acquired.claim,
                    status=status,
                    error=error,
                    active_seconds=self._figures.active_seconds,
                )

    def _stopped(self, status: EndStatus, error: str) -> RotationStopped:
        return self._figures.stopped(status, error=error, late_rows_before=self._late_rows_before)

    def _notify(self, event: Event) -> None:
        self._figures.take(event)
        if isinstance(event, RangeCompleted):
            self._outage.range_completed()
        self._observer(event)
