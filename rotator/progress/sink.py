"""A stream that may be closed or full without ending the rotation."""

import os
import sys
from contextlib import suppress
from typing import TextIO


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
