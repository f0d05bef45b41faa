"""Progress as one live line of a terminal, drawn by alive-progress.

alive-progress draws; the figures are ours, because its rate is the mean of the whole run and its total
cannot change.
"""

import os
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, Final, TextIO

from rotator.events import (
    Event,
    Preflighted,
    RangeCompleted,
    RotationStarted,
    RotationStopped,
    WorkersProgressed,
)
from rotator.progress.lines import Sink, Throttle
from rotator.progress.preflight import preflight
from rotator.progress.text import activity, count, done_of_total, duration, notice, plural, rate
from rotator.stats import Tally

_MIN_COLUMNS_TO_WRAP: Final = 30
_FRAME_START: Final = "\r"
_CLEAR_REST: Final = "\x1b[K"
_CLEAR_LINE: Final = "\r\x1b[2K"


def _indent(line: str) -> str:
    """Return the indent of a line's continuation: that of the value where a label stands before it."""
    found = re.match(r"  [\w ]{12} (?=\S)| *(?:- )?", line)
    return " " * (found.end() if found else 0)


class Screen:
    """Collects what makes up a frame and writes it at once.

    alive-progress draws from a thread of its own, piece by piece; only so can a line be written above the
    bar without falling into the middle of it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._sink = Sink(stream)
        self._lock = Lock()
        self._frame: list[str] = []

    def write(self, text: str) -> int:
        """Take a piece; from a carriage return until ``flush`` pieces are kept back."""
        with self._lock:
            if self._frame or text == _FRAME_START:
                self._frame.append(text)
            else:
                self._sink.write(text)
        return len(text)

    def flush(self) -> None:
        """Write the frame, and clear what a ``^C`` or a wider window has left behind it."""
        with self._lock:
            if self._frame:
                self._sink.write("".join([*self._frame, _CLEAR_REST]))
                self._frame.clear()

    def write_above(self, line: str, columns: int) -> None:
        """Write a line, broken between words to the width, where the bar is; the bar comes again below.

        Only a word that is wider than the terminal is broken itself.
        """
        with self._lock:
            wrapped = (
                textwrap.fill(line, columns - 1, break_on_hyphens=False, subsequent_indent=_indent(line))
                if columns >= _MIN_COLUMNS_TO_WRAP
                else line
            )
            self._sink.write(f"{_CLEAR_LINE}{wrapped}\n")

    def fileno(self) -> int:
        """Return the terminal's descriptor, whose width alive-progress asks for."""
        return self._stream.fileno()


REFRESH_SECONDS: Final = 0.1
BAR_CHARACTERS: Final = "▏▎▍▌▋▊▉█⚠"
_DEFAULT_COLUMNS: Final = 80
_SHORTEST_BAR, _LONGEST_BAR = 8, 30
_BAR_BORDERS: Final = 3
_UNFINISHED_MARK: Final = "(!) "
_MIN_COLUMNS, _MOST_COLUMNS = 3, 1000
# The width of rate and ETA, or of what holds the run up: it stays the same for a whole run.
_SPEED_WIDTH: Final = 9
_ETA_WIDTH: Final = 12
_TAIL_WIDTH: Final = 36
_DEFERRED_WIDTH: Final = 18


