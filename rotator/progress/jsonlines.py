"""Progress as one JSON object a line, for programs.

Every line has ``event``, ``at`` (UTC, ISO 8601) and ``rotation`` (null until it is known). An event of
rotator.events has its own name and fields; keys are only ever added. ``docs/output.md`` has all of them.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final, TextIO

from rotator.events import (
    Event,
    Findings,
    LedgerProgressed,
    LockHeld,
    PaceChanged,
    Preflighted,
    RangeCompleted,
    RangeDeferred,
    RangeRetried,
    RotationStarted,
    RotationStopped,
    Tick,
    VerificationProgressed,
    Verified,
    WorkersProgressed,
)
from rotator.progress.lines import Sink, Timer, utc_now
from rotator.progress.preflight import estimate_wal
from rotator.progress.summary import report
from rotator.progress.verification import verification_report
from rotator.stats import Stats

_NAMES: Final[Mapping[type, str]] = {
    Preflighted: "preflight",
    RotationStarted: "started",
    RotationStopped: "stopped",
    **dict.fromkeys((RangeCompleted, WorkersProgressed, Tick, VerificationProgressed), "progress"),
}


class JsonObserver:
    """Writes one JSON object for each notable event and one with the figures every ``every_seconds``.

    Args:
        stream: The raw stream, not one that adds line ends.
        clock: Returns monotonic seconds.
        wall_clock: Returns the time of day with its time zone.
        every_seconds: The time between two lines of figures.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = utc_now,
        every_seconds: float = 1.0,
    ) -> None:
        self._sink = Sink(stream)
        self._wall_clock = wall_clock
        self._timer = Timer(every_seconds, clock)
        self._stats = Stats(clock=clock)

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self._stats.take(event)
        match event:
            case Preflighted():
                self._write("preflight", _preflight(event.findings))
            case RotationStarted():
                stopped_at = event.stopped_at and _iso(event.stopped_at)
                self._write("started", {**asdict(event), "stopped_at": stopped_at, "resumed": event.resumed})
            case RangeCompleted() | WorkersProgressed() | Tick():
                if self._stats.started and self._timer.restart_if_due():
                    self._write("progress", figures(self._stats))
            case (
                RangeDeferred()
                | RangeRetried()
                | PaceChanged(is_new=False)
                | LockHeld(is_new=False)
                | LedgerProgressed()
                | VerificationProgressed()
            ):
                # These are frequent, and the figures contain them.
                pass
            case Verified():
                self._write("verified", verification_report(event))
            case RotationStopped():
                self._write("stopped", report(event))
            case _:
                self._write(event_name(type(event)), asdict(event))

    def _write(self, name: str, facts: dict[str, object]) -> None:
        head = {"event": name, "at": _iso(self._wall_clock()), "rotation": self._stats.rotation}
        self._sink.write_line(json.dumps(head | facts))


def event_name(kind: type[Event]) -> str:
    """Return the name of a type of event as it is in JSON and in log records, e.g. ``row_rejected``."""
    return _NAMES.get(kind) or re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def figures(stats: Stats) -> dict[str, object]:
    """Return the figures of a ``progress`` line; ``rows_done`` may exceed the total, ``percent`` not 100."""
    return {
        "state": stats.state,
        "rows_done": stats.rows_done,
        "rows_total": stats.rows_total,
        "rows_total_is_exact": stats.rows_total_is_exact,
        "percent": stats.percent,
        "rows_per_second": _rounded(stats.rows_per_second),
        "eta_seconds": _rounded(stats.eta_seconds),
        "late_rows": stats.late_rows,
        "deferrals": stats.deferrals,
        "retries": stats.retries,
        "rejected_rows": len(stats.rejected_keys),
        "outage_left_seconds": _rounded(stats.outage_left_seconds),
        "lock_holders": list(stats.lock_holders),
        "pace": stats.pace and asdict(stats.pace),
        "throttles": dict(stats.throttles),
        "throttled_seconds": {name: round(s, 3) for name, s in stats.throttled_so_far.items()},
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


def _preflight(findings: Findings) -> dict[str, object]:
    wal = estimate_wal(findings.table, findings.server, findings.rows_left)
    return asdict(findings) | {
        "wal_bytes": wal.wal_bytes,
        "forced_checkpoints": wal.forced_checkpoints,
        "estimated_seconds": findings.estimated_seconds,
    }


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")
