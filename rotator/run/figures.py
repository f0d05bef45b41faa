"""What a run has done so far, and the account of it at the end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rotator.events import (
    EndStatus,
    Event,
    LateRowsRotated,
    OutageEnded,
    RangeCompleted,
    RangeDeferred,
    RangeRetried,
    RotationStarted,
    RotationStopped,
    RowFailed,
    RowsConfirmed,
    RunFacts,
    Storage,
    Vacuumed,
)
from rotator.keys import Key, KeySpan
from rotator.process import peak_memory_bytes


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
    spans: tuple[KeySpan, ...] = ()
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
        self, status: EndStatus, *, error: str, late_rows_before: int, superseded: bool, run: RunFacts
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
            error=error,
            superseded=superseded,
            run=run,
            spans=self.spans,
            table_rows=self.table_rows[0],
            table_rows_is_exact=self.table_rows[1],
        )
