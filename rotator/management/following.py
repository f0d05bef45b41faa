"""The progress of a rotation that another process works on."""

import time
from typing import Final, TextIO

from rotator.management.rotation import held_by, is_silent, percent_of_rotation, rows_of, status_of
from rotator.models import Rotation
from rotator.progress.bar import fitting, terminal_columns
from rotator.progress.lines import Sink
from rotator.progress.text import duration, rate
from rotator.stats import RecentRate

_CLEAR_REST: Final = "\x1b[K"
_LONGEST_BAR: Final = 30
_BAR_PART: Final = 5
_BORDERS: Final = 4


class FollowedProgress:
    """Shows each change of a rotation's progress.

    Args:
        stream: A raw stream.
        is_live: Whether one line of a terminal is redrawn; otherwise each change is a line.
    """

    def __init__(self, stream: TextIO, *, is_live: bool) -> None:
        self._stream = stream
        self._sink = Sink(stream)
        self._is_live = is_live
        self._rate = RecentRate()
        self._rows_seen: int | None = None
        self._written = ""

    def show(self, rotation: Rotation) -> None:
        """Show the rotation, from ``find_rotations()``, if its progress has changed."""
        now, rows = time.monotonic(), rotation.rows_done
        seen = rows if self._rows_seen is None else self._rows_seen
        if rows > seen:
            self._rate.add(rows - seen, now=now, seconds=1.0)
        elif rows < seen:
            self._rate.restart()
        self._rows_seen = rows
        held, figures = held_by(rotation), list[str]()
        if rotation.status == Rotation.Status.RUNNING and not is_silent(rotation) and not held:
            speed = self._rate.rows_per_second(now)
            eta = self._rate.eta_seconds(rotation.rows_total - rows, now)
            figures = [
                "unknown rate" if speed is None else f"{rate(speed)} rows/s",
                f"ETA {'unknown' if speed is None or eta is None else duration(eta)}",
            ]
        status, percent = status_of(rotation), percent_of_rotation(rotation)
        note = "waiting for a worker" if rotation.status == Rotation.Status.QUEUED else held
        progress = f"{status}: {rows_of(rotation, ' rows')} ({percent}%)"
        text = ", ".join([progress, *figures, *([note] if note else [])])
        if self._is_live:
            short = "  ".join([f"{percent}%", *figures])
            self._draw([text, f"{status}  {short}", short, f"{percent}%"], percent)
        elif text != self._written:
            self._sink.write_line(text)
        self._written = text

    def close(self) -> None:
        """End the live line."""
        if self._is_live and self._written:
            self._sink.write("\n")

    def _draw(self, texts: list[str], percent: int) -> None:
        columns = terminal_columns(self._stream)
        length = min(_LONGEST_BAR, columns // _BAR_PART)
        filled = length * percent // 100
        bar = f"|{'█' * filled}{' ' * (length - filled)}| "
        self._sink.write(f"\r{bar}{fitting(texts, columns - length - _BORDERS)}{_CLEAR_REST}")
