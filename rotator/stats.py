"""The statistics of a run, computed from its events."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from rotator.events import (
    ConfirmationStarted,
    DrainStarted,
    EndStatus,
    Event,
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    OutageEnded,
    OutageStarted,
    RangeCompleted,
    RangeDeferred,
    RangeRetried,
    RotationStarted,
    RotationStopped,
    RowFailed,
    RowsConfirmed,
    RunFacts,
    StopReason,
    Storage,
    Vacuumed,
    VacuumStarted,
)
from rotator.ranges import Key, KeyInterval

WINDOW_SECONDS = 20.0
MIN_SAMPLES = 8
WARM_UP_SECONDS = 2.0
STALL_SECONDS = 10.0
HELD_UP_SECONDS = 1.0
MERGE_SECONDS = 0.25


@dataclass(slots=True)
class _Sample:
    at: float
    rows: int
    seconds: float


class RecentRate:
    """The rate of the last ``WINDOW_SECONDS``, steady although rows come a range at a time.

    Two things keep it from jumping: the window stretches until it holds ``MIN_SAMPLES``, so that a few
    slow ranges are not measured by which of them happen to be inside; and silence counts only once it is
    longer than a range takes, because until then it is merely the time between two ranges.

    Every ``now`` is a monotonic clock's value in seconds and never smaller than the one before.
    """

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def restart(self) -> None:
        """Forget everything, as after an outage: what was measured before says nothing any more."""
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
        self._forget(now)

    def rows_per_second(self, now: float) -> float | None:
        """Return the recent rate; None until ``WARM_UP_SECONDS`` have been seen."""
        self._forget(now)
        if not self._samples:
            return None
        first, *counted = self._samples
        since = first.at
        if len(counted) >= MIN_SAMPLES and counted[0].at > now - WINDOW_SECONDS:
            # Only a silence can lie between `first` and the window; it is over and no longer recent.
            since = max(since, now - WINDOW_SECONDS)
        elapsed = max(counted[-1].at, now - self._patience()) - since
        if elapsed < WARM_UP_SECONDS:
            return None
        return sum(sample.rows for sample in counted) / elapsed

    def eta_seconds(self, rows_left: int, now: float) -> float | None:
        """Return the seconds until ``rows_left`` are done; None while it is unknown or nothing completes."""
        if rows_left <= 0:
            return 0.0
        rate = self.rows_per_second(now)
        if not rate:
            return None
        silent_seconds, patience_seconds = now - self._samples[-1].at, 2 * self._patience()
        # Where nothing was completed for longer than all the rest would take, something holds it up.
        is_held_up = silent_seconds > max(HELD_UP_SECONDS, patience_seconds, rows_left / rate)
        if is_held_up or silent_seconds > max(STALL_SECONDS, patience_seconds):
            return None
        return rows_left / rate

    def _forget(self, now: float) -> None:
        # The oldest sample's rows are not counted: it only says since when the others were done.
        while len(self._samples) > MIN_SAMPLES + 1 and self._samples[1].at <= now - WINDOW_SECONDS:
            self._samples.popleft()

    def _patience(self) -> float:
        return min(WINDOW_SECONDS, max(sample.seconds for sample in self._samples))


LOCK_SECONDS = 10.0

State: TypeAlias = Literal[
    "rotating", "outage", "draining", "late_commits", "finishing", "confirming", "vacuuming"
]


@dataclass(slots=True, kw_only=True)
class Tally:
    """The figures of a run so far. Each ``now`` is a monotonic clock's value in seconds.

    Attributes:
        rotation: The rotation's id; None until it has started.
        target: The target as the user writes it.
        rows_total: Rows up to the frozen upper bound.
        rows_total_is_exact: False where the total is an estimate.
        rows_done: Rows done in all runs, as told; may be more than the total.
        failed_rows: Rows that could not be rotated.
        deferrals: How often a range went to the back of the queue.
        retries: How often a range was tried again.
        retry_reasons: Why ranges were retried, each reason once.
        confirming: Whether the table is being read to see who wrote each row last.
        outage_since: When the server became unreachable; None while it is reachable.
        outage_budget_seconds: How long the run waits for it from then on.
        vacuuming: Whether all is done but for the last VACUUM.
        draining: Whether no more ranges are planned.
        holders: The transactions that are waited for.
    """

    rotation: int | None = None
    target: str = ""
    rows_total: int = 0
    rows_total_is_exact: bool = True
    rows_done: int = 0
    failed_rows: int = 0
    deferrals: int = 0
    retries: int = 0
    retry_reasons: set[str] = field(default_factory=set)
    outage_since: float | None = None
    confirming: bool = False
    outage_budget_seconds: float = 0.0
    vacuuming: bool = False
    draining: bool = False
    holders: tuple[str, ...] = ()
    _deferred_at: float | None = None
    _rate: RecentRate = field(default_factory=RecentRate)

    @property
    def rows_shown(self) -> int:
        """Rows done, never past an exact total: rows can come while the rotation runs."""
        return min(self.rows_done, self.rows_total) if self.rows_total_is_exact else self.rows_done

    @property
    def rows_capped(self) -> int:
        """Rows done that count towards the total; an estimated total is never reached."""
        most = self.rows_total if self.rows_total_is_exact else self.rows_total * 99 // 100
        return min(self.rows_done, most)

    @property
    def percent(self) -> int:
        """Whole percent done, at most 100; of no rows at all everything is done, unless that is a guess."""
        if not self.rows_total:
            return 100 if self.rows_total_is_exact else 0
        return 100 * self.rows_capped // self.rows_total

    @property
    def state(self) -> State:
        """What the run is busy with."""
        if self.outage_since is not None:
            return "outage"
        if self.vacuuming:
            return "vacuuming"
        if self.holders:
            return "late_commits"
        if self.draining or self.confirming:
            return "draining" if self.draining else "confirming"
        if self.rows_total_is_exact and self.rows_done >= self.rows_total:
            return "finishing"
        return "rotating"

    def outage_left_seconds(self, now: float) -> float:
        """Return how much longer the run waits for an unreachable server."""
        since = now if self.outage_since is None else self.outage_since
        return max(0.0, self.outage_budget_seconds - (now - since))

    def rows_per_second(self, now: float) -> float | None:
        """Return the recent rate; None while it is unknown or the server is away."""
        return None if self.outage_since is not None else self._rate.rows_per_second(now)

    def eta_seconds(self, now: float) -> float | None:
        """Return the seconds until every row is done; None unless rows are being done towards it."""
        rows_left = self.rows_total - self.rows_done
        guess_is_used_up = rows_left <= 0 and not self.rows_total_is_exact
        if self.state not in ("rotating", "finishing") or guess_is_used_up:
            return None
        eta_seconds = self._rate.eta_seconds(rows_left, now)
        deferred_at = self._deferred_at
        if eta_seconds is not None and deferred_at is not None and now - deferred_at < LOCK_SECONDS:
            # What is left may be what waits for a lock.
            return eta_seconds if eta_seconds >= LOCK_SECONDS else None
        return eta_seconds

    def take(self, event: Event, now: float) -> None:
        """Add what one event tells."""
        self._add_rows(event, now)
        self._change_state(event, now)

    def _add_rows(self, event: Event, now: float) -> None:
        match event:
            case RotationStarted():
                self.rotation, self.target = event.rotation, event.target
                self.rows_total, self.rows_total_is_exact = event.rows_total, event.rows_total_is_exact
                self.rows_done = event.rows_done
            case RangeCompleted():
                self.rows_done += event.rows
                self._rate.add(event.rows, now=now, seconds=event.seconds)
            case LateRowsRotated():
                self.rows_done += event.rows
            case OutageEnded():
                self.rows_done = event.rows_done
                # They are tried again.
                self.failed_rows = 0
            case RowFailed():
                self.failed_rows += 1
            case RangeDeferred():
                self.deferrals += 1
                self._deferred_at = now
            case RangeRetried():
                self.retries += 1
                self.retry_reasons.add(event.reason)
            case _:
                pass

    def _change_state(self, event: Event, now: float) -> None:
        match event:
            case RotationStarted() | RangeCompleted() | LateRowsRotated() | LateCommitsOver():
                self.holders = ()
            case OutageStarted():
                self.outage_since, self.outage_budget_seconds = now, event.budget_seconds
            case OutageEnded():
                self.outage_since = None
                self.confirming = False
                self._rate.restart()
            case LateCommitsAwaited():
                self.holders = event.holders
            case ConfirmationStarted():
                self.confirming = True
            case VacuumStarted():
                self.vacuuming = True
            case DrainStarted():
                self.draining = True
            case _:
                pass


@dataclass(slots=True, kw_only=True)
class Figures:
    """The figures of one run.

    Attributes:
        clock: Returns monotonic seconds.
        rows_done: Rows done in all runs, as far as this process knows.
        failed_keys: Keys of rows that could not be rotated, each with the reason.
        storage_before: What the table took when the run began, once that is known.
        storage: What it takes at the end, once that is known.
        unconfirmed_rows: Rows that others wrote last, once that is known.
        started_at: The time of the run's start.
        spans: The spans of keys that are written, once they are known.
        table_rows: The rows of the whole table and whether they are counted, once that is known.
    """

    clock: Callable[[], float] = time.monotonic
    rows_done: int = 0
    failed_keys: list[tuple[Key, str]] = field(default_factory=list)
    storage_before: Storage | None = None
    storage: Storage | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    spans: tuple[KeyInterval, ...] = ()
    table_rows: tuple[int | None, bool] = (None, True)
    _started: RotationStarted | None = None
    unconfirmed_rows: int | None = None
    _late_rows: int = 0
    _ranges: int = 0
    _retries: int = 0
    _outage_seconds: float = 0.0
    _vacuums: int = 0
    _vacuum_seconds: float = 0.0
    _began_at: float = 0.0
    _first_range_at: float | None = None
    _last_range_at: float = 0.0

    def __post_init__(self) -> None:
        """Start the clock."""
        self._began_at = self.clock()

    @property
    def has_started(self) -> bool:
        """Whether the rotation has been told to have started."""
        return self._started is not None

    @property
    def rows_this_run(self) -> int:
        """Rows that this run has rotated, as far as it knows."""
        return self.rows_done - self._started.rows_done if self._started else 0

    @property
    def seconds(self) -> float:
        """What this run has taken so far."""
        return self.clock() - self._began_at

    @property
    def active_seconds(self) -> float:
        """What all runs have taken so far."""
        return self.seconds + (self._started.seconds_before if self._started else 0.0)

    def take(self, event: Event) -> None:
        """Add what one event tells."""
        match event:
            case RotationStarted():
                self._started = event
                self.rows_done = event.rows_done
            case RangeCompleted():
                self.rows_done += event.rows
                self._ranges += event.ranges
                self._last_range_at = self.clock()
                if self._first_range_at is None:
                    self._first_range_at = self._last_range_at - event.seconds
            case LateRowsRotated():
                self.rows_done += event.rows
                self._late_rows += event.rows
            case RangeDeferred() | RangeRetried():
                self._retries += 1
            case OutageEnded():
                self.rows_done = event.rows_done
                self._outage_seconds += event.seconds
                # They are in gaps that are read anew: they will fail again, or be rotated.
                self.failed_keys.clear()
            case RowsConfirmed():
                self.unconfirmed_rows = event.unconfirmed
            case Vacuumed():
                self._vacuums += 1
                self._vacuum_seconds += event.seconds
            case RowFailed():
                self.failed_keys.append((event.key, event.reason))
            case _:
                pass

    def stopped(
        self,
        status: EndStatus,
        *,
        stop_reason: StopReason | None,
        error: str,
        late_rows_before: int,
        superseded: bool,
        run: RunFacts,
    ) -> RotationStopped:
        """Return the account of a run that has started."""
        started = self._started
        if started is None:
            raise AssertionError("a run that never started has nothing to account for")
        writing_seconds = self._last_range_at - (self._first_range_at or 0.0)
        rows_this_run = max(0, self.rows_this_run)
        return RotationStopped(
            rotation=started.rotation,
            target=started.target,
            status=status,
            rows=self.rows_done,
            rows_total=started.rows_total,
            rows_total_is_exact=started.rows_total_is_exact,
            rows_this_run=rows_this_run,
            late_rows=late_rows_before + self._late_rows,
            ranges=self._ranges,
            seconds=self.seconds,
            seconds_total=self.active_seconds,
            rows_per_second=rows_this_run / writing_seconds if writing_seconds > 0 else 0.0,
            retries=self._retries,
            outage_seconds=self._outage_seconds,
            peak_memory_bytes=peak_memory_bytes(),
            concurrency=started.concurrency,
            batch=started.batch,
            resumed=started.resumed,
            unconfirmed_rows=self.unconfirmed_rows if status == "completed" else None,
            failed_keys=tuple(self.failed_keys),
            storage_before=self.storage_before,
            storage=self.storage,
            vacuums=self._vacuums,
            vacuum_seconds=self._vacuum_seconds,
            stop_reason=stop_reason,
            error=error,
            superseded=superseded,
            run=run,
            spans=self.spans,
            table_rows=self.table_rows[0],
            table_rows_is_exact=self.table_rows[1],
        )


def peak_memory_bytes() -> int:
    """Return the high-water mark of this process's resident memory; 0 where the system does not say."""
    # Not getrusage: a child inherits its parent's mark there.
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
    if sys.platform == "darwin":
        import resource  # noqa: PLC0415 - not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0
