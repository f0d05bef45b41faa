"""One run of a rotation: acquire it, work on it through outages, and release it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

from psycopg import AsyncConnection

from rotator.events import (
    EndStatus,
    Event,
    Findings,
    LateRowsRotated,
    Observer,
    OnCommit,
    OutageEnded,
    OutageStarted,
    Preflighted,
    RangeCompleted,
    RotationStopped,
    RunFacts,
    ServerLogShowsValues,
    StopReason,
    Tick,
    Verified,
    WorkersProgressed,
)
from rotator.exceptions import (
    RotatorError,
    ServerLostError,
    StoppedBeforeStartError,
    SupersededError,
    unwrap_group,
)
from rotator.options import RunOptions, Selection
from rotator.postgres import rotations
from rotator.postgres.activity import check_standbys
from rotator.postgres.connection import OPEN_SECONDS, Server, connected, pooled
from rotator.postgres.fence import Lease
from rotator.postgres.identity import read_identity
from rotator.postgres.ledger import find_ledger
from rotator.postgres.maintenance import read_storage
from rotator.postgres.planner import count_table, gaps
from rotator.postgres.preflight import (
    COUNT_SECONDS,
    check_values,
    name_server,
    settings_that_show_values,
)
from rotator.postgres.rotations import RotationState
from rotator.postgres.writer import RangeUpdate
from rotator.ranges import intervals_between
from rotator.runner.acquire import Acquired, acquire, reacquire
from rotator.runner.aio import act_when, running
from rotator.runner.context import AskForHelp, RunContext, RunTarget, ShouldStop
from rotator.runner.control import LiveControl, pause_signals
from rotator.runner.heartbeat import TICK_SECONDS, Heartbeat, HorizonWatch
from rotator.runner.locks import LockWatch, lock_holders_named
from rotator.runner.maintenance import Maintenance
from rotator.runner.preflight import check, examine, read_target
from rotator.runner.retry import OutageBudget
from rotator.runner.session import Session
from rotator.runner.throttles import Throttles
from rotator.runner.verification import Verifier, unverified

RECORD_SECONDS: Final = 5.0
MIN_OPEN_SECONDS: Final = 1.0
_REJECTED_ROWS: Final = (
    "Rows were rejected. Fix the cause, then run the same command again to retry only those rows."
)


def program_error(error: Exception) -> str:
    """Return the sentence for an error of the program; never its message, which may hold values."""
    return f"The program failed with {type(error).__name__}: look at its traceback."


class Run:
    """One process's work on one rotation."""

    def __init__(
        self,
        server: Server,
        target: RunTarget,
        options: RunOptions,
        observer: Observer,
        on_commit: OnCommit | None = None,
        ask_for_help: AskForHelp | None = None,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Prepare a run; to be called in the running loop. For the arguments, see :class:`RunContext`.

        The observer is called with each event. ``should_stop`` returns whether to drain, in addition to
        signals; None for signals only.
        """
        self._context = context = RunContext(
            server=server,
            target=target,
            options=options,
            notify=self._notify,
            on_commit=on_commit,
            ask_for_help=ask_for_help,
        )
        self._heartbeat = Heartbeat(
            context,
            LiveControl(context, partial(context.stop_signal.request, StopReason.CANCEL)),
            Throttles(options, target.throttles),
            HorizonWatch(self._notify),
        )
        self._lock_watch = LockWatch(self._notify, count_commits=context.pacing.count_commits)
        self._maintenance = Maintenance(context)
        self._outage = OutageBudget(seconds=options.outage_budget_seconds)
        self._observer = observer
        self._should_stop = should_stop
        self._acquired: Acquired | None = None
        self._has_ledger = options.prove
        self._server_name = ""

    async def rotate(self, findings: Findings | None = None) -> RotationStopped:
        """Work until the rotation is completed, a stop is requested, or an error ends the run.

        Args:
            findings: Those of a preflight before this run, to be stored; None where there was none.

        Raises:
            OwnedElsewhereError: Another process is alive and owns the rotation.
            TargetError: The target cannot be rotated.
            OptionError: The server cannot rotate it with these options.
            ServerLostError: The server was unreachable before the rotation was acquired.
            StoppedBeforeStartError: A stop was requested before anything was changed.
        """
        self._context.findings = findings
        stop_signal = self._context.stop_signal
        with self._signals():
            others = [
                asyncio.create_task(self._stop_in_time(), name="rotator --stop-after"),
                asyncio.create_task(self._stop_when_due(), name="rotator watch for a stop"),
                asyncio.create_task(self._tick_through_outages(), name="rotator outage ticks"),
            ]
            work = stop_signal.work = asyncio.create_task(self._through_outages(), name="rotator run")
            try:
                stopped = await work
            except asyncio.CancelledError:
                if not stop_signal.aborted:
                    await self._record("interrupted", stop_reason=StopReason.CANCELLED)
                    raise
                if self._acquired is not None and self._acquired.is_completed:
                    lease = self._acquired.lease
                    if self._has_ledger and self._context.stats.verification is None:
                        self._notify_unverified(lease.rotation, "It was cancelled.")
                    stopped = await self._leave_completed(lease)
                else:
                    stopped = await self._leave("interrupted")
            except Exception as error:
                # Errors of the rotator are recorded already; those of the program or an observer are not.
                if not isinstance(error, RotatorError):
                    await self._record("failed", error=program_error(error))
                raise
            finally:
                for task in others:
                    task.cancel()
        self._notify(stopped)
        return stopped

    async def begin(self, findings: Findings | None = None) -> int:
        """Begin or resume the rotation, queue it for Celery workers, and return its id.

        Args:
            findings: As for ``rotate()``.

        Raises:
            RotatorError: It cannot be rotated, or another process owns it; nothing was changed.
        """
        self._context.findings = findings
        async with connected(self._context.server) as control:
            acquired = await self._acquire(control)
        await self._record("queued")
        return acquired.lease.rotation

    async def reindex(self, rotation: int) -> tuple[str, ...]:
        """Rebuild the indexes that a completed rotation has left; return the statements for the rest.

        Raises:
            RotatorError: The server is unreachable, or the target cannot be rotated.
        """
        context = self._context
        with self._signals():
            async with connected(context.server) as control:
                await check(control, context)
                await self._maintenance.reindex(rotation)
                return await self._maintenance.read_reindex_statements(control, rotation)

    async def verify(self, rotation: int, *, repairs: bool) -> Verified:
        """Verify a rotation, and give survivors new values if ``repairs``.

        Raises:
            RotatorError: The server is unreachable, or the rotation cannot be verified or repaired.
        """
        context = self._context
        async with (
            running(self._stop_when_due(), "rotator watch for a stop"),
            connected(context.server) as connection,
            lock_holders_named(context.server, self._notify),
        ):
            context.table = await read_target(connection, context.target)
            return await Verifier(connection, rotation, context).verify(repairs=repairs)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if not self._context.options.listens_to_signals:
            yield
            return
        with self._context.stop_signal.signals(), pause_signals(self._context.gate):
            yield

    async def _stop_in_time(self) -> None:
        seconds = self._context.options.stop_after_seconds
        if seconds is not None:
            await asyncio.sleep(seconds)
            self._context.stop_signal.request(StopReason.STOP_AFTER)

    async def _stop_when_due(self) -> None:
        if self._should_stop is not None:
            request = partial(self._context.stop_signal.request, StopReason.WORKER_SHUTDOWN)
            await act_when(self._should_stop, request)

    async def _tick_through_outages(self) -> None:
        """Tick while the server is unreachable: the heartbeat, which ticks otherwise, has stopped."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._outage.is_unreachable:
                self._notify(Tick())

    async def _through_outages(self) -> RotationStopped:
        while True:
            try:
                async with connected(self._context.server) as control:
                    acquired = await self._acquire(control)
                    # A run without --prove resumes a rotation with it.
                    ledger = await find_ledger(control, acquired.lease.rotation)
                    self._has_ledger = self._has_ledger or ledger is not None
                    status = await self._work(control, acquired)
            except ServerLostError as lost:
                if self._acquired is None:
                    raise
                if not await self._wait_before_reconnect(lost):
                    is_requested = self._context.stop_signal.drain.is_set()
                    return await (self._leave("interrupted") if is_requested else self._give_up(lost))
            except RotatorError as error:
                return await self._give_up(error)
            else:
                if status == "completed":
                    self._acquired, lease = replace(acquired, is_completed=True), acquired.lease
                    # All workers have left, so the statistics contain their work.
                    await self._maintenance.vacuum_and_analyze()
                    if self._context.options.reindex:
                        await self._maintenance.reindex(lease.rotation)
                    await self._verify(lease.rotation)
                    return await self._leave_completed(lease)
                return await self._leave(status)

    async def _acquire(self, control: AsyncConnection) -> Acquired:
        """Check the target and acquire the rotation; after a lost connection, only acquire it again."""
        context = self._context
        await check_standbys(control)
        async with lock_holders_named(context.server, self._notify):
            # Known at once: an error or a cancellation from here on must end this generation.
            if self._acquired is not None:
                self._acquired = await reacquire(control, self._acquired, context)
            else:
                await self._check(control)
                self._acquired = await acquire(control, context)
        return self._acquired

    async def _check(self, control: AsyncConnection) -> None:
        """Refuse what cannot be rotated, before anything is changed, and report what is risky."""
        context = self._context
        target, options = context.target, context.options
        await check(control, context)
        table = context.table
        if context.ask_for_help is None:
            await context.pacing.prepare(control)
        if showing := await settings_that_show_values(control):
            self._notify(ServerLogShowsValues(settings=showing))
        self._server_name = await name_server(control)
        context.stats.storage_before = await read_storage(control, table)
        await self._maintenance.prepare(control)
        found = await rotations.find_unfinished(control, target.label, table.found_name)
        resumed = None if options.restart else found
        # The generator of a resumed rotation was tried before.
        if target.selection.generator and (
            resumed is None or Selection.from_json(resumed.selection) != target.selection
        ):
            await check_values(control, RangeUpdate(table, target.source, options.limits))
        if options.preflight:
            # A resumed rotation was examined before.
            if resumed is None:
                await self._preflight(control)
            if context.stop_signal.drain.is_set():
                raise StoppedBeforeStartError(context.stop_signal.signal)

    async def _preflight(self, control: AsyncConnection) -> None:
        """Report the findings about a new rotation."""
        context = self._context
        if not context.options.restart:
            # Acquiring the rotation checks this too, but only after the report.
            terms = context.terms(await read_identity(control, context.table))
            await rotations.check_repetition(control, terms, after=context.options.after)
        context.findings = await examine(control, context)
        self._notify(Preflighted(findings=context.findings))

    async def _work(self, control: AsyncConnection, acquired: Acquired) -> EndStatus:
        if acquired.is_completed:
            self._notify_outage_ended(await rotations.read_state(control, acquired.lease))
            return "completed"
        context, heartbeat = self._context, self._heartbeat
        # Where Celery workers rewrite the ranges, this process only rotates older rows.
        concurrency = 1 if context.ask_for_help else context.options.concurrency
        # One attempt is made even if little of the budget is left.
        seconds = min(OPEN_SECONDS, max(MIN_OPEN_SECONDS, self._outage.left_seconds))
        async with (
            connected(context.server) as connection,
            pooled(context.server, concurrency, seconds=seconds) as pool,
            running(heartbeat.watch_commits(), "rotator watch of commits"),
        ):
            session = Session(connection, pool, acquired, context)
            while True:
                with unwrap_group():
                    async with (
                        asyncio.TaskGroup() as tasks,
                        # Celery workers keep the pace themselves.
                        nullcontext() if context.ask_for_help else context.pacing.running(),
                    ):
                        heart = tasks.create_task(
                            heartbeat.run(control, acquired.lease), name="rotator heartbeat"
                        )
                        owned = await session.read_state()
                        self._notify_outage_ended(owned)
                        if context.stats.started is None:
                            self._notify(session.start_event())
                        # A pause survives the end of a process: it applies before the first range.
                        await heartbeat.beat(control, acquired.lease)
                        await heartbeat.throttles.look(control, acquired.lease.rotation, context.gate)
                        others = self._start_others(tasks, control, owned)
                        status = await session.work()
                        for task in (heart, *others):
                            task.cancel()
                # The heartbeat has ended: it would report a completed rotation as lost.
                if status != "completed" or await session.complete():
                    # No range follows, and time is no longer throttled.
                    for source in context.gate.holds:
                        context.gate.release(source, slowly=False)
                    return status

    def _start_others(
        self, tasks: asyncio.TaskGroup, control: AsyncConnection, owned: RotationState
    ) -> list[asyncio.Task[None]]:
        """Start what works next to the workers until it is cancelled."""
        heartbeat, rotation = self._heartbeat, owned.lease.rotation
        works = {
            "throttles": heartbeat.throttles.watch(control, rotation, self._context.gate),
            "watch of the xmin horizon": heartbeat.horizon.watch(control),
            "watch for lock holders": self._lock_watch.watch(control),
            "VACUUM": self._maintenance.vacuum_during_rotation(control, rows_total=owned.rows_total),
        }
        return [tasks.create_task(work, name=f"rotator {name}") for name, work in works.items()]

    def _notify_outage_ended(self, owned: RotationState) -> None:
        if self._outage.is_unreachable:
            seconds = self._outage.reached()
            self._notify(OutageEnded(seconds=seconds, rows_done=owned.rows_done, late_rows=owned.late_rows))

    async def _verify(self, rotation: int) -> None:
        """Verify a completed rotation that has a ledger; an error is part of the result."""
        if not self._has_ledger:
            return
        try:
            server = self._context.server
            async with connected(server) as connection, lock_holders_named(server, self._notify):
                if await find_ledger(connection, rotation) is None:
                    self._notify_unverified(rotation, "The ledger was dropped.")
                else:
                    await Verifier(connection, rotation, self._context).verify()
        except RotatorError as error:
            self._notify_unverified(rotation, str(error))

    def _notify_unverified(self, rotation: int, error: str) -> None:
        self._notify(unverified(rotation, self._context.target.label, error))

    async def _wait_before_reconnect(self, lost: ServerLostError) -> bool:
        """Wait before the next attempt; False if the budget is used up or a stop was requested."""
        is_new = not self._outage.is_unreachable
        self._outage.lost()
        if is_new:
            self._notify(OutageStarted(reason=str(lost), budget_seconds=self._outage.left_seconds))
        if self._outage.left_seconds <= 0:
            return False
        return not await self._context.stop_signal.wait(self._outage.delay_seconds())

    async def _leave_completed(self, lease: Lease) -> RotationStopped:
        """Record the time of a completed rotation, and read the figures of its table."""
        context, stats = self._context, self._context.stats
        stats.stop_clock()
        with suppress(RotatorError, TimeoutError):
            async with asyncio.timeout(RECORD_SECONDS), connected(context.server) as connection:
                await rotations.record_figures(connection, lease, figures=context.figures)
                await self._heartbeat.log_vacuums(connection, lease.rotation)
                stats.storage = await read_storage(connection, context.table)
                stats.reindex_statements = await self._maintenance.read_reindex_statements(
                    connection, lease.rotation
                )
                if context.target.condition is not None:
                    stats.table_rows = await count_table(connection, context.table, seconds=COUNT_SECONDS)
        return self._stopped("completed")

    async def _give_up(self, error: RotatorError) -> RotationStopped:
        if self._acquired is None:
            raise error
        superseded = isinstance(error, SupersededError)
        status: EndStatus = "interrupted" if isinstance(error, ServerLostError) or superseded else "failed"
        if isinstance(error, ServerLostError) and self._should_stop is not None:
            # Another Celery worker resumes it.
            status = "queued"
        await self._record(status, error=str(error))
        if self._context.stats.started is None:
            raise error
        return self._stopped(status, error=str(error), superseded=superseded)

    async def _leave(self, status: EndStatus) -> RotationStopped:
        """Record the end of a run that was asked to stop, or whose rows were rejected."""
        stop_signal = self._context.stop_signal
        reason = stop_signal.reason
        if reason is StopReason.WORKER_SHUTDOWN:
            status = "queued"
        error = "" if reason else _REJECTED_ROWS
        await self._record(status, stop_reason=reason, error=error)
        if self._context.stats.started is None:
            raise StoppedBeforeStartError(stop_signal.signal)
        return self._stopped(status, error=error)

    async def _record(
        self, status: EndStatus, *, stop_reason: StopReason | None = None, error: str = ""
    ) -> None:
        """Record the end of the run in the database, if that is possible now."""
        if self._acquired is None:
            return
        lease, table, stats = self._acquired.lease, self._context.table, self._context.stats
        stats.stop_clock()
        # The account of the run is more important than an error here.
        with suppress(RotatorError, TimeoutError):
            async with asyncio.timeout(RECORD_SECONDS), connected(self._context.server) as connection:
                stats.rows_done = await rotations.stop(
                    connection,
                    lease,
                    status=status,
                    stop_reason=stop_reason,
                    error=error,
                    figures=self._context.figures,
                    rejected_keys=stats.rejected_keys,
                )
                # Without a start, no account of the run is made.
                if stats.started is not None:
                    stats.storage = await read_storage(connection, table)
                    owned = await rotations.read_state(connection, lease)
                    stats.late_rows = owned.late_rows
                    if owned.bound is not None:
                        left = await gaps(connection, table, lease.rotation, owned.bound)
                        stats.spans = intervals_between(left, owned.bound)

    def _stopped(self, status: EndStatus, *, error: str = "", superseded: bool = False) -> RotationStopped:
        context = self._context
        stop_reason = None if status == "completed" or error else context.stop_signal.reason
        return context.stats.stopped(
            status,
            stop_reason=stop_reason,
            cancelled_by=context.stop_signal.by if stop_reason is StopReason.CANCEL else "",
            error=error,
            superseded=superseded,
            run=RunFacts(
                started_at=context.stats.started_at,
                ended_at=datetime.now(UTC),
                user=context.owner.user,
                host=context.owner.host,
                server_name=self._server_name,
                table_name=context.table.found_name,
                selection=context.target.selection,
            ),
        )

    def _notify(self, event: Event) -> None:
        self._context.stats.take(event)
        self._lock_watch.take(event)
        self._heartbeat.take(event)
        if isinstance(event, RangeCompleted | LateRowsRotated) or (
            isinstance(event, WorkersProgressed) and event.ranges
        ):
            self._outage.refill()
        self._observer(event)
