"""One server for all processes of this clone: the first one in starts it, the last one out stops it."""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from core.embedded.account import Account
from core.embedded.binaries import Programs, find_programs
from core.embedded.configuration import DATABASE, PORT, SUPERUSER, initdb_arguments
from core.embedded.errors import EmbeddedServerError
from core.embedded.postmaster import Postmaster, complaint
from core.embedded.state import belongs_to_another, make_state_folder, private_socket_folder, state_folder


class EmbeddedServer:
    """The server of one state folder, as one process uses it.

    Two file locks carry it all, because the kernel frees them however a process ends. Who starts,
    joins or leaves holds the start lock; who uses the server shares the users' lock, so the one
    that can have it alone is the last.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._data = state / "data"
        self._account = Account.for_server()
        self._users_lock: int | None = None

    def attach(self) -> Path:
        """Start the server where it is not running, and keep it for this process.

        Returns:
            The folder of its unix socket.

        Raises:
            EmbeddedServerError: It cannot be started, or it belongs to another user.
        """
        make_state_folder(self._state, self._account)
        with self._start_lock():
            postmaster = self._postmaster()
            if not postmaster.answers():
                programs = find_programs(self._account, self._state)
                self._ensure_cluster(programs)
                postmaster.start(programs)
            socket_folder = private_socket_folder(self._state, self._account)
            _ensure_database(socket_folder)
            self._join()
            return socket_folder

    def leave(self) -> None:
        """Stop the server where no other process uses it."""
        if self._users_lock is None:
            return
        try:
            with self._start_lock():
                users_lock, self._users_lock = self._users_lock, None
                try:
                    fcntl.flock(users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._postmaster().stop()
                except BlockingIOError:
                    pass
                finally:
                    os.close(users_lock)
        except FileNotFoundError:
            # The whole folder was removed; the server sees that itself within a minute, and ends.
            return

    def abandon(self) -> None:
        """Forget the server without a word: in a forked child, where the lock is the parent's."""
        if self._users_lock is not None:
            os.close(self._users_lock)
            self._users_lock = None

    @contextmanager
    def _start_lock(self) -> Iterator[None]:
        lock = self._open_lock("start.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _join(self) -> None:
        self.abandon()
        self._users_lock = self._open_lock("users.lock")
        fcntl.flock(self._users_lock, fcntl.LOCK_SH)

    def _open_lock(self, name: str) -> int:
        try:
            return os.open(self._state / name, os.O_RDWR | os.O_CREAT, 0o600)
        except PermissionError:
            raise belongs_to_another(self._state) from None

    def _postmaster(self) -> Postmaster:
        return Postmaster(
            data=self._data,
            socket_folder=private_socket_folder(self._state, self._account),
            log=self._state / "server.log",
            account=self._account,
        )

    def _ensure_cluster(self, programs: Programs) -> None:
        for leftover in self._state.glob("data-*"):
            # The initdb of a killed first start may still be at it: then the next start clears up.
            shutil.rmtree(leftover, ignore_errors=True)
        if not self._data.exists():
            self._create_cluster(programs)
        if self._data.stat().st_uid != self._account.uid:
            raise belongs_to_another(self._state)
        major = int((self._data / "PG_VERSION").read_text())
        if major != programs.major:
            raise EmbeddedServerError(
                f"The data in {self._state} was made by PostgreSQL {major}, and the server found here is "
                f"PostgreSQL {programs.major}: remove the folder to begin with an empty database, "
                "or set DATABASE_URL."
            )

    def _create_cluster(self, programs: Programs) -> None:
        unfinished = Path(tempfile.mkdtemp(prefix="data-", dir=self._state))
        self._account.own(unfinished)
        arguments = initdb_arguments(unfinished, programs.major)
        completed = self._account.run([programs.folder / "initdb", *arguments])
        if completed.returncode:
            raise EmbeddedServerError(
                f"The embedded PostgreSQL could not be set up in {self._state} "
                f"({complaint(completed.stdout)}): make room there, or set DATABASE_URL."
            )
        # Renamed when it is whole, so that a killed first start leaves no half cluster behind.
        unfinished.rename(self._data)


def _ensure_database(socket_folder: Path) -> None:
    with psycopg.connect(
        host=str(socket_folder), port=PORT, user=SUPERUSER, dbname="postgres", autocommit=True
    ) as connection:
        found = connection.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE])
        if not found.rowcount:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))


@functools.cache
def socket_folder(project: Path) -> Path:
    """Attach this process to its clone's server, once, until it exits.

    Args:
        project: The clone.

    Raises:
        EmbeddedServerError: The server cannot be started.
    """
    server = EmbeddedServer(state_folder(project, Account.for_server()))
    folder = server.attach()
    atexit.register(_leave_at_exit, server)
    # A forked child has to join for itself, or the server would end with its parent.
    os.register_at_fork(after_in_child=server.abandon)
    os.register_at_fork(after_in_child=socket_folder.cache_clear)
    return folder


def _leave_at_exit(server: EmbeddedServer) -> None:
    # By then the server has been told to stop, and it does so without being waited for.
    with contextlib.suppress(KeyboardInterrupt):
        server.leave()


def database_url(project: Path, name: str = DATABASE) -> str:
    """Return what ``DATABASE_URL`` has to be for another process to use a database of this server.

    That process has no part in keeping the server: it runs for as long as this one, or longer.

    Args:
        project: The clone.
        name: The database.

    Raises:
        EmbeddedServerError: The server cannot be started.
    """
    host = quote(str(socket_folder(project)), safe="")
    return f"postgres://{SUPERUSER}@{host}:{PORT}/{quote(name, safe='')}"
