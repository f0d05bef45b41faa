"""Progress as one live line of a terminal, drawn by alive-progress.

The figures are those of Stats: the rate of alive-progress is the mean of the whole run.
"""

import os
import re
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock
from typing import Any, Final, Self, TextIO

from rotator import events
from rotator.progress.lines import Sink, Timer
from rotator.progress.preflight import preflight
from rotator.progress.text import (
    activity,
    count,
    duration,
    notice,
    pace,
    plural,
    progress_rows,
    rate,
    throttled,
)
from rotator.stats import Stats

REFRESH_SECONDS: Final = 0.1
BAR_CHARACTERS: Final = "▏▎▍▌▋▊▉█⚠"
_DEFAULT_COLUMNS: Final = 80
_SHORTEST_BAR, _LONGEST_BAR = 8, 30
_BAR_BORDERS: Final = 3
_UNFINISHED_MARK: Final = "(!) "
_MIN_COLUMNS, _MOST_COLUMNS = 3, 1000
# The width of rate and ETA, or of the activity; it does not change during a run.
_SPEED_WIDTH: Final = 9
_ETA_WIDTH: Final = 12
_TAIL_WIDTH: Final = 36
_DEFERRALS_WIDTH: Final = 20
_MIN_COLUMNS_TO_WRAP: Final = 30
_FRAME_START: Final = "\r"
_CLEAR_REST: Final = "\x1b[K"
_CLEAR_LINE: Final = "\r\x1b[2K"


def _indent(line: str) -> str:
    """Return the indent of a line's continuation: that of the value, where the line has a label."""
    found = re.match(r"  [\w ]{12} (?=\S)| *(?:- )?", line)
    return " " * (found.end() if found else 0)


class Screen:
    """Collects the pieces of a frame and writes them at once.

    alive-progress draws in another thread, piece by piece. A line above the bar must not get between pieces.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._sink = Sink(stream)
        self._lock = Lock()
        self._frame: list[str] = []

    def write(self, text: str) -> int:
        """Write a piece, or keep it until ``flush`` where a frame has begun."""
        with self._lock:
            if self._frame or text == _FRAME_START:
                self._frame.append(text)
            else:
                self._sink.write(text)
        return len(text)

    def flush(self) -> None:
        """Write the frame, and clear the rest of the line, e.g. a ``^C``."""
        with self._lock:
            if self._frame:
                self._sink.write("".join([*self._frame, _CLEAR_REST]))
                self._frame.clear()

    def write_above(self, line: str, columns: int) -> None:
        """Replace the bar by a line, wrapped between words; the next frame draws the bar below it."""
        with self._lock:
            wrapped = (
                textwrap.fill(line, columns - 1, break_on_hyphens=False, subsequent_indent=_indent(line))
                if columns >= _MIN_COLUMNS_TO_WRAP
                else line
            )
            self._sink.write(f"{_CLEAR_LINE}{wrapped}\n")

    def fileno(self) -> int:
        """Return the terminal's descriptor, from which alive-progress reads the width."""
        return self._stream.fileno()


