"""A command's terminal and shell: prompts, streams, Ctrl-C, files, and the command to resume with."""

import gc
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

import psycopg
from django.core.management import BaseCommand, CommandError
from django.core.management.base import OutputWrapper

from rotator import __version__
from rotator.events import DrainStarted, Event, Observer, RotationStarted, RotationStopped
from rotator.exceptions import OptionError, RotatorError
from rotator.options import OPTIONS_OF_ONE_RUN

INTERRUPTED: Final = 128 + signal.SIGINT
"""The exit status of a command that Ctrl-C ended."""


class OwnCommand(BaseCommand):
    """A command of this app."""

    # The checks of the whole project would delay, or prevent, an urgent rotation.
    requires_system_checks = ()

    @property
    def is_called_by_code(self) -> bool:
        """Whether ``call_command()`` runs it, and not a command line."""
        return not self._called_from_command_line  # type: ignore[attr-defined] # missing in the stubs

    @property
    def out(self) -> TextIO:
        """Raw standard output."""
        # Django's wrapper ends every write with a line end, also in the middle of a bar.
        stream: TextIO = vars(self.stdout)["_out"]
        return stream

    @property
    def err(self) -> TextIO:
        """Raw standard error."""
        stream: TextIO = vars(self.stderr)["_out"]
        return stream

    def execute(self, *arguments: Any, **options: Any) -> str | None:  # noqa: ANN401 - Django's signature
        """Run the command, and show an error of the rotator without its traceback."""
        _open_closed_streams(self)
        try:
            return super().execute(*arguments, **options)
        except RotatorError as error:
            raise CommandError(str(error), returncode=error.exit_status) from error

    def run_from_argv(self, argv: list[str]) -> None:
        """Run the command with the arguments of a command line."""
        # Imported modules live until the process ends: the garbage collector need not look at them any more.
        gc.freeze()
        super().run_from_argv(argv)

    def get_version(self) -> str:
        """Return the version of this app, not Django's, for ``--version``."""
        return __version__


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; a closed one is not."""
    # Python has no stream for a descriptor that was closed when Python started.
    with suppress(ValueError):
        return stream is not None and stream.isatty()
    return False


def can_ask() -> bool:
    """Return whether the user sees a question and can answer it."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def agrees(question: str) -> bool:
    """Ask a question on the terminal, and return whether the answer is yes."""
    # Not on standard output, which may hold JSON lines.
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        # Ctrl-D ends no line.
        sys.stderr.write("\n")
    return answer.strip().lower() in ("y", "yes")


def _open_closed_streams(command: BaseCommand) -> None:
    """Discard the text for a closed stream.

    Otherwise a connection to the server gets the stream's descriptor, and then the text.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - stays open until the process ends
        if vars(getattr(command, name))["_out"] is None:
            setattr(command, name, OutputWrapper(getattr(sys, name)))


def hide_errors_of_lost_connections() -> None:
    """Print no traceback where Python collects what psycopg had left unfinished on a lost connection.

    The run itself has already reported the loss. To be called once in a process of one command.
    """
    before = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, psycopg.Error):
            before(unraisable)

    sys.unraisablehook = report


@contextmanager
def hold_interrupts(*, ends_process: bool) -> Iterator[Callable[[Observer], Observer]]:
    """Ignore Ctrl-C from the end of a run until its summary is written.

    Users press it again when it seems to have no effect, and it may come just after the end. While the run
    works, it handles Ctrl-C itself.

    If the process ends after the summary, Ctrl-C does not change its status. Yields a function that wraps
    an observer to note that the run has begun.
    """
    has_begun = False

    def note_start(observer: Observer) -> Observer:
        def observe(event: Event) -> None:
            nonlocal has_begun
            has_begun = has_begun or isinstance(event, RotationStarted | DrainStarted | RotationStopped)
            observer(event)

        return observe

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not has_begun:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield note_start
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield note_start
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if ends_process and has_begun else before)


def writable(path: Path | str | None) -> Path | None:
    """Check that a file can be written, and return its path; leaves the file as it is."""
    if path is None:
        return None
    path = Path(path)
    try:
        # A run that ends before its summary leaves an older report as it is, and begins no new one.
        is_new = not path.exists()
        # Opening one waits for its reader. /dev/stdout and /dev/fd/63 are open already.
        found = path.resolve()
        if found.is_fifo() and not found.is_relative_to("/dev"):
            raise OptionError(f"Cannot write to the file {path}: it is a named pipe. Name another file.")
        with path.open("ab", buffering=0) as file:
            # A full device refuses even this.
            file.write(b"")
        if is_new:
            path.unlink()
    except OSError as error:
        raise OptionError(f"Cannot write to the file {path}: {error.strerror}. Name another file.") from error
    return path


def write_report(path: Path | None, facts: Mapping[str, object]) -> None:
    """Write facts to a file as JSON; do nothing without a file."""
    if path is not None:
        try:
            path.write_text(f"{json.dumps(facts, indent=2)}\n")
        except OSError as error:
            raise CommandError(f"The report could not be written: {error}") from error


def resume_command(arguments: list[str], *, python: Path, folder: Path) -> str:
    """Return the command line of a run in a folder without the options for that run alone."""
    program, *words = arguments
    kept = [program]
    if Path(program).suffix == ".py":
        # A virtual environment below this folder need not be active.
        interpreter = python.relative_to(folder) if python.is_relative_to(folder) else "python"
        kept = [str(interpreter), program]
    omitted = [f"--{name.replace('_', '-')}" for name in OPTIONS_OF_ONE_RUN]
    is_value = False
    for word in words:
        if not is_value and word.partition("=")[0] not in omitted:
            kept.append(word)
        is_value = word == "--stop-after"
    return shlex.join(kept)
