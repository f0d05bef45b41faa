"""Progress as plain lines or log records."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, TextIO

from rotator.events import (
    BrokerUnreachable,
    Event,
    OutageStarted,
    Preflighted,
    RangeCompleted,
    ReceiverFailed,
    RotationStopped,
    RowFailed,
    ServerLogShowsValues,
    Tick,
    WorkersProgressed,
    WorkersSilent,
)
from rotator.progress.preflight import preflight
from rotator.progress.summary import unchanged_rows, verdict
from rotator.progress.text import activity, done_of_total, duration, notice, plural, rate
from rotator.stats import Tally


class Throttle:
    """Says whether it is time again; ``now`` is a monotonic clock's value in seconds."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds = seconds
        self._due_at = now + seconds

    def due(self, now: float) -> bool:
        """Return whether ``seconds`` have passed since it last said yes, or since it was made."""
        if now < self._due_at:
            return False
        self._due_at = now + self._seconds
        return True


class Sink:
    """Writes to a stream and falls silent permanently when that fails.

    A closed pipe or a hung-up terminal is no reason to stop half-way through a leak; what was done is in
    the database.
    """

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
    """Discard the text that the stream still holds: Python writes it at its end, and fails again."""
    if stream not in (sys.stdout, sys.stderr):
        return
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), stream.fileno())


class LinesObserver:
    """Writes a line of figures every ``every_seconds`` and one for each notable event.

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
        every_seconds: float = 5.0,
    ) -> None:
        self._sink = Sink(stream)
        self._wall_clock = wall_clock
        self._clock = clock
        self._throttle = Throttle(every_seconds, clock())
        self._tally = Tally()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        now = self._clock()
        line = notice(event, self._tally)
        self._tally.take(event, now)
        if line:
            self._write(line)
        match event:
            case Preflighted():
                for row in preflight(event.findings).splitlines():
                    self._write(row)
            case RangeCompleted() | WorkersProgressed() | Tick():
                if self._tally.rotation is not None and self._throttle.due(now):
                    self._write(figures(self._tally, now))
            case RotationStopped():
                unchanged = unchanged_rows(event) if event.status == "completed" else ""
                self._write(
                    f"rotation {event.rotation} of {event.target} {event.status} after "
                    f"{duration(event.seconds)}: {plural(event.rows_this_run, 'row')} in this run"
                    f"{f'; {unchanged}' if unchanged else ''}"
                )
            case _:
                pass

    def _write(self, line: str) -> None:
        self._sink.write_line(f"{self._wall_clock().astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} {line}")


def figures(tally: Tally, now: float) -> str:
    """Return rows, percent, rate, ETA and whatever keeps the run from getting on, as one line."""
    parts = [f"{done_of_total(tally)} rows ({tally.percent}%)"]
    if busy := activity(tally, now):
        parts.append(busy)
    else:
        rows_per_second, eta_seconds = tally.rows_per_second(now), tally.eta_seconds(now)
        if rows_per_second is not None:
            parts.append(f"{rate(rows_per_second)} rows/s")
        parts.append(f"ETA {'unknown' if eta_seconds is None else duration(eta_seconds)}")
    if tally.deferrals:
        parts.append(f"ranges put off {plural(tally.deferrals, 'time')}")
    if tally.retries:
        parts.append(f"tried again {plural(tally.retries, 'time')}")
    if tally.failed_rows:
        parts.append(f"{plural(tally.failed_rows, 'row')} failed")
    return ", ".join(parts)


_WARNINGS: Final = (
    BrokerUnreachable,
    OutageStarted,
    ReceiverFailed,
    RowFailed,
    ServerLogShowsValues,
    WorkersSilent,
)


class LogObserver:
    """Logs what is notable, and how it ended; the figures are in the database."""

    def __init__(self, logger: logging.Logger, *, clock: Callable[[], float]) -> None:
        """Log to this logger.

        Args:
            logger: The process's own way to whoever reads its logs.
            clock: Returns monotonic seconds.
        """
        self._logger = logger
        self._clock = clock
        self._tally = Tally()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        line = verdict(event) if isinstance(event, RotationStopped) else notice(event, self._tally)
        self._tally.take(event, self._clock())
        if line:
            self._logger.log(logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO, "%s", line)
