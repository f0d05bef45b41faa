"""Progress as plain lines."""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, TextIO

from rotator.events import (
    Event,
    Preflighted,
    RangeCompleted,
    RotationStopped,
    Tick,
    VerificationProgressed,
    WorkersProgressed,
)
from rotator.progress.preflight import preflight
from rotator.progress.summary import unchanged_rows
from rotator.progress.text import (
    activity,
    duration,
    notice,
    pace,
    plural,
    progress_rows,
    rate,
    waiting_for_locks,
)
from rotator.stats import Stats

FIGURES_SECONDS: Final = 30.0


def utc_now() -> datetime:
    """Return the time of day in UTC."""
    return datetime.now(UTC)


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
    """Writes one text for each notable event, and one with the figures every ``every_seconds``.

    Args:
        clock: Returns monotonic seconds.
        every_seconds: The time between two texts with figures.
    """

    def __init__(self, *, clock: Callable[[], float], every_seconds: float) -> None:
        self._timer = Timer(every_seconds, clock)
        self._stats = Stats(clock=clock)

    @abstractmethod
    def write(self, text: str, event: Event) -> None:
        """Write a text; figures come with an event that is not notable."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        text = notice(event, self._stats)
        self._stats.take(event)
        match event:
            case RangeCompleted() | WorkersProgressed() | Tick():
                if self._stats.started and self._timer.restart_if_due():
                    text = figures(self._stats)
            case VerificationProgressed():
                if self._timer.restart_if_due():
                    text = f"searched {plural(event.rows, 'row')}, {plural(event.survivors, 'survivor')}"
            case RotationStopped():
                text = self.ended(event)
            case _:
                pass
        if text:
            self.write(text, event)

    @abstractmethod
    def ended(self, event: RotationStopped) -> str:
        """Return the text at the end of the run."""


class LinesObserver(NotableEvents):
    """Writes lines with the time.

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
        every_seconds: float = FIGURES_SECONDS,
    ) -> None:
        super().__init__(clock=clock, every_seconds=every_seconds)
        self._sink = Sink(stream)
        self._wall_clock = wall_clock

    def __call__(self, event: Event) -> None:
        """Take one event; the preflight report is several lines."""
        super().__call__(event)
        if isinstance(event, Preflighted):
            for row in preflight(event.findings).splitlines():
                self.write(row, event)

    def write(self, text: str, event: Event) -> None:  # noqa: ARG002 - the text is enough
        """Write one line."""
        self._sink.write_line(f"{self._wall_clock().astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} {text}")

    def ended(self, event: RotationStopped) -> str:
        """Return the short result; the summary follows."""
        unchanged = unchanged_rows(event) if event.status == "completed" else ""
        return (
            f"rotation {event.rotation} of {event.target} {event.status} after "
            f"{duration(event.seconds)}: {plural(event.rows_this_run, 'row')} in this run"
            f"{f'; {unchanged}' if unchanged else ''}"
        )


def figures(stats: Stats) -> str:
    """Return the figures as one line."""
    parts = [f"{progress_rows(stats)} rows ({stats.percent}%)"]
    if busy := activity(stats):
        parts.append(busy)
    else:
        if stats.rows_per_second is not None:
            parts.append(f"{rate(stats.rows_per_second)} rows/s")
        parts.append(f"ETA {'unknown' if stats.eta_seconds is None else duration(stats.eta_seconds)}")
    counts = {
        "deferral": stats.deferrals,
        "retry": stats.retries,
        "rejected row": len(stats.rejected_keys),
    }
    parts += [plural(number, noun) for noun, number in counts.items() if number]
    if waiting := waiting_for_locks(stats.lock_holders):
        parts.append(waiting)
    if stats.pace is not None and stats.pace.is_limited:
        parts.append(pace(stats.pace))
    return ", ".join(parts)
