"""What the benchmarks share: scratch databases, the project's own commands, and what a run of one costs.

Everything happens in databases of the benchmark's own, on the server that DATABASE_URL names or on the
embedded one, and every one of them is dropped at the end, however that comes about.
"""

import argparse
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, LiteralString, NoReturn, TypeVar
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

PROJECT: Final = Path(__file__).resolve().parent.parent
# A script's own folder is on the path; the project's is not.
sys.path.insert(0, str(PROJECT))

from core.embedded.account import Account  # noqa: E402
from core.embedded.binaries import find_installed_programs  # noqa: E402
from core.embedded.errors import EmbeddedServerError  # noqa: E402
from core.embedded.server import database_url  # noqa: E402
from core.own_server import OwnServer, OwnServerError  # noqa: E402

T = TypeVar("T")

TABLE: Final = "tickets_ticket"
_PREFIX: Final = "rotator_benchmark"
_STOP_SECONDS: Final = 30.0
_LAST_LINES: Final = 5
# What a shell reports for a command that a signal ended.
_SIGNAL_BASE: Final = 128
_SETTINGS: Final[dict[str, dict[str, str]]] = {
    "stock": {},
    "tuned": {"max_wal_size": "16GB", "shared_buffers": "2GB", "checkpoint_timeout": "30min"},
}
_POLL_SECONDS: Final = 0.02
_KILOBYTE: Final = 1024
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text is one sentence."""


class _Signalled(KeyboardInterrupt):
    """A signal came; an interrupt, since upon that the driver cancels what the server is at.

    Args:
        number: Which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A command that has ended well.

    Attributes:
        seconds: From the start of its process to its exit.
        cpu_seconds: What the process used of the processor, in user mode and in the kernel.
        peak_bytes: The high-water mark of the process's own resident memory; 0 where the system does not say.
        output: What it said.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotated:
    """One run of ``async_rotate``.

    Attributes:
        command: The process.
        report: What it wrote with ``--report``.
    """

    command: Finished
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What the tickets take at one moment.

    Attributes:
        heap_bytes: The table without its indexes.
        index_bytes: All of its indexes.
        wal_position: How many bytes of WAL the server, all of it, has ever inserted.
    """

    heap_bytes: int
    index_bytes: int
    wal_position: int


class Database:
    """One database of the benchmark's own.

    Args:
        url: What DATABASE_URL has to be for a command to use it.
        name: Its name.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._url = url

    @property
    def url(self) -> str:
        """What DATABASE_URL has to be for a command to use it."""
        return self._url

    def folder(self) -> AbstractContextManager[Path]:
        """A temporary folder, for what a command keeps in files."""
        return _folder()

    def connection(self) -> AbstractContextManager[psycopg.Connection]:
        """Connect in autocommit mode, for as long as the context lasts."""
        return _connection(self._url)

    def fetch(self, query: str) -> tuple[Any, ...]:
        """Return the first row of a query of the benchmark's own."""
        with self.connection() as connection:
            return _first_row(connection, query)

    def run(self, *statements: str) -> None:
        """Execute statements of the benchmark's own, each for itself, in one session."""
        with self.connection() as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def storage(self) -> Storage:
        """Measure what the tickets take now."""
        # Where WAL has been inserted, not how far it was written: that lags behind asynchronous commits.
        heap, indexes, wal = self.fetch(
            f"SELECT pg_table_size('{TABLE}'), pg_indexes_size('{TABLE}'),"
            " pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
        )
        return Storage(heap_bytes=heap, index_bytes=indexes, wal_position=wal)

    def manage(self, *arguments: str) -> Finished:
        """Run ``manage.py`` in a process of its own.

        Raises:
            BenchmarkError: It failed; carries the last of what it said.
        """
        return self.program(sys.executable, str(PROJECT / "manage.py"), *arguments)

    def program(self, *command: str) -> Finished:
        """Run a program with this database in ``DATABASE_URL``, and wait for its end.

        Raises:
            BenchmarkError: It failed; carries the last of what it said.
        """
        environment = {**os.environ, "DATABASE_URL": self._url, "PYTHONPATH": str(PROJECT)}
        with tempfile.TemporaryFile() as said:
            started = time.perf_counter()
            process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            with _ended_with_us(process), _peak_of(process.pid) as peak:
                # Not Popen.wait(): the usage of this one child is asked for, and no other's.
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
            said.seek(0)
            output = said.read().decode(errors="replace")
            if process.returncode:
                last_words = output.strip().splitlines()[-_LAST_LINES:]
                raise BenchmarkError(
                    f"{Path(command[1]).name} {' '.join(command[2:])} failed with status "
                    f"{process.returncode}: " + " / ".join(last_words)
                )
        return Finished(
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=peak.found_bytes,
            output=output,
        )

    def rotate(
        self, *, concurrency: int, batch: int, rows: int, vacuum: bool = True, more: tuple[str, ...] = ()
    ) -> Rotated:
        """Run ``manage.py async_rotate`` to completion.

        Raises:
            BenchmarkError: It failed, or did not rotate this many rows.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "report.json"
            options = [f"--concurrency={concurrency}", f"--batch={batch}", f"--report={file}"]
            options += more
            if not vacuum:
                options.append("--no-vacuum")
            finished = self.manage("async_rotate", "--progress=none", "--noinput", *options)
            report: dict[str, Any] = json.loads(file.read_text())
        if (report["status"], report["rows_this_run"]) != ("completed", rows):
            raise BenchmarkError(
                f"async_rotate ended as {report['status']} with {report['rows_this_run']:,} of {rows:,} rows."
            )
        return Rotated(command=finished, report=report)


class Server:
    """The server, and the databases that the benchmark made on it.

    Args:
        url: Any database of it, with an account that may create databases.
    """

    def __init__(self, url: str) -> None:
        # Unlike Django's, libpq's name for the scheme is one of two.
        self._url = urlsplit(url)._replace(scheme="postgresql")
        self._run = f"{_PREFIX}_{os.getpid()}_{secrets.token_hex(3)}"
        self._made: list[str] = []

    def fetch(self, query: str) -> tuple[Any, ...]:
        """Return the first row of a query of the benchmark's own."""
        with self.connection() as connection:
            return _first_row(connection, query)

    def tickets(self, rows: int) -> Database:
        """Make a database with this many tickets, vacuumed and analyzed, to be copied for each repetition.

        Raises:
            BenchmarkError: A command failed, or the account may not create databases.
        """
        say(f"creating {rows:,} tickets")
        database = self._create("template0")
        database.manage("migrate", "--verbosity=0")
        # A vacuum that falls into one repetition and not into another would be noise.
        database.run(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = false)")
        database.manage("create_tickets", f"--total={rows}", "--verbosity=0")
        return database

    @contextmanager
    def copied(self, original: Database) -> Iterator[Database]:
        """Copy a database for one measurement, and drop the copy after it.

        Every measurement begins with the very same files: the same order of rows in the heap, the same free
        space, the same splits in the indexes. VACUUM FULL between repetitions would not do that: it keeps the
        order in which the last contestant wrote the rows, so each would start from what the other left,
        and it rebuilds the indexes denser than a table in use ever has them. Copying file by file also
        leaves the new database cold in the server's own buffers, and ends with a checkpoint, so that every
        page's first change writes a full image, for each contestant alike.
        """
        copy = self._create(original.name, "STRATEGY FILE_COPY")
        # What earlier measurements left to the kernel would delay the WAL of this one.
        os.sync()
        try:
            yield copy
        finally:
            self._drop(copy.name)

    def drop(self, database: Database) -> None:
        """Drop a database that is not needed any more."""
        self._drop(database.name)

    def drop_all(self) -> None:
        """Drop everything that was made and is still there."""
        for name in reversed(self._made.copy()):
            self._drop(name)

    def _create(self, template: str, options: LiteralString = "") -> Database:
        name = f"{self._run}_{len(self._made)}"
        # On record before it exists: dropping tolerates one that was never made.
        self._made.append(name)
        with self.connection() as connection:
            try:
                connection.execute(
                    sql.SQL("CREATE DATABASE {} TEMPLATE {} {}").format(
                        sql.Identifier(name), sql.Identifier(template), sql.SQL(options)
                    )
                )
            except psycopg.errors.InsufficientPrivilege as error:
                raise BenchmarkError(
                    "The account may not create databases: give it CREATEDB, or unset DATABASE_URL."
                ) from error
        return Database(self._url._replace(path=f"/{name}").geturl(), name)

    def _drop(self, name: str) -> None:
        with self.connection() as connection:
            # FORCE ends whatever an interrupted measurement has left connected.
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )
            self._made.remove(name)

    def connection(self) -> AbstractContextManager[psycopg.Connection]:
        """Connect to a database that is none of the benchmark's, in autocommit mode."""
        return _connection(self._url.geturl())


