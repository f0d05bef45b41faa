"""The terminal as alive-progress sees it: whole frames, and lines above them."""

import re
import textwrap
from threading import Lock
from typing import Final, TextIO

from rotator.progress.sink import Sink

_FEWEST_COLUMNS_TO_WRAP: Final = 30
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
                if columns >= _FEWEST_COLUMNS_TO_WRAP
                else line
            )
            self._sink.write(f"{_CLEAR_LINE}{wrapped}\n")

    def fileno(self) -> int:
        """Return the terminal's descriptor, whose width alive-progress asks for."""
        return self._stream.fileno()
