"""Progress as plain lines, as JSON lines, and as log records. docs/output.md has all of them."""

import json
import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, TextIO

from rotator import events
from rotator.progress.preflight import estimate_wal, preflight
from rotator.progress.summary import (
    report,
    unchanged_rows,
    verdict,
    verification_report,
    verification_verdict,
)
from rotator.progress.text import (
    HIDDEN,
    activity,
    duration,
    notice,
    one_line,
    pace,
    plural,
    progress_rows,
    rate,
    stopped_by,
    waiting_for_locks,
)
from rotator.ranges import Key
from rotator.stats import Stats

FIGURES_SECONDS: Final = 30.0
_WARNINGS: Final = (
    events.AnalyzeSkipped
    | events.BrokerUnreachable
    | events.OutageStarted
    | events.ReceiverFailed
    | events.ReindexSkipped
    | events.RowRejected
    | events.ServerLogShowsValues
    | events.WorkersSilent
)
_utc_now: Final = partial(datetime.now, UTC)


class Timer:
    """A timer for recurring output."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._due_at = clock() + seconds

    def restart_if_due(self) -> bool:
        """Return whether ``seconds`` have passed since its last start, and if so, start again."""
        now = self._clock()
        if now < self._due_at:
            return False
        self._due_at = now + self._seconds
        return True


class Sink:
    """Writes to a stream until that fails: a closed pipe or terminal must not stop a rotation."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> None:
        """Write and flush the text, with escapes for characters that the stream cannot encode."""
        if self._gone:
            return
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):
            # A closed stream raises ValueError.
            self._gone = True
            _discard(self._stream)

    def write_line(self, line: str) -> None:
        """Write the line with its end."""
        self.write(f"{line}\n")


def _discard(stream: TextIO) -> None:
    """Discard the buffered text, which Python would write at exit, with the same error."""
    if stream not in (sys.stdout, sys.stderr):
        return
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), stream.fileno())


class NotableEvents(ABC):
    """Writes one text for each notable event, and one with the figures every ``every_seconds``."""

    def __init__(self, clock: Callable[[], float], every_seconds: float = FIGURES_SECONDS) -> None:
        self._timer = Timer(every_seconds, clock)
        self._stats = Stats(clock=clock)

    @abstractmethod
    def write(self, text: str, event: events.Event) -> None:
        """Write a text; figures come with an event that is not notable."""

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        text = notice(event, self._stats)
        self._stats.take(event)
        match event:
            case events.RangeCompleted() | events.WorkersProgressed() | events.Tick():
                if self._stats.started and self._timer.restart_if_due():
                    text = figures(self._stats)
            case events.VerificationProgressed():
                if self._timer.restart_if_due():
                    text = f"searched {plural(event.rows, 'row')}, {plural(event.survivors, 'survivor')}"
        if text:
            self.write(text, event)


class LinesObserver(NotableEvents):
    """Writes lines with the time to a raw stream, i.e. one that adds no line ends."""

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = _utc_now,
        every_seconds: float = FIGURES_SECONDS,
    ) -> None:
        super().__init__(clock, every_seconds)
        self._sink = Sink(stream)
        self._wall_clock = wall_clock

    def __call__(self, event: events.Event) -> None:
        """Take one event; the preflight report is several lines."""
        super().__call__(event)
        match event:
            case events.Preflighted():
                for row in preflight(event.findings).splitlines():
                    self.write(row, event)
            case events.RotationStopped():
                # The summary follows.
                unchanged = unchanged_rows(event) if event.status == "completed" else ""
                self.write(
                    f"rotation {event.rotation} of {event.target} {event.status} after "
                    f"{duration(event.seconds)}: {plural(event.rows_this_run, 'row')} in this run"
                    f"{f'; {unchanged}' if unchanged else ''}",
                    event,
                )

    def write(self, text: str, event: events.Event) -> None:  # noqa: ARG002 - the text is enough
        """Write one line."""
        self._sink.write_line(f"{self._wall_clock().astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} {text}")