def terminal_columns(stream: TextIO) -> int:
    """Return how wide the stream's terminal is now; 0 where there is none or it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


@contextmanager
def bar_observer(
    stream: TextIO,
    *,
    clock: Callable[[], float],
    columns: Callable[[], int] | None = None,
    refresh_seconds: float = REFRESH_SECONDS,
) -> Iterator[Callable[[Event], None]]:
    """Draw a bar until the block is left, in whatever way, and leave the terminal as it was.

    Args:
        stream: The terminal; the raw stream, not one that adds line ends.
        clock: Returns monotonic seconds.
        columns: Returns the terminal's width now; asked of the stream unless given.
        refresh_seconds: How often it is drawn; leaving waits for one more.
    """
    width = columns or (lambda: terminal_columns(stream))
    bar = _Bar(Screen(stream), clock, lambda: width() or _DEFAULT_COLUMNS, refresh_seconds)
    try:
        yield bar
    finally:
        bar.close()


class _Bar:
    def __init__(
        self, screen: Screen, clock: Callable[[], float], columns: Callable[[], int], refresh_seconds: float
    ) -> None:
        self._screen = screen
        self._clock = clock
        self._columns = columns
        self._refresh_seconds = refresh_seconds
        self._throttle = Throttle(refresh_seconds, clock())
        self._tally = Tally()
        self._length = 0
        self._handle: Any = None
        self._position = 0
        self._open = ExitStack()

    def __call__(self, event: Event) -> None:
        now = self._clock()
        line = notice(event, self._tally)
        self._tally.take(event, now)
        if line:
            self._screen.write_above(line, self._columns())
        match event:
            case Preflighted():
                for line in preflight(event.findings).splitlines():
                    self._screen.write_above(line, self._columns())
            case RotationStarted():
                self._start()
                self._show(now)
            case RotationStopped():
                self._finish(event)
            case RangeCompleted() | WorkersProgressed() if not self._throttle.due(now):
                pass
            case _:
                self._show(now)

    def close(self) -> None:
        """End the bar of a run that did not say how it ended."""
        if self._handle is not None:
            self._end_unfinished("stopped", "stopped")

    def _start(self) -> None:
        # It loads slowly and is not needed where there is no terminal.
        from alive_progress import alive_bar  # noqa: PLC0415

        columns = self._columns()
        self._length = max(_SHORTEST_BAR, min(_LONGEST_BAR, columns // 5))
        self._handle = self._open.enter_context(
            alive_bar(
                self._tally.rows_total,
                file=self._screen,
                force_tty=True,
                # Only where the terminal does not say; it knows no other widths.
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
        if self._tally.rows_total:
            self._position = self._tally.rows_capped
            self._handle(self._position, skipped=True)

    def _show(self, now: float) -> None:
        if self._handle is None:
            return
        self._move(self._tally.rows_capped)
        self._handle.text = bar_text(self._tally, now, self._room())

    def _finish(self, event: RotationStopped) -> None:
        if self._handle is None:
            return
        if event.status == "completed":
            self._end(self._tally.rows_total, fitting(completed_texts(event), self._room()))
        else:
            self._end_unfinished(f"{event.status} after {duration(event.seconds)}", event.status)

    def _end_unfinished(self, how: str, how_in_short: str) -> None:
        # alive-progress marks a bar that ends short of its total, and this one shall be marked.
        position = min(self._position, self._tally.rows_total - 1)
        room = self._room() - len(_UNFINISHED_MARK)
        self._end(position, fitting(unfinished_texts(self._tally, how, how_in_short), room))

    def _end(self, position: int, text: str) -> None:
        self._move(position)
        self._handle.text = text
        self._handle = None
        self._open.close()

    def _move(self, position: int) -> None:
        if self._tally.rows_total and position != self._position:
            self._handle(position - self._position)
            self._position = position

    def _room(self) -> int:
        # Terminals differ in what they do about a full last column.
        return self._columns() - self._length - _BAR_BORDERS - 1


def bar_text(tally: Tally, now: float, room: int) -> str:
    """Return the text next to the bar.

    Which figures there is room for depends on the total and the terminal alone, and each has a width of its
    own, so that none of them comes, goes or moves during a run.
    """
    total = count(tally.rows_total)
    rows = done_of_total(tally).rjust(len(f"{total} of {total}") + (0 if tally.rows_total_is_exact else 6))
    head = f"{tally.percent:>3}%"
    ample, compact = f"{rows} rows  {head}", f"{rows}  {head}"
    for start in (ample, compact, head):
        left = room - len(start) - 2
        if left >= _TAIL_WIDTH or (start is head and left >= _ETA_WIDTH):
            text = f"{start}  {_tail(tally, now, left)}"
            if tally.deferrals and left >= _TAIL_WIDTH + _DEFERRED_WIDTH:
                text = f"{text:<{len(start) + 2 + _TAIL_WIDTH}}  {count(tally.deferrals)} deferred"
            return text
    return head[: max(room, 0)]


def _tail(tally: Tally, now: float, room: int) -> str:
    if busy := activity(tally, now):
        return fitting([busy, ""], room)
    rows_per_second, eta_seconds = tally.rows_per_second(now), tally.eta_seconds(now)
    speed = "?" if rows_per_second is None else rate(rows_per_second)
    eta = "unknown" if eta_seconds is None else duration(eta_seconds)
    return fitting(
        [
            f"{speed:>{_SPEED_WIDTH}} rows/s  ETA {eta:<{_ETA_WIDTH}}",
            f"ETA {eta:<{_ETA_WIDTH}}",
            f"{eta:<{_ETA_WIDTH}}",
        ],
        room,
    )


def completed_texts(event: RotationStopped) -> list[str]:
    """Return what stands beside the bar of a completed run, the longest form first."""
    rows, time = plural(event.rows, "row"), duration(event.seconds)
    return [f"{rows}  100%  {rate(event.rows_per_second)} rows/s  in {time}", f"100%  in {time}", "100%"]


def unfinished_texts(tally: Tally, how: str, how_in_short: str) -> list[str]:
    """Return what stands beside the bar of a run that ended before it was done, the longest form first."""
    percent = f"{tally.percent}%"
    return [
        f"{done_of_total(tally)} rows  {percent}  {how}",
        f"{percent}  {how}",
        f"{percent}  {how_in_short}",
        percent,
    ]


def fitting(texts: list[str], room: int) -> str:
    """Return the first text that fits, or what fits of the last."""
    return next((text for text in texts if len(text) <= room), texts[-1][: max(room, 0)])
