"""A temporary PostgreSQL server, which tests and benchmarks crash, stop and configure."""

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import psycopg

from core.embedded.account import Account
from core.embedded.binaries import Programs, find_programs
from core.embedded.configuration import SUPERUSER, initdb_arguments
from core.embedded.postmaster import complaint
from core.ports import unused_port

_OWN_SETTINGS: Final = {
    # A crash of the server alone, which is what happens here, loses what was not written to the system.
    "fsync": "off",
    "max_connections": "60",
    "max_prepared_transactions": "10",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "30min",
    "logging_collector": "off",
    "log_destination": "stderr",
}
_INITDB_ENDS_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.05


class OwnServerError(Exception):
    """The server does not do what it was told to; carries what it said."""


class OwnServer:
    """Runs for as long as its context lasts, in a temporary folder.

    Args:
        settings: Lines of its configuration.
        programs: Which PostgreSQL; None for the one that the embedded server would use.
        is_stock: Whether all other settings are as PostgreSQL comes; else they are those of a server that
            is made for a test and thrown away.

    Attributes:
        account: Whom the server's processes and files belong to.
        password: The password for TCP connections; tests give it to the roles that they create.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        programs: Programs | None = None,
        is_stock: bool = False,
    ) -> None:
        self.account = Account.for_server()
        self._settings = {**({} if is_stock else _OWN_SETTINGS), **(settings or {})}
        self._programs = programs
        self.password = secrets.token_hex(16)
        self.port = 0
        self.folder = Path()

    def __enter__(self) -> Self:
        """Make the cluster and start it."""
        # Not pytest's own folders: the account that root lends the server cannot enter them.
        self.folder = Path(tempfile.mkdtemp(prefix="rotator-own-"))
        try:
            self._create()
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, whatever it is at, and remove everything."""
        self._remove()

    @property
    def major(self) -> int:
        """Its major version."""
        return self._chosen().major

    def url(self, database: str, *, port: int | None = None, user: str = SUPERUSER, **options: str) -> str:
        """Return a DATABASE_URL that reaches it over TCP.

        Args:
            database: The database's name.
            port: Of a proxy, if not the server's own.
            user: Who connects; all have the same password.
            options: Of libpq, e.g. ``application_name``.
        """
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
        return (
            f"postgres://{quote(user, safe='')}:{self.password}@127.0.0.1:{port or self.port}"
            f"/{quote(database, safe='')}" + (f"?{query}" if query else "")
        )

    @property
    def socket_folder(self) -> Path:
        """The folder of its unix socket, which trusts every user who can enter it."""
        return self.folder / "socket"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """Connect to it as its superuser, in autocommit mode and past every proxy."""
        return psycopg.connect(
            host=str(self.socket_folder),
            port=self.port,
            user=SUPERUSER,
            dbname=database,
            autocommit=True,
            application_name="tests",
        )

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self._control("start", "--wait", "--timeout=60", f"--log={self._log}")

    def stop(self, mode: str = "fast") -> None:
        """Stop it and wait until it is gone.

        Args:
            mode: ``fast`` disconnects every client; ``immediate`` is a crash.
        """
        self._control("stop", "--wait", "--timeout=60", f"--mode={mode}")

    def restart(self, mode: str = "immediate") -> None:
        """Stop it, by a crash unless told otherwise, and start it again."""
        self.stop(mode)
        self.start()

    @contextmanager
    def configured(self, **settings: str) -> Iterator[None]:
        """Restart it with other settings, and with its own ones again in the end."""
        before = dict(self._settings)
        try:
            self._configure(before | settings)
            self.restart("fast")
            yield
        finally:
            self._configure(before)
            self.restart("fast")

    def log(self) -> str:
        """Return all that it has written to its log."""
        return self._log.read_text(errors="replace")

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _chosen(self) -> Programs:
        if self._programs is None:
            self._programs = find_programs(self.account, self.folder)
        return self._programs

    def _create(self) -> None:
        self.account.own(self.folder)
        programs = self._chosen()
        self.socket_folder.mkdir()
        self.account.own(self.socket_folder)
        # The folder is closed to all others; the account has to read it.
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        self._run(
            "initdb",
            *initdb_arguments(self._data, programs.major),
            "--auth-host=scram-sha-256",
            f"--pwfile={password_file}",
            "--no-sync",
        )
        password_file.unlink()
        self.port = unused_port()
        with (self._data / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude 'tests.conf'\n")
        self._configure(self._settings)

    def _configure(self, settings: Mapping[str, str]) -> None:
        self._settings = dict(settings)
        everything = self._settings | {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_folder),
        }
        file = self._data / "tests.conf"
        file.write_text("".join(f"{name} = '{value}'\n" for name, value in everything.items()))
        file.chmod(0o644)

    def _control(self, action: str, *arguments: str) -> None:
        self._run("pg_ctl", action, "--silent", f"--pgdata={self._data}", *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        completed = self.account.run([self._chosen().folder / program, *arguments])
        if completed.returncode:
            said = self.log() if self._log.exists() else ""
            raise OwnServerError(f"{program} failed: {complaint(completed.stdout)}; {complaint(said)}")

    def _remove(self) -> None:
        try:
            self._wait_for_initdb()
            if self._pid() > 0:
                self.stop("immediate")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_for_initdb(self) -> None:
        """Wait for the server that an interrupted initdb leaves behind, which ends soon, and by itself."""
        until = time.monotonic() + _INITDB_ENDS_SECONDS
        while self._pid() < 0 and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def _pid(self) -> int:
        """The server's process; negative if it is initdb's own, 0 if there is none."""
        try:
            return int((self._data / "postmaster.pid").read_text().split("\n", 1)[0] or 0)
        except FileNotFoundError:
            return 0


class OwnReplica(OwnServer):
    """A hot standby of a temporary server, which streams from it.

    Args:
        primary: The server that it is a replica of.
    """

    def __init__(self, primary: OwnServer) -> None:
        super().__init__({"wal_receiver_status_interval": "1s", "hot_standby_feedback": "off"})
        self._primary = primary
        self.password = primary.password

    def _create(self) -> None:
        self.account.own(self.folder)
        self.socket_folder.mkdir()
        self.account.own(self.socket_folder)
        self._run(
            "pg_basebackup",
            f"--pgdata={self._data}",
            f"--host={self._primary.socket_folder}",
            f"--port={self._primary.port}",
            f"--username={SUPERUSER}",
            "--checkpoint=fast",
            "--write-recovery-conf",
            "--no-sync",
        )
        self.port = unused_port()
        self._configure(self._settings)
