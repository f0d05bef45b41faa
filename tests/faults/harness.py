"""The real command in processes of its own, and waiting for conditions."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parent.parent.parent
MANAGE: Final = (sys.executable, "manage.py")
COMMAND: Final = "async_rotate"
_POLL_SECONDS: Final = 0.01


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = 30.0) -> None:
    """Wait for a condition, and fail where it does not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How a process ended.

    Attributes:
        status: Its exit status; negative for a signal that killed it.
        out: All of its standard output.
        err: All of its standard error.
    """

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything that it printed."""
        return self.out + self.err

    @property
    def complaint(self) -> str:
        """What a run says that could not begin: one line on standard error and nothing else."""
        *before, last = self.err.splitlines()
        assert not self.out, self.out
        # What it waited for, or warned of, before it gave up.
        assert not any("Error" in line or "Traceback" in line for line in before), self.err
        return last.removeprefix("CommandError: ")

    def assert_completed(self) -> None:
        """It ended as it should."""
        assert self.status == 0, self.said
        assert self.out.startswith("Completed: "), self.said


class Running:
    """A process in a session of its own, whose output goes to files."""

    def __init__(self, process: "subprocess.Popen[bytes]", out: Path, err: Path) -> None:
        self._process = process
        self._out = out
        self._err = err

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def err(self) -> str:
        """What it has said on standard error so far."""
        return self._err.read_text()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> Finished:
        """Wait until it ends."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {seconds:.0f} s; it has said: {self.err}") from None
        return Finished(status=status, out=self._out.read_text(), err=self._err.read_text())

    def kill(self) -> None:
        """End it the hard way."""
        self._process.kill()
        self._process.wait()


class Commands:
    """Starts processes, and ends those that are left when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Running] = []

    def start(self, url: str, *options: str, command: str = COMMAND) -> Running:
        """Start a command of ``manage.py`` with this DATABASE_URL."""
        name = f"{len(self._running):03}"
        out, err = self._folder / f"{name}.out", self._folder / f"{name}.err"
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [*MANAGE, command, *options],
                cwd=PROJECT,
                env={**os.environ, "DATABASE_URL": url, "PYTHONWARNINGS": "error"},
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )
        self._running.append(Running(process, out, err))
        return self._running[-1]

    def run(self, url: str, *options: str, command: str = COMMAND, seconds: float = 60.0) -> Finished:
        """Run a command to its end."""
        return self.start(url, *options, command=command).wait(seconds)

    def end(self) -> None:
        """Kill what still runs."""
        for running in self._running:
            if running.is_alive:
                running.kill()
