"""Ctrl-C between two batches, so that what has been committed is known."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# What a shell reports for a command that SIGINT ended: 128 + 2.
EXIT_STATUS = 130


@dataclass
class Interruption:
    """Whether somebody has pressed Ctrl-C."""

    asked: bool = False

    def raise_if_asked(self) -> None:
        """Give in to a Ctrl-C; to be called where nothing is left open.

        Raises:
            KeyboardInterrupt: Somebody has pressed it.
        """
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def ctrl_c_asks_first() -> Iterator[Interruption]:
    """Let the first Ctrl-C only ask; the second raises KeyboardInterrupt.

    An exception out of a COMMIT leaves open whether the commit happened; a question has no such gap.
    """
    interruption = Interruption()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if interruption.asked:
            raise KeyboardInterrupt
        interruption.asked = True

    if threading.current_thread() is not threading.main_thread():
        # Python allows signal handlers in the main thread alone, which is also where Ctrl-C arrives.
        yield interruption
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
