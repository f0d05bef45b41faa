"""Starts Python programs as forks of a process that has already imported most of what they import.

Importing Django, psycopg and this project takes most of the CPU time of a short command. A fork is a process
with its own session, environment, files and status. It runs the program from its first line to the end of the
interpreter. Only its entry in a list of processes, and its random hash seed, are those of the server.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType

from tests.signals import stop_ignoring_signals

_LIBRARIES = (
    "alive_progress",
    "django.contrib.admin",
    "django.core.management",
    "django.core.serializers.json",
    "django.db.backends.postgresql.base",
    "psycopg_pool",
    "uvloop",
)
# The import contracts forbid them to import Django, so none of their modules needs its settings.
_PACKAGES = ("rotator.postgres", "rotator.progress", "rotator.runner")
_CELERY = ("celery.bin.celery", "celery.apps.worker", "celery.concurrency.prefork", "kombu.transport.redis")
_POLL_SECONDS = 0.02


class Fork:
    """A forked program, with the methods of Popen that the harness uses."""

    def __init__(self, server: "subprocess.Popen[str]", pid: int, status: Path) -> None:
        self.pid = pid
        self._server = server
        self._status = status

    def poll(self) -> int | None:
        if self._status.exists():
            return int(self._status.read_text())
        assert self._server.poll() is None, "the fork server has ended"
        return None

    def wait(self, seconds: float = 60.0) -> int:
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), seconds)
            time.sleep(_POLL_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        # It can end at any time, and the server then writes its status.
        with suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path) -> Fork:
    """Start ``python <script> ...`` or ``python -m <module> ...`` in this folder."""
    python, *program = command
    for_python = tuple((name, value) for name, value in environment.items() if name.startswith("PYTHON"))
    server = _server(python, for_python)
    assert server.stdin is not None
    assert server.stdout is not None
    status = out.with_suffix(".status")
    request = (program, dict(environment), str(out), str(err), str(status))
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    return Fork(server, int(server.stdout.readline()), status)


@cache
def _server(python: str, for_python: tuple[tuple[str, str], ...]) -> "subprocess.Popen[str]":
    """Start a server with the variables that an interpreter reads at its start; it ends with this process."""
    stop_ignoring_signals()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.Popen(
        [python, "-m", __name__],
        env={**environment, **dict(for_python)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _serve() -> list[str]:
    """Fork for each request; return in the fork, with the program that it has to run."""
    statuses: dict[int, Path] = {}

    def reap(_number: int, _frame: FrameType | None) -> None:
        # None is left, perhaps since a signal within this handler came for the last one.
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                file = statuses.pop(ended[0])
                # A reader never sees half of it.
                part = file.with_suffix(".part")
                part.write_text(str(os.waitstatus_to_exitcode(ended[1])))
                part.rename(file)

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        program, environment, out, err, status = json.loads(line)
        # It can end before its pid is in the dictionary.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            os.setsid()
            # In place of the pipes of the server, which has no other descriptors.
            for descriptor, path in enumerate((os.devnull, out, err)):
                opened = os.open(path, os.O_WRONLY if descriptor else os.O_RDONLY)
                os.dup2(opened, descriptor)
                os.close(opened)
            os.environ.clear()
            os.environ.update(environment)
            return list(program)
        statuses[pid] = Path(status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    sys.exit()


if __name__ == "__main__":
    # Celery's own warnings are not errors of this project.
    for name in (*_LIBRARIES, *([] if sys.warnoptions else _CELERY)):
        importlib.import_module(name)
    for name in _PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)
    # The garbage collector of a fork leaves the shared memory alone.
    gc.collect()
    gc.freeze()
    sys.argv = _serve()
    # Nothing follows the program, so that the interpreter ends as ever: traceback, threads, atexit, status.
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
