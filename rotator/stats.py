"""The figures of a run, counted from its events."""

import re
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias, assert_never

from rotator import events
from rotator.ranges import Key, KeyInterval

WINDOW_SECONDS: Final = 20.0
MIN_SAMPLES: Final = 8
WARM_UP_SECONDS: Final = 2.0
STALL_SECONDS: Final = 10.0
HELD_UP_SECONDS: Final = 1.0
MERGE_SECONDS: Final = 0.25
LOCK_SECONDS: Final = 10.0


@dataclass(slots=True)
class _Sample:
    at: float
    rows: int
    seconds: float


class RecentRate:
    """The rate of the last ``WINDOW_SECONDS``, steady although rows are counted a range at a time.

    Two rules keep it steady. The window grows until it contains ``MIN_SAMPLES``, so that a few slow ranges
    do not dominate it. The time since the last range counts only once it is longer than a range takes.

    Each ``now`` is a monotonic clock's value in seconds and never smaller than the one before.
    """

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def restart(self) -> None:
        """Forget all samples, as after an outage."""
        self._samples.clear()

    def add(self, rows: int, *, now: float, seconds: float) -> None:
        """Count a range of ``rows`` that took ``seconds`` and was committed just now."""
        if not self._samples:
            self._samples.append(_Sample(now - seconds, 0, 0.0))
        if len(self._samples) > 1 and now - self._samples[-2].at < MERGE_SECONDS:
            last = self._samples[-1]
            last.at = now
            last.rows += rows
            last.seconds = max(last.seconds, seconds)
        else:
            self._samples.append(_Sample(now, rows, seconds))
        self._drop_old(now)

    def rows_per_second(self, now: float) -> float | None:
        """Return the recent rate; None for the first ``WARM_UP_SECONDS``."""
        self._drop_old(now)
        if not self._samples:
            return None
        first, *counted = self._samples
        since = first.at
        if len(counted) >= MIN_SAMPLES and counted[0].at > now - WINDOW_SECONDS:
            # No range was completed between `first` and the window: that pause is not recent.
            since = max(since, now - WINDOW_SECONDS)
        elapsed = max(counted[-1].at, now - self._range_seconds()) - since
        if elapsed < WARM_UP_SECONDS:
            return None
        return sum(sample.rows for sample in counted) / elapsed

    def eta_seconds(self, rows_left: int, now: float, *, is_exact: bool = True) -> float | None:
        """Return the seconds until ``rows_left`` are done; None while unknown or no range completes.

        It is also unknown once an estimate of the rows is exceeded; ``is_exact`` is false for an estimate.
        """
        if rows_left <= 0:
            return 0.0 if is_exact else None
        rate = self.rows_per_second(now)
        if not rate:
            return None
        silent_seconds, range_seconds = now - self._samples[-1].at, 2 * self._range_seconds()
        # No range was completed for longer than all remaining rows take: something blocks them.
        is_held_up = silent_seconds > max(HELD_UP_SECONDS, range_seconds, rows_left / rate)
        if is_held_up or silent_seconds > max(STALL_SECONDS, range_seconds):
            return None
        return rows_left / rate

    def _drop_old(self, now: float) -> None:
        # Only the time of the oldest sample counts, not its rows.
        while len(self._samples) > MIN_SAMPLES + 1 and self._samples[1].at <= now - WINDOW_SECONDS:
            self._samples.popleft()

    def _range_seconds(self) -> float:
        """Return the longest time that a recent range took."""
        return min(WINDOW_SECONDS, max(sample.seconds for sample in self._samples))


def percent_of(rows: int, total: int, *, is_exact: bool) -> int:
    """Return the percentage of rows done, rounded down, and at most 99 of an estimated total."""
    if not total:
        return 100 if is_exact else 0
    return 100 * _capped(rows, total, is_exact=is_exact) // total


