"""Prompts, closed standard streams, and Ctrl-C before and after a run."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from django.core.management import BaseCommand
from django.core.management.base import OutputWrapper

from rotator.events import DrainStarted, Event, Observer, RotationStarted, RotationStopped


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; a closed one is not."""
    # Python has no stream at all for a descriptor that was closed when it started.
    with suppress(ValueError):
        return stream is not None and stream.isatty()
    return False


def can_ask() -> bool:
    """Return whether a user sees a question and can answer it."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def agrees(question: str) -> bool:
    """Ask a question on the terminal, and return whether the answer is yes.

    Standard output is left alone: it may hold JSON lines.
    """
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        # Ctrl-D ends no line.
        sys.stderr.write("\n")
    return answer.strip().lower() in ("y", "yes")


def open_closed_streams(command: BaseCommand) -> None:
    """Discard what is written to a closed stream.

    Otherwise a connection to the server gets the descriptor, and with it the text that is written there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - a device, until the end
        if vars(getattr(command, name))["_out"] is None:
            setattr(command, name, OutputWrapper(getattr(sys, name)))


class Interrupts:
    """The effect of Ctrl-C before and after a run, which handles it itself while it works."""

    def __init__(self) -> None:
        self._has_begun = False

    def noting(self, observer: Observer) -> Observer:
        """Return an observer that also notes when the run has begun, or has been asked to stop."""

        def observe(event: Event) -> None:
            if isinstance(event, RotationStarted | DrainStarted | RotationStopped):
                self._has_begun = True
            observer(event)

        return observe

    @contextmanager
    def until_told(self, *, ends_process: bool) -> Iterator[None]:
        """Ignore Ctrl-C once the run has ended, until its summary is written.

        People press it again when it seems to have no effect, and it may come just after the end.

        Args:
            ends_process: Whether the process ends after the summary; then Ctrl-C does not change its status.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN if ends_process and self._has_begun else before)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        if not self._has_begun:
            raise KeyboardInterrupt