class LogObserver(NotableEvents):
    """Logs notable events, the figures and the result, each with its fields."""

    def __init__(self, *, hides_keys: bool, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._logger = logging.getLogger("rotator")
        self._hides_keys = hides_keys

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        if self._hides_keys and isinstance(event, events.RowRejected):
            event = replace(event, key=Key("…"))
        if self._hides_keys and isinstance(event, events.RotationStopped | events.Verified) and event.error:
            event = replace(event, error=HIDDEN)
        super().__call__(event)
        match event:
            case events.Verified():
                self.write(verification_verdict(event), event)
            case events.RotationStopped():
                # No summary follows.
                self.write(f"{verdict(event)} {one_line(_reason(event))}".rstrip(), event)

    def write(self, text: str, event: events.Event) -> None:
        """Log one record."""
        is_failed = isinstance(event, events.RotationStopped | events.Verified) and event.exit_status != 0
        self._logger.log(
            logging.WARNING if is_failed or isinstance(event, _WARNINGS) else logging.INFO,
            "%s",
            text,
            extra={
                "event": event_name(type(event)),
                # A verification that is resumed has no start of a rotation.
                "rotation": getattr(self._stats.started or event, "rotation", None),
                "target": getattr(self._stats.started or event, "target", ""),
                "reason": _reason(event),
                **figures_as_json(self._stats),
            },
        )


def _reason(event: events.Event) -> str:
    if isinstance(event, events.RotationStopped):
        return event.error or stopped_by(event.stop_reason, event.cancelled_by)
    return event.error if isinstance(event, events.Verified) else str(getattr(event, "reason", ""))


class JsonObserver:
    """Writes one JSON object for each notable event, and one with the figures every ``every_seconds``.

    Every line has ``event``, ``at`` (UTC, ISO 8601) and ``rotation`` (null until it is known). An event
    without a case has the fields of its class. Keys are only ever added.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = _utc_now,
        every_seconds: float = 1.0,
    ) -> None:
        self._sink = Sink(stream)
        self._wall_clock = wall_clock
        self._timer = Timer(every_seconds, clock)
        self._stats = Stats(clock=clock)

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        self._stats.take(event)
        match event:
            case events.RangeCompleted() | events.WorkersProgressed() | events.Tick():
                if self._stats.started and self._timer.restart_if_due():
                    self._write(event, figures_as_json(self._stats))
            case (
                events.RangeDeferred()
                | events.RangeRetried()
                | events.PaceChanged(is_new=False)
                | events.LockHeld(is_new=False)
                | events.LedgerProgressed()
                | events.VerificationProgressed()
            ):
                # These are frequent, and the figures contain them.
                pass
            case events.Preflighted(findings=findings):
                wal = estimate_wal(findings.table, findings.server, findings.rows_left)
                estimates = {
                    "wal_bytes": wal.wal_bytes,
                    "forced_checkpoints": wal.forced_checkpoints,
                    "estimated_seconds": findings.estimated_seconds,
                }
                self._write(event, asdict(findings) | estimates)
            case events.RotationStarted():
                stopped_at = event.stopped_at and _iso(event.stopped_at)
                self._write(event, asdict(event) | {"stopped_at": stopped_at, "resumed": event.resumed})
            case events.Verified():
                self._write(event, verification_report(event))
            case events.RotationStopped():
                self._write(event, report(event))
            case _:
                self._write(event, asdict(event))

    def _write(self, event: events.Event, facts: dict[str, object]) -> None:
        head = {
            "event": event_name(type(event)),
            "at": _iso(self._wall_clock()),
            "rotation": self._stats.started and self._stats.started.rotation,
        }
        self._sink.write_line(json.dumps(head | facts))


def event_name(kind: type[events.Event]) -> str:
    """Return the name of a type of event as it is in JSON and in log records, e.g. ``row_rejected``."""
    if kind in (events.RangeCompleted, events.WorkersProgressed, events.Tick, events.VerificationProgressed):
        return "progress"
    names = {
        events.Preflighted: "preflight",
        events.RotationStarted: "started",
        events.RotationStopped: "stopped",
    }
    return names.get(kind) or re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


def figures(stats: Stats) -> str:
    """Return the figures as one line."""
    parts = [f"{progress_rows(stats)} rows ({stats.percent}%)"]
    if busy := activity(stats):
        parts.append(busy)
    else:
        if stats.rows_per_second is not None:
            parts.append(f"{rate(stats.rows_per_second)} rows/s")
        parts.append(f"ETA {'unknown' if stats.eta_seconds is None else duration(stats.eta_seconds)}")
    counts = {"deferral": stats.deferrals, "retry": stats.retries, "rejected row": len(stats.rejected_keys)}
    parts += [plural(number, noun) for noun, number in counts.items() if number]
    if waiting := waiting_for_locks(stats.lock_holders):
        parts.append(waiting)
    if stats.pace is not None and stats.pace.is_limited:
        parts.append(pace(stats.pace))
    return ", ".join(parts)


def figures_as_json(stats: Stats) -> dict[str, object]:
    """Return the figures as JSON types; ``rows_done`` may exceed the total, ``percent`` not 100."""
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
