"""One run of a rotation: acquire it, work on it through outages, and release it."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
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
from rotator.postgres.activity import check_standbys, missing_standbys
from rotator.postgres.connection import OPEN_SECONDS, Server, connected, pooled
from rotator.postgres.control import read_requested
from rotator.postgres.identity import read_identity
from rotator.postgres.ledger import find_ledger
from rotator.postgres.maintenance import read_storage
from rotator.postgres.owner import this_process
from rotator.postgres.planner import count_table, gaps
from rotator.postgres.preflight import (
    COUNT_SECONDS,
    check_values,
    name_server,
    settings_that_show_values,
)
from rotator.postgres.rotations import OwnerReport, RotationState
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import RangeUpdate
from rotator.ranges import Key, intervals_between
from rotator.runner.acquire import Acquired, acquire, reacquire
from rotator.runner.aio import act_when, running
from rotator.runner.context import AskForHelp, RunContext, RunTarget, ShouldStop
from rotator.runner.control import PAUSE, LiveControl, pause_signals
from rotator.runner.engine import MAX_FAILED_ROWS
from rotator.runner.gate import Gate
from rotator.runner.locks import LockWatch, lock_holders_named
from rotator.runner.measuring import HorizonWatch, Measuring
from rotator.runner.pacing import Pacing
from rotator.runner.preflight import check, examine, read_target, terms_of
from rotator.runner.reindex import Reindexing
from rotator.runner.retry import OutageBudget
from rotator.runner.session import Session, figures_of
from rotator.runner.stop import StopSignal
from rotator.runner.throttles import Throttles
from rotator.runner.vacuum import Vacuuming
from rotator.runner.verification import Verifier, unverified
from rotator.stats import Stats

HEARTBEAT_SECONDS: Final = 1.0
TICK_SECONDS: Final = 1.0
# The longest time of a commit that waits for a synchronous standby.
LATE_BEAT_SECONDS: Final = 5.0
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
        """Prepare a run; to be called in the running loop.

        Args:
            server: The server of the target.
            target: The target.
            options: The options of the run.
            observer: Is called with each event.
            on_commit: Is awaited after each commit of rows; None without receivers.
            ask_for_help: Asks Celery workers to rewrite the ranges; None if this process rewrites them.
            should_stop: Returns whether to drain, in addition to signals; None for signals only.
        """
        self._observer = observer
        self._should_stop = should_stop
        self._stats = Stats()
        self._stop_signal = StopSignal(self._notify)
        self._gate = Gate(concurrency=options.concurrency, rows=options.batch, notify=self._notify)
        pacing = Pacing(server, self._gate, options.pace, self._notify)
        self._live = LiveControl(
            self._gate,
            pacing,
            options,
            self._notify,
            cancel=partial(self._stop_signal.request, StopReason.CANCEL),
        )
        self._context = RunContext(
            server=server,
            target=target,
            options=options,
            owner=this_process(),
            stop_signal=self._stop_signal,
            gate=self._gate,
            pacing=pacing,
            stats=self._stats,
            notify=self._notify,
            on_commit=on_commit,
            ask_for_help=ask_for_help,
        )
        self._outage = OutageBudget(seconds=options.outage_budget_seconds)
        self._acquired: Acquired | None = None
        self._table: TargetTable | None = None
        self._throttles = Throttles(options, target.throttles)
        self._horizon = HorizonWatch(self._notify)
        self._measuring = Measuring(self._context, self._throttles, self._horizon)
        self._vacuuming = Vacuuming(self._context)
        self._reindexing = Reindexing(self._context)
        self._lock_watch = LockWatch(self._notify, count_commits=pacing.count_commits)
        self._findings: Findings | None = None
        self._is_completed = False
        # Until the first heartbeat of this run, the row has the rejected keys of an earlier one.
        self._stored_rejected: tuple[tuple[Key, str], ...] | None = None
        self._has_ledger = options.prove
        self._server_name = ""
        self._beat_at = 0.0

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
        self._findings = findings
        with self._signals():
            others = [
                asyncio.create_task(self._stop_in_time(), name="rotator --stop-after"),
                asyncio.create_task(self._stop_when_due(), name="rotator watch for a stop"),
                asyncio.create_task(self._tick_through_outages(), name="rotator outage ticks"),
            ]
            work = asyncio.create_task(self._through_outages(), name="rotator run")
            try:
                with self._stop_signal.aborting(work):
                    stopped = await work
            except asyncio.CancelledError:
                if not self._stop_signal.aborted:
                    await self._record("interrupted", stop_reason=StopReason.CANCELLED)
                    raise
                if self._is_completed:
                    if self._has_ledger and self._stats.verification is None:
                        self._notify_unverified("It was cancelled.")
                    stopped = await self._leave_completed()
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
        self._findings = findings
        async with connected(self._context.server) as control:
            await check_standbys(control)
            async with lock_holders_named(self._context.server, self._notify):
                table = await self._check(control)
            self._acquired = await acquire(control, table, self._context, self._findings)
        await self._record("queued")
        return self._acquired.lease.rotation

    async def reindex(self, rotation: int) -> tuple[str, ...]:
        """Rebuild the indexes that a completed rotation has left; return the statements for the rest.

        Raises:
            RotatorError: The server is unreachable, or the target cannot be rotated.
        """
        with self._signals():
            async with connected(self._context.server) as control:
                table = await check(control, self._context.target, self._context.options)
                await self._reindexing.run(table, rotation)
                return await self._reindexing.read_statements(control, table, rotation)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if not self._context.options.listens_to_signals:
            yield
            return
        with self._stop_signal.signals(), pause_signals(self._gate):
            yield

    async def _stop_in_time(self) -> None:
        seconds = self._context.options.stop_after_seconds
        if seconds is not None:
            await asyncio.sleep(seconds)
            self._stop_signal.request(StopReason.STOP_AFTER)

    async def _stop_when_due(self) -> None:
        if self._should_stop is not None:
            await act_when(self._should_stop, lambda: self._stop_signal.request(StopReason.WORKER_SHUTDOWN))

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
                    await check_standbys(control)
                    async with lock_holders_named(self._context.server, self._notify):
                        self._table = self._table or await self._check(control)
                        if self._acquired is None:
                            acquiring = acquire(control, self._table, self._context, self._findings)
                        else:
                            acquiring = reacquire(control, self._acquired, self._table, self._context)
                        self._acquired = await acquiring
                    # A run without --prove resumes a rotation with it.
                    ledger = await find_ledger(control, self._acquired.lease.rotation)
                    self._has_ledger = self._has_ledger or ledger is not None
                    status = await self._work(control, self._table, self._acquired)
            except ServerLostError as lost:
                if self._acquired is None:
                    raise
                if not await self._wait_before_reconnect(lost):
                    is_requested = self._stop_signal.drain.is_set()
                    return await (self._leave("interrupted") if is_requested else self._give_up(lost))
            except RotatorError as error:
                return await self._give_up(error)
            else:
                if status == "completed":
                    self._is_completed = True
                    # All workers have left, so the statistics contain their work.
                    await self._vacuuming.run_final(self._table)
                    if self._context.options.reindex:
                        await self._reindexing.run(self._table, self._acquired.lease.rotation)
                    await self._verify(self._table, self._acquired.lease.rotation)
                    return await self._leave_completed()
                return await self._leave(status)

    async def _check(self, control: AsyncConnection) -> TargetTable:
        """Refuse what cannot be rotated, before anything is changed, and report what is risky."""
        table = await check(control, self._context.target, self._context.options)
        if self._context.ask_for_help is None:
            await self._context.pacing.prepare(control)
        if showing := await settings_that_show_values(control):
            self._notify(ServerLogShowsValues(settings=showing))
        self._server_name = await name_server(control)
        self._stats.storage_before = await read_storage(control, table)
        await self._vacuuming.prepare(control, table)
        target, options = self._context.target, self._context.options
        found = await rotations.find_unfinished(control, target.label, table.found_name)
        resumed = None if options.restart else found
        # The generator of a resumed rotation was tried before.
        if target.selection.generator and (
            resumed is None or Selection.from_json(resumed.selection) != target.selection
        ):
            await check_values(control, RangeUpdate(table, target.source, options.limits))
        if options.preflight:
            await self._preflight(control, table, is_new=resumed is None)
        return table

    async def _preflight(self, control: AsyncConnection, table: TargetTable, *, is_new: bool) -> None:
        """Report the findings about a new rotation; a resumed one was examined before."""
        target, options = self._context.target, self._context.options
        if is_new:
            if not options.restart:
                # Acquiring the rotation checks this too, but only after the report.
                terms = terms_of(table, target, options, await read_identity(control, table))
                await rotations.check_repetition(control, terms, after=options.after)
            self._findings = await examine(control, table, self._context.server, target, options)
            self._notify(Preflighted(findings=self._findings))
        if self._stop_signal.drain.is_set():
            raise StoppedBeforeStartError(self._stop_signal.signal)

    async def _work(self, control: AsyncConnection, table: TargetTable, acquired: Acquired) -> EndStatus:
        if acquired.is_completed:
            self._notify_outage_ended(await rotations.read_state(control, acquired.lease))
            return "completed"
        server = self._context.server
        # Where Celery workers rewrite the ranges, this process only rotates older rows.
        concurrency = 1 if self._context.ask_for_help else self._context.options.concurrency
        # One attempt is made even if little of the budget is left.
        seconds = min(OPEN_SECONDS, max(MIN_OPEN_SECONDS, self._outage.left_seconds))
        async with (
            connected(server) as connection,
            pooled(server, concurrency, seconds=seconds) as pool,
            running(self._watch_commits(), "rotator watch of commits"),
        ):
            session_work = Session(connection, pool, table, acquired, self._context)
            while True:
                with unwrap_group():
                    async with (
                        asyncio.TaskGroup() as tasks,
                        # Celery workers keep the pace themselves.
                        nullcontext() if self._context.ask_for_help else self._context.pacing.running(),
                    ):
                        heart = tasks.create_task(self._beat(control, acquired), name="rotator heartbeat")
                        owned = await session_work.read_state()
                        self._notify_outage_ended(owned)
                        if self._stats.started is None:
                            self._notify(session_work.start_event(owned))
                        # A pause survives the end of a process: it applies before the first range.
                        await self._beat_once(control, acquired)
                        await self._throttles.look(control, owned.lease.rotation, self._gate)
                        others = self._start_others(tasks, control, table, owned)
                        status = await session_work.work(owned)
                        for task in (heart, *others):
                            task.cancel()
                # The heartbeat has ended: it would report a completed rotation as lost.
                if status != "completed" or await session_work.complete(owned):
                    # No range follows, and time is no longer throttled.
                    for source in self._gate.holds:
                        self._gate.release(source, slowly=False)
                    return status

    def _start_others(
        self, tasks: asyncio.TaskGroup, control: AsyncConnection, table: TargetTable, owned: RotationState
    ) -> list[asyncio.Task[None]]:
        """Start what works next to the workers until it is cancelled."""
        works = {
            "throttles": self._throttles.watch(control, owned.lease.rotation, self._gate),
            "watch of the xmin horizon": self._horizon.watch(control),
            "watch for lock holders": self._lock_watch.watch(control),
            "VACUUM": self._vacuuming.run_during_rotation(control, table, rows_total=owned.rows_total),
        }
        return [tasks.create_task(work, name=f"rotator {name}") for name, work in works.items()]

    async def _beat(self, control: AsyncConnection, acquired: Acquired) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self._beat_once(control, acquired)
            self._notify(Tick())

    async def _watch_commits(self) -> None:
        """Notice within seconds that each commit waits for a synchronous standby.

        Raises:
            ServerLostError: Commits wait for a synchronous standby.
        """
        self._beat_at = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if time.monotonic() - self._beat_at < LATE_BEAT_SECONDS:
                continue
            self._notify(Tick())
            reason = ""
            # The heartbeat itself notices the loss of a connection.
            with suppress(RotatorError):
                async with connected(self._context.server) as connection:
                    reason = await missing_standbys(connection, counts_waits=False)
            if reason:
                raise ServerLostError(reason)

    async def _beat_once(self, control: AsyncConnection, acquired: Acquired) -> None:
        """Apply what users request, and write a heartbeat that says so."""
        self._live.apply(await read_requested(control, acquired.lease.rotation))
        # Helpers read a pause from the control row.
        held = [hold for source, hold in self._gate.holds.items() if source != PAUSE]
        rejected = tuple(self._stats.rejected_keys[:MAX_FAILED_ROWS])
        beat_at = await rotations.beat(
            control,
            acquired.lease,
            OwnerReport(
                rows_done=self._stats.rows_done,
                figures=figures_of(self._stats),
                applied_revision=self._live.revision,
                throttle_reason="; ".join(hold.reason for hold in held),
                held_seconds=time.monotonic() - held[0].since if held else 0.0,
                rejected_keys=None if rejected == self._stored_rejected else rejected,
            ),
        )
        self._stored_rejected = rejected
        self._beat_at = time.monotonic()
        self._throttles.note_beat(beat_at)
        await self._measuring.record_if_due(control, acquired.lease.rotation)

    def _notify_outage_ended(self, owned: RotationState) -> None:
        if self._outage.is_unreachable:
            seconds = self._outage.reached()
            self._notify(OutageEnded(seconds=seconds, rows_done=owned.rows_done, late_rows=owned.late_rows))

    async def _leave_completed(self) -> RotationStopped:
        """Record the time of a completed rotation, and read the figures of its table."""
        self._stats.stop_clock()
        with suppress(RotatorError, TimeoutError):
            async with asyncio.timeout(RECORD_SECONDS), connected(self._context.server) as connection:
                if self._acquired is not None and self._table is not None:
                    await rotations.record_figures(
                        connection, self._acquired.lease, figures=figures_of(self._stats)
                    )
                    await self._measuring.log_vacuums(connection, self._acquired.lease.rotation)
                    self._stats.storage = await read_storage(connection, self._table)
                    self._stats.reindex_statements = await self._reindexing.read_statements(
                        connection, self._table, self._acquired.lease.rotation
                    )
                    if self._context.target.condition is not None:
                        self._stats.table_rows = await count_table(
                            connection, self._table, seconds=COUNT_SECONDS
                        )
        return self._stopped("completed")

    async def _verify(self, table: TargetTable, rotation: int) -> None:
        """Verify a completed rotation that has a ledger; an error is part of the result."""
        if not self._has_ledger:
            return
        try:
            server = self._context.server
            async with connected(server) as connection, lock_holders_named(server, self._notify):
                if await find_ledger(connection, rotation) is None:
                    self._notify_unverified("The ledger was dropped.")
                else:
                    await Verifier(connection, table, rotation, self._context).verify()
        except RotatorError as error:
            self._notify_unverified(str(error))

    def _notify_unverified(self, error: str) -> None:
        rotation = self._acquired.lease.rotation if self._acquired else 0
        self._notify(unverified(rotation, self._context.target.label, error))

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
            table = await read_target(connection, context.target)
            return await Verifier(connection, table, rotation, context).verify(repairs=repairs)

    async def _wait_before_reconnect(self, lost: ServerLostError) -> bool:
        """Wait before the next attempt; False if the budget is used up or a stop was requested."""
        is_new = not self._outage.is_unreachable
        self._outage.lost()
        if is_new:
            self._notify(OutageStarted(reason=str(lost), budget_seconds=self._outage.left_seconds))
        if self._outage.left_seconds <= 0:
            return False
        return not await self._stop_signal.wait(self._outage.delay_seconds())

    async def _give_up(self, error: RotatorError) -> RotationStopped:
        if self._acquired is None:
            raise error
        superseded = isinstance(error, SupersededError)
        status: EndStatus = "interrupted" if isinstance(error, ServerLostError) or superseded else "failed"
        if isinstance(error, ServerLostError) and self._should_stop is not None:
            # Another Celery worker resumes it.
            status = "queued"
        await self._record(status, error=str(error))
        if self._stats.started is None:
            raise error
        return self._stopped(status, error=str(error), superseded=superseded)

    async def _leave(self, status: EndStatus) -> RotationStopped:
        """Record the end of a run that was asked to stop, or whose rows were rejected."""
        reason = self._stop_signal.reason
        if reason is StopReason.WORKER_SHUTDOWN:
            status = "queued"
        error = "" if reason else _REJECTED_ROWS
        await self._record(status, stop_reason=reason, error=error)
        if self._stats.started is None:
            raise StoppedBeforeStartError(self._stop_signal.signal)
        return self._stopped(status, error=error)

    async def _record(
        self, status: EndStatus, *, stop_reason: StopReason | None = None, error: str = ""
    ) -> None:
        """Record the end of the run in the database, if that is possible now."""
        if self._acquired is None:
            return
        self._stats.stop_clock()
        # The account of the run is more important than an error here.
        with suppress(RotatorError, TimeoutError):
            async with asyncio.timeout(RECORD_SECONDS), connected(self._context.server) as connection:
                self._stats.rows_done = await rotations.stop(
                    connection,
                    self._acquired.lease,
                    status=status,
                    stop_reason=stop_reason,
                    error=error,
                    figures=figures_of(self._stats),
                    rejected_keys=self._stats.rejected_keys,
                )
                if self._table is not None:
                    self._stats.storage = await read_storage(connection, self._table)
                    owned = await rotations.read_state(connection, self._acquired.lease)
                    self._stats.late_rows = owned.late_rows
                    if owned.bound is not None:
                        left = await gaps(connection, self._table, owned.lease.rotation, owned.bound)
                        self._stats.spans = intervals_between(left, owned.bound)

    def _stopped(self, status: EndStatus, *, error: str = "", superseded: bool = False) -> RotationStopped:
        owner = self._context.owner
        stop_reason = None if status == "completed" or error else self._stop_signal.reason
        return self._stats.stopped(
            status,
            stop_reason=stop_reason,
            cancelled_by=self._stop_signal.by if stop_reason is StopReason.CANCEL else "",
            error=error,
            superseded=superseded,
            run=RunFacts(
                started_at=self._stats.started_at,
                ended_at=datetime.now(UTC),
                user=owner.user,
                host=owner.host,
                server_name=self._server_name,
                table_name=self._table.found_name if self._table else "",
                selection=self._context.target.selection,
            ),
        )

    def _notify(self, event: Event) -> None:
        self._stats.take(event)
        self._lock_watch.take(event)
        self._measuring.take(event)
        if isinstance(event, RangeCompleted | LateRowsRotated) or (
            isinstance(event, WorkersProgressed) and event.ranges
        ):
            self._outage.refill()
        self._observer(event)