def _capped(rows: int, total: int, *, is_exact: bool) -> int:
    return min(rows, total if is_exact else total * 99 // 100)


State: TypeAlias = Literal[
    "rotating",
    "outage",
    "throttled",
    "draining",
    "late_commits",
    "finishing",
    "confirming",
    "vacuuming",
    "reindexing",
    "loading",
    "verifying",
]
_AFTER_COMPLETION: Final[tuple[State, ...]] = ("vacuuming", "reindexing", "verifying")


@dataclass(slots=True, kw_only=True)
class Stats:
    """The figures of one run.

    The run and each of its observers have one. All of them take the same events, so they agree. Figures with
    the same name as in :class:`rotator.events.RotationStopped` have the same meaning, for the run so far.

    Attributes:
        clock: Returns monotonic seconds.
        rows_done: Rows done in all runs; can exceed the total.
        outage_since: The start of the current outage; None while the server is reachable.
        outage_seconds: The time of all outages before.
        pace: The present pace; None before it has changed.
        throttles: The reasons of the throttles that hold the run now, by their names.
        holders: The transactions that the run waits for.
        lock_holders: The sessions that have blocked ranges for some seconds.
        loaded_rows: The rows whose old values this run has entered into the ledger.
        table_rows: The rows of the whole table and whether they are counted; None where unknown.
    """

    clock: Callable[[], float] = time.monotonic
    started: events.RotationStarted | None = None
    rows_done: int = 0
    late_rows: int = 0
    ranges: int = 0
    deferrals: int = 0
    retries: int = 0
    retry_reasons: set[str] = field(default_factory=set)
    rejected_keys: list[tuple[Key, str]] = field(default_factory=list)
    unconfirmed_rows: int | None = None
    outage_since: float | None = None
    outage_budget_seconds: float = 0.0
    outage_seconds: float = 0.0
    vacuums: int = 0
    vacuum_seconds: float = 0.0
    pace: events.PaceChanged | None = None
    throttles: dict[str, str] = field(default_factory=dict)
    holders: tuple[str, ...] = ()
    lock_holders: tuple[str, ...] = ()
    loaded_rows: int = 0
    verification: events.Verified | None = None
    leaked: events.LeakedValuesFound | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    storage_before: events.Storage | None = None
    storage: events.Storage | None = None
    spans: tuple[KeyInterval, ...] = ()
    analyze_statement: str = ""
    reindex_statements: tuple[str, ...] = ()
    table_rows: tuple[int | None, bool] = (None, True)
    _phase: State = "rotating"
    _is_draining: bool = False
    _rate: RecentRate = field(default_factory=RecentRate)
    _limited_seconds: float = 0.0
    _pace_at: float = 0.0
    _throttled_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _throttled_since: dict[str, float] = field(default_factory=dict)
    _held_since: float | None = None
    _held_seconds: float = 0.0
    _deferred_at: float | None = None
    _began_at: float = field(init=False)
    _ended_at: float | None = None
    _first_range_at: float | None = None
    _last_range_at: float = 0.0

    def __post_init__(self) -> None:
        self._began_at = self.clock()

    def take(self, event: events.Event) -> None:  # noqa: C901, PLR0912, PLR0915 - one case for each event
        """Count an event."""
        match event:
            case events.RotationStarted():
                self.started = event
                self.rows_done, self.late_rows = event.rows_done, event.late_rows
                self.holders = ()
            case events.RangeCompleted():
                self._add_ranges(1, event.rows, event.seconds)
            case events.WorkersProgressed():
                if event.deferrals:
                    self.deferrals += event.deferrals
                    self._deferred_at = self.clock()
                self.retries += event.retries
                if event.ranges:
                    self._add_ranges(event.ranges, event.rows, event.seconds)
            case events.LateRowsRotated():
                self.rows_done += event.rows
                self.late_rows += event.rows
                self.holders = ()
            case events.RangeDeferred():
                self.deferrals += 1
                self._deferred_at = self.clock()
            case events.RangeRetried():
                self.retries += 1
                self.retry_reasons.add(event.reason)
            case events.RowRejected():
                self.rejected_keys.append((event.key, event.reason))
            case events.OutageStarted():
                self.outage_since, self.outage_budget_seconds = self.clock(), event.budget_seconds
            case events.OutageEnded():
                self.rows_done, self.late_rows = event.rows_done, event.late_rows
                self.outage_since, self.outage_seconds = None, self.outage_seconds + event.seconds
                self._phase = "rotating"
                # These rows are in gaps, so they are retried.
                self.rejected_keys.clear()
                self._rate.restart()
            case events.PaceChanged():
                self._limited_seconds = self.limited_seconds
                self.pace, self._pace_at = event, self.clock()
            case events.Throttled():
                if self._held_since is None:
                    self._held_since = self.clock()
                self.throttles[event.source] = event.reason
                if event.is_new:
                    self._throttled_since[event.source] = self.clock()
            case events.ThrottleEnded():
                self.throttles.pop(event.source, None)
                self._throttled_since.pop(event.source, None)
                self._throttled_seconds[event.source] += event.seconds
                if not self.throttles and self._held_since is not None:
                    self._held_seconds += self.clock() - self._held_since
                    self._held_since = None
            case events.LockHeld():
                self.lock_holders = event.holders
            case events.LateCommitsAwaited():
                self.holders = event.holders
            case events.LateCommitsOver():
                self.holders = ()
            case events.ConfirmationStarted():
                self._phase = "confirming"
            case events.RowsConfirmed():
                self.unconfirmed_rows = event.unconfirmed
            case events.VacuumStarted():
                self._phase = "vacuuming"
            case events.Vacuumed():
                self.vacuums += 1
                self.vacuum_seconds += event.seconds
            case events.AnalyzeSkipped():
                self.analyze_statement = event.statement
            case events.ReindexStarted():
                self._phase = "reindexing"
            case events.LedgerStarted():
                self._phase, self.loaded_rows = "loading", 0
            case events.LedgerProgressed():
                self.loaded_rows += event.rows
            case events.LedgerReady():
                self._phase = "rotating"
            case events.VerificationStarted():
                self._phase = "verifying"
            case events.Verified():
                self.verification = event
            case events.LeakedValuesFound():
                self.leaked = event
            case events.DrainStarted():
                self._is_draining = True
            case events.RotationStopped():
                # The database's count, which is that of the checkpoints.
                self.rows_done, self.late_rows = event.rows, event.late_rows
            case (
                events.Preflighted()
                | events.BrokerUnreachable()
                | events.WorkersSilent()
                | events.OwnerWatched()
                | events.ServerLogShowsValues()
                | events.VacuumSkipped()
                | events.Analyzed()
                | events.IndexRebuilt()
                | events.ReindexSkipped()
                | events.ReceiverFailed()
                | events.LimitRaised()
                | events.LimitsChanged()
                | events.HorizonHeld()
                | events.GuardAdded()
                | events.VerificationProgressed()
                | events.Tick()
            ):
                pass
            case _:
                assert_never(event)

    def _add_ranges(self, ranges: int, rows: int, seconds: float) -> None:
        now = self.clock()
        self.rows_done += rows
        self.ranges += ranges
        self.holders = ()
        self._rate.add(rows, now=self._rate_clock(), seconds=seconds)
        self._last_range_at = now
        if self._first_range_at is None:
            self._first_range_at = now - seconds

    @property
    def rows_total(self) -> int:
        """Rows up to the frozen upper bound."""
        return self.started.rows_total if self.started else 0

    @property
    def rows_total_is_exact(self) -> bool:
        """False where the total is an estimate."""
        return self.started is None or self.started.rows_total_is_exact

    @property
    def rows_capped(self) -> int:
        """Rows done, at most the total, and at most 99% of an estimated one."""
        return _capped(self.rows_done, self.rows_total, is_exact=self.rows_total_is_exact)

    @property
    def percent(self) -> int:
        """The percentage of rows done."""
        return percent_of(self.rows_done, self.rows_total, is_exact=self.rows_total_is_exact)

    @property
    def state(self) -> State:
        """The current activity of the run."""
        activities: tuple[tuple[State, bool], ...] = (
            ("outage", self.outage_since is not None),
            (self._phase, self._phase in _AFTER_COMPLETION),
            ("late_commits", bool(self.holders)),
            ("draining", self._is_draining),
            ("confirming", self._phase == "confirming"),
            ("throttled", bool(self.throttles)),
            ("loading", self._phase == "loading"),
            ("finishing", self.rows_total_is_exact and self.rows_done >= self.rows_total),
        )
        return next((state for state, is_current in activities if is_current), "rotating")

    @property
    def outage_left_seconds(self) -> float | None:
        """The time until the run gives up; None while the server is reachable."""
        if self.outage_since is None:
            return None
        return max(0.0, self.outage_budget_seconds - (self.clock() - self.outage_since))

    @property
    def held_seconds(self) -> float:
        """The time in which one or more throttles have held this run until now."""
        return self._held_seconds + (0.0 if self._held_since is None else self.clock() - self._held_since)

    @property
    def limited_seconds(self) -> float:
        """The time for which the pace has applied: other sessions were at work."""
        is_limited = self.pace is not None and self.pace.is_limited
        return self._limited_seconds + (self.clock() - self._pace_at if is_limited else 0.0)

    def _rate_clock(self) -> float:
        """Return a time that stands still while the run is throttled, so that throttles are no stall."""
        return self.clock() - self.held_seconds

    @property
    def throttled_so_far(self) -> dict[str, float]:
        """The seconds that each throttle has held the run until now, by its name."""
        # A plain dict: the result of a run has it, and dataclasses.asdict() cannot copy any other.
        now, so_far = self.clock(), dict(self._throttled_seconds)
        for source, since in self._throttled_since.items():
            so_far[source] = so_far.get(source, 0.0) + now - since
        return so_far

    @property
    def rows_per_second(self) -> float | None:
        """The recent rate, without throttled time; None while unknown or the server is unreachable."""
        return None if self.outage_since is not None else self._rate.rows_per_second(self._rate_clock())

    @property
    def eta_seconds(self) -> float | None:
        """The time until every row is done; None while it is unknown or the run does not write."""
        if self.state not in ("rotating", "finishing", "throttled"):
            return None
        now, rows_left = self.clock(), self.rows_total - self.rows_done
        eta_seconds = self._rate.eta_seconds(rows_left, self._rate_clock(), is_exact=self.rows_total_is_exact)
        is_deferred = self._deferred_at is not None and now - self._deferred_at < LOCK_SECONDS
        if eta_seconds is not None and is_deferred and eta_seconds < LOCK_SECONDS:
            # The remaining rows may be the locked ones.
            return None
        return eta_seconds

    @property
    def rows_this_run(self) -> int:
        """Rows that this run has rotated."""
        return max(0, self.rows_done - self.started.rows_done) if self.started else 0

    @property
    def rows_per_second_while_writing(self) -> float:
        """The rate of this run's ranges from the start of the first to the end of the last; 0 without any."""
        if self.started is None or self._first_range_at is None:
            return 0.0
        seconds = self._last_range_at - self._first_range_at
        rows = self.rows_this_run - (self.late_rows - self.started.late_rows)
        return max(0, rows) / seconds if seconds > 0 else 0.0

    @property
    def seconds(self) -> float:
        """The time of this run until now, or until ``stop_clock()``."""
        return (self.clock() if self._ended_at is None else self._ended_at) - self._began_at

    @property
    def active_seconds(self) -> float:
        """The time of all runs."""
        return self.seconds + (self.started.seconds_before if self.started else 0.0)

    def stop_clock(self) -> None:
        """End the run's time now, so that the database and the summary have the same one."""
        if self._ended_at is None:
            self._ended_at = self.clock()

    def stopped(
        self,
        status: events.EndStatus,
        *,
        stop_reason: events.StopReason | None,
        error: str,
        superseded: bool,
        run: events.RunFacts,
        cancelled_by: str = "",
    ) -> events.RotationStopped:
        """Return the event that ends a run, which must have started."""
        started = self.started
        if started is None:
            raise AssertionError("The run has not started.")
        return events.RotationStopped(
            rotation=started.rotation,
            target=started.target,
            status=status,
            rows=self.rows_done,
            rows_total=started.rows_total,
            rows_total_is_exact=started.rows_total_is_exact,
            rows_this_run=self.rows_this_run,
            late_rows=self.late_rows,
            ranges=self.ranges,
            seconds=self.seconds,
            seconds_total=self.active_seconds,
            rows_per_second=self.rows_per_second_while_writing,
            deferrals=self.deferrals,
            retries=self.retries,
            outage_seconds=self.outage_seconds,
            peak_memory_bytes=peak_memory_bytes(),
            concurrency=started.concurrency,
            batch=started.batch,
            resumed=started.resumed,
            unconfirmed_rows=self.unconfirmed_rows if status == "completed" else None,
            rejected_keys=tuple(self.rejected_keys),
            storage_before=self.storage_before,
            storage=self.storage,
            vacuums=self.vacuums,
            vacuum_seconds=self.vacuum_seconds,
            stop_reason=stop_reason,
            error=error,
            superseded=superseded,
            run=run,
            spans=self.spans,
            table_rows=self.table_rows[0],
            table_rows_is_exact=self.table_rows[1],
            analyze_statement=self.analyze_statement,
            reindex_statements=self.reindex_statements,
            throttled_seconds=self.throttled_so_far,
            cancelled_by=cancelled_by,
            pace=started.pace if self.pace is None else self.pace.pace,
            limited_seconds=self.limited_seconds,
            verification=self.verification,
            leaked=self.leaked,
        )


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process; 0 where the system does not report it."""
    # Not getrusage: a child inherits its parent's peak there.
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
    if sys.platform == "darwin":
        import resource  # noqa: PLC0415 - not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0