def terminal_columns(stream: TextIO) -> int:
    """Return the width of the stream's terminal; 0 where it is unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


class BarObserver:
    """Draws a bar on a terminal's raw stream until its context ends, and restores the terminal."""

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] | None = None,
        refresh_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self._screen = Screen(stream)
        self._columns = columns or (lambda: terminal_columns(stream) or _DEFAULT_COLUMNS)
        self._refresh_seconds = refresh_seconds
        self._timer = Timer(refresh_seconds, clock)
        self._stats = Stats(clock=clock)
        self._length = 0
        self._handle: Any = None
        self._position = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the bar of a run that ended without a RotationStopped."""
        if self._handle is not None:
            self._end_unfinished("stopped", "stopped")

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        line = notice(event, self._stats)
        self._stats.take(event)
        if line:
            self._screen.write_above(line, self._columns())
        match event:
            case events.Preflighted():
                for line in preflight(event.findings).splitlines():
                    self._screen.write_above(line, self._columns())
            case events.RotationStarted():
                self._start()
                self._show()
            case _ if self._handle is None:
                pass
            case events.RotationStopped():
                self._finish(event)
            case events.RangeCompleted() | events.WorkersProgressed() if not self._timer.restart_if_due():
                pass
            case _:
                self._show()

    def _start(self) -> None:
        # Importing it is slow, and only a terminal needs it.
        from alive_progress import alive_bar  # noqa: PLC0415

        columns = self._columns()
        self._length = max(_SHORTEST_BAR, min(_LONGEST_BAR, columns // 5))
        self._handle = self._open.enter_context(
            alive_bar(
                self._stats.rows_total,
                file=self._screen,
                force_tty=True,
                # The fallback where the terminal's width is unknown, within the limits of alive-progress.
                max_cols=max(_MIN_COLUMNS, min(_MOST_COLUMNS, columns)),
                length=self._length,
                bar="smooth",
                spinner=None,
                monitor=False,
                elapsed=False,
                stats=False,
                enrich_print=False,
                receipt_text=True,
                refresh_secs=self._refresh_seconds,
            )
        )
        if self._stats.rows_total:
            self._position = self._stats.rows_capped
            self._handle(self._position, skipped=True)

    def _show(self) -> None:
        self._move(self._stats.rows_capped)
        self._handle.text = bar_text(self._stats, self._room())

    def _finish(self, event: events.RotationStopped) -> None:
        total_time = duration(event.seconds)
        if event.status != "completed":
            self._end_unfinished(f"{event.status} after {total_time}", event.status)
            return
        rows = plural(event.rows, "row")
        texts = [
            f"{rows}  100%  in {total_time}, {rate(event.rows_per_second)} rows/s while writing",
            f"{rows}  100%  in {total_time}",
            f"100%  in {total_time}",
            "100%",
        ]
        self._end(self._stats.rows_total, fitting(texts, self._room()))

    def _end_unfinished(self, how: str, how_in_short: str) -> None:
        percent = f"{self._stats.percent}%"
        texts = [
            f"{progress_rows(self._stats)} rows  {percent}  {how}",
            f"{percent}  {how}",
            f"{percent}  {how_in_short}",
            percent,
        ]
        # alive-progress marks a bar that ends before its total, so it must not reach it.
        position = min(self._position, self._stats.rows_total - 1)
        self._end(position, fitting(texts, self._room() - len(_UNFINISHED_MARK)))

    def _end(self, position: int, text: str) -> None:
        self._move(position)
        self._handle.text = text
        self._handle = None
        self._open.close()

    def _move(self, position: int) -> None:
        if self._stats.rows_total and position != self._position:
            self._handle(position - self._position)
            self._position = position

    def _room(self) -> int:
        # Some terminals wrap a line that fills the last column.
        return self._columns() - self._length - _BAR_BORDERS - 1


def bar_text(stats: Stats, room: int) -> str:
    """Return the text next to the bar.

    Which figures it has depends only on the total and the terminal, and each has a fixed width, so that none
    of them appears, vanishes or moves during a run.
    """
    total = count(stats.rows_total)
    rows = progress_rows(stats).rjust(len(f"{total} of {total}") + (0 if stats.rows_total_is_exact else 6))
    head = f"{stats.percent:>3}%"
    for start in (f"{rows} rows  {head}", f"{rows}  {head}", head):
        left = room - len(start) - 2
        if left >= _TAIL_WIDTH or (start is head and left >= _ETA_WIDTH):
            text = f"{start}  {_tail(stats, left)}"
            if stats.deferrals and left >= _TAIL_WIDTH + _DEFERRALS_WIDTH:
                deferrals = plural(stats.deferrals, "deferral")
                text = f"{text:<{len(start) + 2 + _TAIL_WIDTH}}  {deferrals}"
            if stats.pace is not None and stats.pace.is_limited:
                text = fitting([f"{text}  {pace(stats.pace)}", text], room)
            return text
    return head[: max(room, 0)]


def _tail(stats: Stats, room: int) -> str:
    if stats.state == "throttled":
        return fitting([*throttled(stats), ""], room)
    if stats.lock_holders and stats.state in ("rotating", "finishing", "loading", "verifying"):
        first, *_ = stats.lock_holders
        pid, *_ = first.split(",")
        return fitting([f"waiting for {first}", f"waiting for {pid}", "waiting", ""], room)
    if busy := activity(stats):
        return fitting([busy, ""], room)
    speed = "?" if stats.rows_per_second is None else rate(stats.rows_per_second)
    eta = "unknown" if stats.eta_seconds is None else duration(stats.eta_seconds)
    return fitting(
        [
            f"{speed:>{_SPEED_WIDTH}} rows/s  ETA {eta:<{_ETA_WIDTH}}",
            f"ETA {eta:<{_ETA_WIDTH}}",
            f"{eta:<{_ETA_WIDTH}}",
        ],
        room,
    )


def fitting(texts: list[str], room: int) -> str:
    """Return the first text that fits, or the beginning of the last one."""
    return next((text for text in texts if len(text) <= room), texts[-1][: max(room, 0)])
