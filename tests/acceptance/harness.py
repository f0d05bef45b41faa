"""What the acceptance tests share: the real command in processes of its own, and waiting for conditions."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, urlsplit, urlunsplit

from django.conf import settings
from django.db import connection

from core.embedded.server import database_url
from tests.acceptance.fork_server import Fork, fork
from tests.signals import stop_ignoring_signals

PROJECT: Path = settings.BASE_DIR
MANAGE = (sys.executable, "manage.py")
COMMAND = "async_rotate"

_POLL_SECONDS = 0.02
# Only a test that fails waits so long; on a busy machine a rotation takes several times its usual time.
_PATIENCE_SECONDS = 60.0
_RUN_SECONDS = 180.0
_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = _PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(_POLL_SECONDS)


def query(statement: str, parameters: Sequence[int | str] = ()) -> list[tuple[object, ...]]:
    with connection.cursor() as cursor:
        # Without parameters a percent sign is a percent sign.
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def number(statement: str, parameters: Sequence[int | str] = ()) -> int:
    found = query(statement, parameters)[0][0]
    assert isinstance(found, int), f"{found!r} is no number"
    return found


def url_of(database: str | None = None) -> str:
    """Name the test database, or another one of its server, to a process that does not run under pytest."""
    name = database or str(connection.settings_dict["NAME"])
    configured = os.environ.get("TEST_DATABASE_URL")
    if not configured:
        return database_url(PROJECT, name)
    return urlunsplit(urlsplit(configured)._replace(path=f"/{quote(name, safe='')}"))


def checkpoints() -> int:
    return number("SELECT count(*) FROM rotator_completedrange")


def wait_for_checkpoints(count: int) -> None:
    wait_until(lambda: checkpoints() >= count, f"{count} checkpoints")


def backends(condition: str = "true") -> int:
    """Count the server's processes for rotations, of which this is true."""
    return number(
        "SELECT count(*) FROM pg_stat_activity"
        f" WHERE datname = current_database() AND application_name = 'rotator' AND {condition}"
    )


def wait_for_the_backends_to_go() -> None:
    wait_until(lambda: backends() == 0, "no backend of a rotation is left")


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
    def summary(self) -> list[str]:
        return self.out.splitlines()

    @property
    def resume_command(self) -> list[str]:
        """The command line that the summary's last line advises."""
        said, _, command = self.summary[-1].partition("Resume with: ")
        assert not said, f"the summary does not end with the command that resumes: {self.out}"
        assert command, f"the summary does not end with the command that resumes: {self.out}"
        return shlex.split(command)

    @property
    def complaint(self) -> str:
        """What a run says that was refused: one line on standard error and nothing else."""
        lines = self.err.splitlines()
        assert not self.out
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("CommandError: ")


class Running:
    """A process in a session of its own, whose output goes to files."""

    def __init__(self, process: "subprocess.Popen[bytes] | Fork", out: Path, err: Path) -> None:
        self._process = process
        self._out = out
        self._err = err

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def out(self) -> str:
        """What it has said on standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has said on standard error so far."""
        return self._err.read_text()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = _RUN_SECONDS) -> Finished:
        status = self._process.wait(seconds)
        return Finished(status=status, out=self._out.read_text(), err=self._err.read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Commands:
    """Starts processes, and ends those that are left when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Running] = []

    def start(
        self,
        *options: str,
        program: Sequence[str] = (*MANAGE, COMMAND),
        database: str | None = None,
        variables: Mapping[str, str] = _NO_VARIABLES,
    ) -> Running:
        """Start ``async_rotate``, or another program, on the test database."""
        return self.start_on(url_of(database), *program, *options, variables=variables)

    def start_on(self, url: str, *command: str, variables: Mapping[str, str] = _NO_VARIABLES) -> Running:
        """Start a program with this DATABASE_URL, and with further variables of the environment.

        This Python's ``manage.py`` and ``-m`` are forked from a server; behind ``env`` they are not.
        """
        stop_ignoring_signals()
        name = f"{len(self._running):02}"
        out, err = self._folder / f"{name}.out", self._folder / f"{name}.err"
        program, all_variables = resolved(command), {**environment(url), **variables}
        process: subprocess.Popen[bytes] | Fork
        with out.open("wb") as out_file, err.open("wb") as err_file:
            if program[0] == sys.executable and program[1] in ("manage.py", "-m"):
                process = fork(program, all_variables, out, err)
            else:
                process = subprocess.Popen(
                    program,
                    cwd=PROJECT,
                    env=all_variables,
                    stdin=subprocess.DEVNULL,
                    stdout=out_file,
                    stderr=err_file,
                    start_new_session=True,
                )
        self._running.append(Running(process, out, err))
        return self._running[-1]

    def run(self, *options: str, seconds: float = _RUN_SECONDS) -> Finished:
        """Run ``async_rotate`` to its end."""
        return self.start(*options).wait(seconds)

    def go_on(self, finished: Finished, *options: str) -> Finished:
        """Run what a summary advises, with more options behind it."""
        return self.start(*options, program=finished.resume_command).wait()

    @property
    def said(self) -> list[tuple[str, str]]:
        """A title and the text for each process: what it has said so far."""
        return [
            (f"process {number}, {'alive' if running.is_alive else 'ended'}", running.out + running.err)
            for number, running in enumerate(self._running)
        ]

    def end(self) -> None:
        for running in self._running:
            if running.is_alive:
                running.kill()


def environment(url: str) -> dict[str, str]:
    """Return this process's environment, with a virtual environment that looks activated."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    # The first is for the project's settings, the second for those of the tests.
    urls = {"DATABASE_URL": url, "TEST_DATABASE_URL": url}
    return {**os.environ, **urls, "PATH": path, "PYTHONWARNINGS": "error"}


def resolved(command: Sequence[str]) -> list[str]:
    """Find the program as a shell with that environment would."""
    program = shutil.which(command[0], path=environment("")["PATH"])
    assert program is not None, f"there is no {command[0]}"
    return [program, *command[1:]]
