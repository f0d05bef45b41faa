"""How far it is: a bar on a terminal, plain lines anywhere else."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from alive_progress import alive_bar

LINE_SECONDS = 3.0


class Lines:
    """Writes a plain line every few seconds, for logs and pipes."""

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._stream = stream
        self._clock = clock
        self._started = self._spoken = clock()
        self._done = 0

    def __call__(self, rows: int) -> None:
        """Count these rows, and say so when it is time."""
        self._done += rows
        now = self._clock()
        if now - self._spoken < LINE_SECONDS:
            return
        self._spoken = now
        rate = self._done / (now - self._started)
        self._stream.write(f"{self._done:,} of {self._total:,} tickets, {rate:,.0f} a second\n")
        self._stream.flush()


@contextmanager
def progress(total: int, stream: TextIO) -> Iterator[Callable[[int], object]]:
    """Give a function to be called with each batch's rows.

    Args:
        total: How many rows there will be.
        stream: Where to write; a raw stream, since Django's wrapper ends every write with a newline.
    """
    if not _shows_a_bar(stream):
        yield Lines(total, stream)
        return
    with alive_bar(total, title="Tickets", file=stream, enrich_print=False, refresh_secs=0.2) as bar:
        yield bar


def _shows_a_bar(stream: TextIO) -> bool:
    # Terminals without a width are common in containers; a bar cut to no columns would be silence.
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
