"""Progress as one JSON object a line, for programs.

Every line has ``event``, ``at`` (UTC, ISO 8601) and ``rotation`` (null until it is known). The events and
what else they carry; keys are only ever added:

    preflight            what rotator.events.Findings holds, with wal_bytes, forced_checkpoints and
                         estimated_seconds (null while not measured)
    started              target, rows_total, rows_total_is_exact, rows_done, seconds_before, stopped_at,
                         concurrency, batch, resumed
    progress             state, rows_done, rows_total, rows_total_is_exact, percent, rows_per_second,
                         eta_seconds (both null while unknown), deferrals, retries, failed_rows,
                         outage_left_seconds (null while the server is reachable)
    row_failed           key, reason
    outage_started       reason, budget_seconds
    outage_ended         seconds, rows_done
    owner_watched        owner, seconds
    server_log_shows_values  settings
    late_commits_awaited holders
    late_rows_rotated    rows
    confirmation_started
    rows_confirmed       confirmed, unconfirmed
    vacuum_started
    vacuumed             seconds
    vacuum_skipped       reason, is_once
    receiver_failed      receiver, error
    limit_raised         planning_seconds, partitions, statement_seconds
    lock_held            holders
    drain_started        reason
    stopped              the same keys as the report

``state`` is ``rotating``, ``outage``, ``draining``, ``late_commits``, ``finishing``, ``confirming`` or
``vacuuming``.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final, TextIO

from rotator.events import (
    BrokerUnreachable,
    ConfirmationStarted,
    DrainStarted,
    Event,
    Findings,
    LateCommitsAwaited,
    LateCommitsOver,
    LateRowsRotated,
    LimitRaised,
    LockHeld,
    OutageEnded,
    OutageStarted,
    OwnerWatched,
    Preflighted,
    RangeCompleted,
    ReceiverFailed,
    RotationStarted,
    RotationStopped,
    RowFailed,
    RowsConfirmed,
    ServerLogShowsValues,
    Tick,
    Vacuumed,
    VacuumSkipped,
    VacuumStarted,
    WorkersProgressed,
    WorkersSilent,
    estimate_wal,
)
from rotator.progress.lines import Sink, Throttle
from rotator.progress.summary import report
from rotator.stats import Tally

_NAMES: Final[dict[type[Event], str]] = {
    RowFailed: "row_failed",
    OutageStarted: "outage_started",
    OutageEnded: "outage_ended",
    OwnerWatched: "owner_watched",
    ServerLogShowsValues: "server_log_shows_values",
    LateCommitsAwaited: "late_commits_awaited",
    LateCommitsOver: "late_commits_over",
    LateRowsRotated: "late_rows_rotated",
    ConfirmationStarted: "confirmation_started",
    RowsConfirmed: "rows_confirmed",
    VacuumStarted: "vacuum_started",
    Vacuumed: "vacuumed",
    VacuumSkipped: "vacuum_skipped",
    BrokerUnreachable: "broker_away",
    WorkersSilent: "workers_silent",
    ReceiverFailed: "receiver_failed",
    LimitRaised: "limit_raised",
    LockHeld: "lock_held",
    DrainStarted: "drain_started",
}


class JsonObserver:
    """Writes one JSON object for each notable event and one with the figures every ``every_seconds``.

    Args:
        stream: Where the lines go; the raw stream, not one that adds line ends.
        clock: Returns monotonic seconds.
        wall_clock: Returns the time of day with its time zone.
        every_seconds: How long it is silent between two lines of figures.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], datetime],
        every_seconds: float = 1.0,
    ) -> None:
        self._sink = Sink(stream)
        self._clock = clock
        self._wall_clock = wall_clock
        self._throttle = Throttle(every_seconds, clock())
        self._tally = Tally()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        now = self._clock()
        self._tally.take(event, now)
        match event:
            case Preflighted():
                self._write("preflight", _preflight(event.findings))
            case RotationStarted():
                stopped_at = event.stopped_at and _iso(event.stopped_at)
                self._write("started", {**asdict(event), "stopped_at": stopped_at, "resumed": event.resumed})
            case RangeCompleted() | WorkersProgressed() | Tick():
                if self._tally.rotation is not None and self._throttle.due(now):
                    self._write("progress", figures(self._tally, now))
            case RotationStopped():
                self._write("stopped", report(event))
            case _ if type(event) in _NAMES:
                self._write(_NAMES[type(event)], asdict(event))
            case _:
                pass

    def _write(self, name: str, facts: dict[str, object]) -> None:
        head = {"event": name, "at": _iso(self._wall_clock()), "rotation": self._tally.rotation}
        self._sink.write_line(json.dumps(head | facts))


def figures(tally: Tally, now: float) -> dict[str, object]:
    """Return what a ``progress`` line carries; rows done as they are, percent never past 100."""
    rows_per_second, eta_seconds = tally.rows_per_second(now), tally.eta_seconds(now)
    return {
        "state": tally.state,
        "rows_done": tally.rows_done,
        "rows_total": tally.rows_total,
        "rows_total_is_exact": tally.rows_total_is_exact,
        "percent": tally.percent,
        "rows_per_second": None if rows_per_second is None else round(rows_per_second, 3),
        "eta_seconds": None if eta_seconds is None else round(eta_seconds, 3),
        "deferrals": tally.deferrals,
        "retries": tally.retries,
        "failed_rows": tally.failed_rows,
        "outage_left_seconds": (
            None if tally.outage_since is None else round(tally.outage_left_seconds(now), 3)
        ),
    }


def _preflight(findings: Findings) -> dict[str, object]:
    wal = estimate_wal(findings.table, findings.server, findings.rows_left)
    return asdict(findings) | {
        "wal_bytes": wal.wal_bytes,
        "forced_checkpoints": wal.forced_checkpoints,
        "estimated_seconds": findings.estimated_seconds,
    }


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")
