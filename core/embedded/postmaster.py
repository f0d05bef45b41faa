"""The server's main process: whether it runs, and how it is started and stopped."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

from psycopg import pq
from psycopg.conninfo import make_conninfo

from core.embedded.account import Account
from core.embedded.binaries import Programs
from core.embedded.configuration import PORT, SUPERUSER, server_arguments
from core.embedded.errors import EmbeddedServerError

_START_LIMIT_SECONDS: Final = 600
"""Longer than crash recovery takes over ``max_wal_size`` on a slow disk."""
_STOP_LIMIT_SECONDS: Final = 300
_LAUNCHES: Final = 6
_RELAUNCH_PAUSE_SECONDS: Final = 0.2
_POLL_SECONDS: Final = 0.02
_EXEC_POLLS: Final = 100
_EXEC_POLL_SECONDS: Final = 0.002
# The states of a zombie and of a process that is being removed, in proc(5).
_ENDED: Final = (b"Z", b"X", b"x")

# The shell ends at once, so the server is no child of ours: it outlives us, and leaves us no zombie.
_IN_THE_BACKGROUND: Final = ("/bin/sh", "-c", '"$@" >&2 & echo $!', "sh")


class Postmaster:
    """The main process over one data folder. All but ``answers`` needs the start lock.

    Args:
        data: The cluster's folder.
        socket_folder: Where its socket is.
        log: The file that its messages are appended to.
        account: The account that it runs under.
    """

    def __init__(self, *, data: Path, socket_folder: Path, log: Path, account: Account) -> None:
        self._data = data
        self._socket_folder = socket_folder
        self._log = log
        self._account = account
        self._log_start_bytes = 0

    def answers(self) -> bool:
        """Whether it takes connections."""
        return self._ping() is pq.Ping.OK

    def start(self, programs: Programs) -> None:
        """Start it, or wait for one that is about to answer.

        Raises:
            EmbeddedServerError: It does not start; carries what the server said.
        """
        deadline = time.monotonic() + _START_LIMIT_SECONDS
        launched: int | None = None
        launches = 0
        while (answer := self._ping()) is not pq.Ping.OK:
            if time.monotonic() > deadline:
                raise self._failure(f"did not answer within {_START_LIMIT_SECONDS} seconds")
            # A rejection comes from a living server, even from one whose process is out of our sight.
            if answer is pq.Ping.REJECT or self._is_ours(launched) or self._pid() is not None:
                time.sleep(_POLL_SECONDS)
                continue
            # A killed server's children hold on to its shared memory for a moment longer.
            passing = 0 < launches < _LAUNCHES and "shared memory" in self._last_words()
            if launches and not passing:
                raise self._failure("does not start")
            time.sleep(_RELAUNCH_PAUSE_SECONDS * launches)
            launched = self._launch(programs)
            launches += 1

    def stop(self) -> None:
        """Shut it down in order, its clients disconnected; return when it is gone.

        Does nothing where none runs, and gives up waiting after some minutes.
        """
        pid = self._pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        deadline = time.monotonic() + _STOP_LIMIT_SECONDS
        while self._is_ours(pid) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _ping(self) -> pq.Ping:
        conninfo = make_conninfo(host=str(self._socket_folder), port=PORT, user=SUPERUSER, dbname="postgres")
        return pq.Ping(pq.PGconn.ping(conninfo.encode()))

    def _pid(self) -> int | None:
        """Return the process that the pid file names, if it is a server over this very folder."""
        try:
            pid = int((self._data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        return pid if self._is_ours(pid) else None

    def _is_ours(self, pid: int | None) -> bool:
        return pid is not None and f" -D {self._data} " in command_line(pid)

    def _launch(self, programs: Programs) -> int:
        # A pid file outlives a killed server, and its number may be a stranger's or a zombie's by now,
        # which PostgreSQL takes for a server. Behind it stands the check of the shared memory.
        for stale in (self._data / "postmaster.pid", self._socket_folder / f".s.PGSQL.{PORT}.lock"):
            stale.unlink(missing_ok=True)
        arguments = server_arguments(self._data, self._socket_folder)
        # The log can hold values of rows.
        with os.fdopen(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._log_start_bytes = log.seek(0, os.SEEK_END)
            command = [*_IN_THE_BACKGROUND, str(programs.folder / "postgres"), *arguments]
            return int(self._account.run(command, log=log).stdout)

    def _last_words(self) -> str:
        """Return what the server complained of since it was last launched."""
        try:
            # The log of months can be large.
            with self._log.open("rb") as log:
                log.seek(self._log_start_bytes)
                printed = log.read()
        except FileNotFoundError:
            return ""
        return complaint(printed.decode(errors="replace"))

    def _failure(self, what: str) -> EmbeddedServerError:
        return EmbeddedServerError(
            f"The embedded PostgreSQL {what} ({self._last_words() or 'it said nothing'}): see {self._log}, "
            "or set DATABASE_URL to a server of yours."
        )


def complaint(printed: str) -> str:
    """Return the last line of a PostgreSQL program's messages that names an error, else the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if any(mark in line for mark in ("FATAL:", "PANIC:", "error:"))]
    return (errors or lines or [""])[-1]


def command_line(pid: int) -> str:
    """Return a process's command line, its arguments parted and ended by blanks.

    Empty where there is no such process, or only a zombie of it.
    """
    if Path("/proc/self/cmdline").exists():
        return _command_line_of_proc(Path(f"/proc/{pid}"))
    listed = subprocess.run(  # noqa: S603 -- a number is all that varies
        ["/bin/ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, check=False
    )
    return os.fsdecode(listed.stdout.rstrip(b"\n") + b" ")


def _command_line_of_proc(process: Path) -> str:
    try:
        for _ in range(_EXEC_POLLS):
            arguments = (process / "cmdline").read_bytes()
            state = (process / "stat").read_bytes().rpartition(b")")[2].split()[0]
            if arguments or state in _ENDED:
                return os.fsdecode(arguments.replace(b"\0", b" "))
            # In the middle of exec, there are none for a moment. A thread of the kernel never has any.
            time.sleep(_EXEC_POLL_SECONDS)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return ""
