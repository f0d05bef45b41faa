"""What the events add up to; how it looks is for others to say."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rotator.events import (
    ConfirmationStarted,
    DrainStarted,
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
    RowFailed,
    VacuumStarted,
)
from rotator.progress.rate import RecentRate

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
