"""Shows a rotation as a bar, plain lines, JSON lines, or log records.

Bar and lines go to ``err``, and the summary to ``out``. JSON lines go to ``out``, and then the summary goes
to ``err``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TextIO, TypeAlias, get_args

from rotator.events import Observer, ignore
from rotator.progress.bar import BAR_CHARACTERS, BarObserver, terminal_columns
from rotator.progress.lines import JsonObserver, LinesObserver, LogObserver

ProgressKind: TypeAlias = Literal["auto", "bar", "lines", "json", "log", "none"]
_MIN_COLUMNS: Final = 20
PROGRESS_KINDS: Final[tuple[ProgressKind, ...]] = get_args(ProgressKind)


@contextmanager
def open_progress(
    kind: ProgressKind, *, out: TextIO, err: TextIO, hides_keys: bool = False
) -> Iterator[Observer]:
    """Yield the observer of a run; at the end, restore the terminal.

    ``auto`` is the bar where ``err`` is a terminal that can draw one, and lines elsewhere; ``bar`` always
    draws it. The streams are raw, i.e. they add no line ends. ``hides_keys`` is for log records.
    """
    match kind:
        case "none":
            yield ignore
        case "json":
            yield JsonObserver(out)
        case "log":
            yield LogObserver(hides_keys=hides_keys)
        case "auto" | "bar" if kind == "bar" or can_draw(err):
            with BarObserver(err) as observer:
                yield observer
        case _:
            yield LinesObserver(err)


def summary_stream(kind: ProgressKind, *, out: TextIO, err: TextIO) -> TextIO:
    """Return the stream for the summary: not the one of the JSON lines."""
    return err if kind == "json" else out


def can_draw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can draw a bar."""
    # Some CI runners have terminals without a width.
    is_terminal = stream.isatty() and terminal_columns(stream) >= _MIN_COLUMNS
    if not is_terminal or os.environ.get("TERM") == "dumb":
        return False
    try:
        BAR_CHARACTERS.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True