def run_script(measure: Callable[[Server], bool], *, server: str) -> NoReturn:
    """Run a benchmark on a server, clean up whatever happens, and exit.

    Args:
        measure: Whether what the benchmark is about holds.
        server: The server, as ``--server`` names it.

    The process exits with 0 if what the benchmark returns is true, 1 if not, 2 if it could not be run, and
    128 and the signal's number if one ended it.
    """
    # The settings that may be exported are those of another project.
    os.environ["DJANGO_SETTINGS_MODULE"] = "core.settings"
    for number in _SIGNALS:
        signal.signal(number, _raise_signalled)
    try:
        with _url_of(server) as url:
            databases = Server(url)
            try:
                holds = measure(databases)
            finally:
                _ignore_signals()
                databases.drop_all()
    except (BenchmarkError, EmbeddedServerError, OwnServerError, psycopg.Error) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except _Signalled as signalled:
        say("interrupted; nothing is left behind")
        sys.exit(_SIGNAL_BASE + signalled.number)
    sys.exit(0 if holds else 1)


def statement(database: Database, text: str) -> float:
    """Execute one statement and return the seconds it took."""
    with database.connection() as connection:
        started = time.perf_counter()
        connection.execute(text.encode())
        return time.perf_counter() - started


def interleaved(repetitions: int, ways: dict[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Measure each way so many times, in turns, so that a drift of the machine meets all of them alike."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for repetition in range(1, repetitions + 1):
        for name, measure in ways.items():
            say(f"repetition {repetition} of {repetitions}: {name}")
            found[name].append(measure())
    return found


def say(what: str) -> None:
    """Report the current step."""
    print(f"... {what}", file=sys.stderr, flush=True)


def parser_for(
    description: str,
    *,
    repetitions: int,
    rows: int | None = 1_000_000,
    concurrency: int = 4,
    batch: int = 2000,
) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks take, and these defaults.

    Args:
        description: What the benchmark shows.
        repetitions: How often each contestant is measured.
        rows: The number of tickets; None for a benchmark that does not measure one table.
        concurrency: For ``async_rotate``.
        batch: For ``async_rotate``.
    """
    parser = argparse.ArgumentParser(description=description)
    add_numbers(
        parser,
        at_least_one,
        ("repetitions", repetitions, "N", "how often each contestant is measured, in turns"),
        *([] if rows is None else [("rows", rows, "N", "the number of tickets")]),
        ("concurrency", concurrency, "N", "async_rotate's --concurrency"),
        ("batch", batch, "N", "async_rotate's --batch"),
    )
    parser.add_argument(
        "--server",
        choices=(*_SETTINGS, "project"),
        default="stock",
        help="a new server of the installed PostgreSQL with its default settings (stock) or with "
        + ", ".join(f"{name} = {value}" for name, value in _SETTINGS["tuned"].items())
        + " (tuned), or the server of DATABASE_URL or the embedded one (project) (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=writable, metavar="FILE", help="write every measurement to this file too"
    )
    return parser


def add_numbers(
    parser: argparse.ArgumentParser, kind: Callable[[str], float], *options: tuple[str, float, str, str]
) -> None:
    """Add options that take one number each.

    Args:
        parser: The parser.
        kind: Reads the number.
        options: The name, the default, the unit and the meaning of each option.
    """
    for name, default, unit, meaning in options:
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=unit, help=f"{meaning} (default: %(default)s)"
        )


def at_least_one(text: str) -> int:
    """Read an option's number.

    Raises:
        ArgumentTypeError: It is not a whole number from 1 on.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def writable(text: str) -> Path:
    """Read an option's file, which the measurements go to when it is late to find that it cannot be written.

    Raises:
        ArgumentTypeError: It cannot.
    """
    path = Path(text)
    try:
        # Appending nothing leaves an older file as it is, should this run not come to write one.
        with path.open("a"):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be written: {error.strerror}") from error


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def _url_of(server: str) -> Iterator[str]:
    if server == "project":
        url = os.environ.get("DATABASE_URL")
        if not url:
            print(
                "The embedded server is built without OpenSSL: its gen_random_uuid() opens a device for each "
                "value. This slows down one UPDATE, and flatters the rotation. Compare them with --server "
                "stock."
            )
        yield url or database_url(PROJECT)
        return
    programs = find_installed_programs(Account.for_server())
    if programs is None:
        raise BenchmarkError(
            "No PostgreSQL is installed. Install your system's package (postgresql), or use --server project."
        )
    say("starting a server")
    with OwnServer(_SETTINGS[server], programs=programs, is_stock=True) as own:
        yield own.url("postgres")


class _Peak:
    """Polls a process's high-water mark of memory, which the system does not report after its end.

    The usage of a child that the system reports begins with the parent's memory, which forking copies.
    """

    def __init__(self, pid: int) -> None:
        self.found_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()

    def watch(self) -> None:
        """Go on until told to end."""
        while not self._over.wait(_POLL_SECONDS):
            with suppress(OSError):
                found = re.search(r"^VmHWM:\s*(\d+) kB", self._status.read_text(), re.MULTILINE)
                self.found_bytes = int(found[1]) * _KILOBYTE if found else self.found_bytes

    def end(self) -> None:
        """Stop watching."""
        self._over.set()


@contextmanager
def _peak_of(pid: int) -> Iterator[_Peak]:
    peak = _Peak(pid)
    watcher = threading.Thread(target=peak.watch, name="peak memory")
    watcher.start()
    try:
        yield peak
    finally:
        peak.end()
        watcher.join()


@contextmanager
def _connection(url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(url, autocommit=True, application_name="rotator benchmark") as connection:
        yield connection


def _first_row(connection: psycopg.Connection, query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(query.encode()).fetchone()
    if row is None:
        raise BenchmarkError(f"This query found nothing: {query}")
    return row


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no child behind: one that has not ended is told to, and killed if it does not."""
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _raise_signalled(number: int, _frame: FrameType | None) -> NoReturn:
    _ignore_signals()
    raise _Signalled(number)


def _ignore_signals() -> None:
    """From here on it is all cleaning up, which an impatient second Ctrl-C must not cut short."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
