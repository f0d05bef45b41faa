"""The progress of a rotation that another process works on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TextIO

from rotator.progress.bar import fitting, terminal_columns
from rotator.progress.lines import Sink
from rotator.progress.text import duration, rate
from rotator.stats import RecentRate

_CLEAR_REST: Final = "\x1b[K"
_LONGEST_BAR: Final = 30
_BAR_PART: Final = 5
_BORDERS: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """The progress of a rotation at one moment.

    Attributes:
        status: The status as users see it.
        is_working: Whether its owner works on it, so that it has a rate and an ETA.
        rows_done: Rows done at the owner's latest heartbeat.
        rows_total: Rows up to the bound.
        rows: Both as text, with the noun.
        percent: The percentage of rows done, rounded down.
        note: A remark that follows the figures.
    """

    status: str
    is_working: bool
    rows_done: int
    rows_total: int
    rows: str
    percent: int
    note: str = ""


class FollowedProgress:
    """Shows each change of a rotation's progress.

    Args:
        stream: A raw stream.
        is_live: Whether one line of a terminal is redrawn; otherwise each change is a line.
        clock: Returns monotonic seconds.
    """

    def __init__(self, stream: TextIO, *, is_live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._sink = Sink(stream)
        self._clock = clock
        self._is_live = is_live
        self._rate = RecentRate()
        self._seen: Standing | None = None
        self._written = ""

    def show(self, standing: Standing) -> None:
        """Show the standing if it has changed."""
        now = self._clock()
        if self._seen is not None and standing.rows_done > self._seen.rows_done:
            self._rate.add(standing.rows_done - self._seen.rows_done, now=now, seconds=1.0)
        elif self._seen is not None and standing.rows_done < self._seen.rows_done:
            self._rate.restart()
        self._seen = standing
        speed = self._rate.rows_per_second(now) if standing.is_working else None
        eta = self._rate.eta_seconds(standing.rows_total - standing.rows_done, now)
        figures = [
            "unknown rate" if speed is None else f"{rate(speed)} rows/s",
            f"ETA {'unknown' if speed is None or eta is None else duration(eta)}",
        ]
        if not standing.is_working:
            figures = []
        text = ", ".join([f"{standing.status}: {standing.rows} ({standing.percent}%)", *figures])
        text += f", {standing.note}" if standing.note else ""
        if self._is_live:
            self._draw(standing, text, figures)
        elif text != self._written:
            self._sink.write_line(text)
        self._written = text

    def close(self) -> None:
        """End the live line."""
        if self._is_live and self._written:
            self._sink.write("\n")

    def _draw(self, standing: Standing, text: str, figures: list[str]) -> None:
        columns = terminal_columns(self._stream)
        length = min(_LONGEST_BAR, columns // _BAR_PART)
        filled = length * standing.percent // 100
        short = "  ".join([f"{standing.percent}%", *figures])
        texts = [text, f"{standing.status}  {short}", short, f"{standing.percent}%"]
        bar = f"|{'█' * filled}{' ' * (length - filled)}| "
        self._sink.write(f"\r{bar}{fitting(texts, columns - length - _BORDERS)}{_CLEAR_REST}")
