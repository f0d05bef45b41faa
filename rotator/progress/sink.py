"""A stream whose reader may go away without taking the rotation along."""

from typing import TextIO


class Sink:
    """Writes to a stream and falls silent for good when that fails.

    A closed pipe or a hung-up terminal is no reason to stop half-way through a leak; what was done is in
    the database.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> None:
        """Write and flush the text as it stands."""
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._gone = True

    def write_line(self, line: str) -> None:
        """Write the line with its end."""
        self.write(f"{line}\n")
