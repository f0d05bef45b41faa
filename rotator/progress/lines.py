"""Progress as plain lines, for logs and pipes."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from rotator.events import Event, Preflighted, RangeCompleted, RotationStopped, Tick
from rotator.progress.format import duration, plural, rate
from rotator.progress.preflight import preflight
from rotator.progress.sink import Sink
from rotator.progress.summary import unchanged_rows
from rotator.progress.tally import Tally
from rotator.progress.throttle import Throttle
from rotator.progress.wording import activity, done_of_total, notice


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
            case RangeCompleted() | Tick() if self._tally.rotation is not None and self._throttle.due(now):
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
