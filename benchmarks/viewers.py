"""What viewers of the page cost a rotation, in rows per second and in CPU time."""

import argparse
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Final

import psycopg
from harness import (
    PROJECT,
    BenchmarkError,
    Database,
    Server,
    at_least_one,
    parser_for,
    run_script,
    say,
)
from presenting import Machine, Spread, write_json
from serving import LOGIN_ONLY

MOST_COST: Final = 0.02
FIRST_SECONDS: Final = 2.0
_PORT: Final = 8791
_START_SECONDS: Final = 20.0
_LOWEST_PRIORITY: Final = 19
# Each copy of the database has one rotation, with the first id.
_STATE: Final = "/admin/rotator/rotation/1/state/"
_EVERY: Final = re.compile(rb'"every_seconds": ([\d.]+)')
_HEAD: Final = re.compile(rb"HTTP/1.1 (\d+).*?\r\nContent-Length: (\d+)\r\n.*?\r\n\r\n", re.DOTALL)
_LOG_IN: Final = (
    "from django.contrib.auth.models import User; from django.test import Client; c = Client();"
    " c.force_login(User.objects.create_superuser('viewer')); print('session', c.cookies['sessionid'].value)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A web process that viewers read the page from.

    Attributes:
        name: Its name in the output.
        path: The path that they read.
        port: Its port.
        process: The process.
    """

    name: str
    path: str
    port: int
    process: subprocess.Popen[bytes]


@dataclass(kw_only=True, slots=True)
class Watched:
    """What was measured of the viewers of one site.

    Attributes:
        costs: The part of the rows/s that each time with viewers has cost.
        answers: The seconds of each answer.
        seconds: The time with viewers.
        web_seconds: The CPU time of the web process in that time.
        backend_seconds: The CPU time of its backends in that time.
        viewer_seconds: The CPU time of the viewers themselves.
    """

    costs: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    seconds: float = 0.0
    web_seconds: float = 0.0
    backend_seconds: float = 0.0
    viewer_seconds: float = 0.0


# The site whose viewers read in a time, with its start and its end; None without viewers.
Times = list[tuple[Site | None, float, float]]


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "Compare the rows per second of a rotation with and without viewers of its page. Viewers come and "
        "go while it runs: each time with them is compared with those before and after it. Each viewer "
        "reads the JSON view over a connection that it keeps, as often as the answers say, as the page's "
        "script does. In other times, they read a constant that needs the same login as often: what Django "
        "itself costs.",
        repetitions=3,
        rows=5_000_000,
    )
    parser.add_argument("--viewers", type=at_least_one, default=20, metavar="N", help="the number of viewers")
    parser.add_argument("--pace", default="balanced", help="async_rotate's --pace (default: %(default)s)")
    parser.add_argument(
        "--nice",
        type=int,
        default=0,
        help="the priority of the web process: 19 stands for one on another host (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=at_least_one, default=4, metavar="N", help="of each time with or without viewers"
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="another working copy of this project: a site with its code is watched in turns, too",
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    # All processes of the sites have the same.
    os.environ["SECRET_KEY"] = secrets.token_hex(30)
    original = server.tickets(options.rows)
    chosen = {"page": (PROJECT, _STATE), "login only": (PROJECT, f"/{LOGIN_ONLY}")}
    if options.before:
        chosen["page before"] = (options.before.resolve(), _STATE)
    found = {name: Watched() for name in chosen}
    for repetition in range(1, options.repetitions + 1):
        say(f"repetition {repetition} of {options.repetitions}")
        with server.copied(original) as database, ExitStack() as open_sites:
            cookie = database.manage("shell", "-c", _LOG_IN).output.partition("session ")[2].split()[0]
            sites = [
                open_sites.enter_context(_site(database, name, *choice, _PORT + place, options.nice))
                for place, (name, choice) in enumerate(chosen.items())
            ]
            _measure(database, sites, cookie, options, found)
    if not all(watched.costs for watched in found.values()):
        raise BenchmarkError("The rotation was too short. Give it more --rows, or fewer --seconds.")
    for name, watched in found.items():
        _print(name, watched, options, machine)
    write_json(options.json, machine, rows=options.rows, measurements=found)
    holds = Spread.of(found["page"].costs).median <= MOST_COST
    print(f"The page costs at most {MOST_COST:.0%} of the rows/s: {'holds' if holds else 'does not hold'}")
    return holds


def _print(name: str, watched: Watched, options: argparse.Namespace, machine: Machine) -> None:
    answers, costs = watched.answers, Spread.of(watched.costs)
    milliseconds = [
        1000 * each / len(answers)
        for each in (watched.web_seconds, watched.backend_seconds, watched.viewer_seconds)
    ]
    share = (watched.web_seconds + watched.backend_seconds) / (watched.seconds * machine.cores)
    print(
        f"{name}: {options.viewers} viewers, {len(answers)} answers in {watched.seconds:.0f} s,"
        f" {Spread.of(answers).shown('.3f')} s each\n"
        f"  CPU time of an answer: {milliseconds[0]:.1f} ms of the web process, {milliseconds[1]:.1f} ms of"
        f" its backends; together {share:.1%} of the time of {machine.cores} cores. The viewers themselves"
        f" (lowest priority): {milliseconds[2]:.1f} ms, not included\n"
        f"  rows/s: they cost {mean(watched.costs):.1%} on average, median {costs.shown('.1%')} of"
        f" {len(watched.costs)} times of {options.seconds} s"
    )


def _measure(
    database: Database,
    sites: list[Site],
    cookie: str,
    options: argparse.Namespace,
    found: dict[str, Watched],
) -> None:
    """Rotate once, with and without viewers in turns."""
    over, times = threading.Event(), Times()
    # Checkpoints come at much the same times of each rotation: each site must meet them by chance.
    chance = secrets.SystemRandom()
    chance.shuffle(sites)
    turns = [turn for site in sites for turn in (None, site)]

    def watch() -> None:
        # On Linux, a thread has a priority of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        # One connection: each new one counts as a commit of another session.
        with database.connection() as connection, ExitStack() as opened:
            viewers = {
                site.port: [opened.enter_context(_connection(site)) for _ in range(options.viewers)]
                for site in sites
            }
            every_seconds = FIRST_SECONDS

            def read(site: Site, seconds: float, answers: list[float]) -> None:
                nonlocal every_seconds
                requests = [
                    (viewer, _request(f"{site.path}?viewer={number}", cookie))
                    for number, viewer in enumerate(viewers[site.port])
                ]
                every_seconds = _read(requests, over, every_seconds, seconds, answers)

            while not over.wait(0.2) and not _number(
                connection, "SELECT count(*) FROM rotator_completedrange"
            ):
                pass
            # Each web process gets to know its viewers.
            for site in sites:
                read(site, 2 * every_seconds, [])
            over.wait(chance.uniform(0, 2 * options.seconds))
            for turn in cycle(turns):
                began = time.time()
                if over.is_set():
                    return
                if turn is None:
                    over.wait(options.seconds)
                else:
                    with _measured(connection, turn, found[turn.name]) as watched:
                        read(turn, options.seconds, watched.answers)
                times.append((turn, began, time.time()))

    with ThreadPoolExecutor(1) as executor:
        viewing = executor.submit(watch)
        try:
            run = database.rotate(
                concurrency=options.concurrency,
                batch=options.batch,
                rows=options.rows,
                vacuum=False,
                more=(f"--pace={options.pace}",),
            )
        finally:
            over.set()
        viewing.result()
    say(
        f"{run.report['rows_per_second']:,.0f} rows/s,"
        f" {run.report['limited_seconds']:.1f} s of them limited by the pace"
    )
    with database.connection() as connection:
        latest = _number(
            connection, "SELECT extract(epoch FROM max(committed_at))::float8 FROM rotator_completedrange"
        )
        rates = [(turn, _rate(connection, began, ended)) for turn, began, ended in times if ended <= latest]
    for (_, earlier), (turn, rate), (_, later) in zip(rates, rates[1:], rates[2:], strict=False):
        if turn is not None:
            found[turn.name].costs.append(1 - rate / mean((earlier, later)))


def _rate(connection: psycopg.Connection, began: float, ended: float) -> float:
    """Return the rows/s that a rotation has committed between two times of this host's clock."""
    rows = _number(
        connection,
        "SELECT COALESCE(sum(rows), 0) FROM rotator_completedrange"
        f" WHERE committed_at >= to_timestamp({began}) AND committed_at < to_timestamp({ended})",
    )
    return rows / (ended - began)


def _number(connection: psycopg.Connection, query: str) -> float:
    return float(connection.execute(query.encode()).fetchall()[0][0])


@contextmanager
def _site(database: Database, name: str, folder: Path, path: str, port: int, nice: int) -> Iterator[Site]:
    """Start a web process."""
    process = subprocess.Popen(
        ["/usr/bin/nice", "-n", str(nice), sys.executable, str(PROJECT / "benchmarks/serving.py"), str(port)],
        cwd=folder,
        env={
            **os.environ,
            "DATABASE_URL": database.url,
            "PYTHONPATH": str(folder),
            "PGAPPNAME": f"site {name}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + _START_SECONDS
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            if time.monotonic() > until or process.poll() is not None:
                raise BenchmarkError("The site did not start.")
            time.sleep(0.1)
        yield Site(name=name, path=path, port=port, process=process)
    finally:
        process.terminate()
        process.wait()


def _request(path: str, cookie: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: sessionid={cookie}\r\n\r\n".encode()


@contextmanager
def _connection(site: Site) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        yield connection


def _read(
    requests: list[tuple[socket.socket, bytes]],
    over: threading.Event,
    every_seconds: float,
    seconds: float,
    answers: list[float],
) -> float:
    """Read the page by each viewer in turns, and add the seconds of each answer.

    A client of a few lines, since one that parses headers would cost a third of what is measured.

    Returns:
        The time between two reads of one viewer, as the latest answer says.
    """
    due, until = time.monotonic(), time.monotonic() + seconds
    for viewer, request in cycle(requests):
        if due >= until or over.wait(max(0.0, due - time.monotonic())):
            break
        asked = time.perf_counter()
        viewer.sendall(request)
        answer = b""
        while not (head := _HEAD.match(answer)) or len(answer) < head.end() + int(head[2]):
            received = viewer.recv(65536)
            if not received:
                raise BenchmarkError("The site closed a connection.")
            answer += received
        if head[1] != b"200":
            raise BenchmarkError(f"The site answers with status {head[1].decode()}.")
        answers.append(time.perf_counter() - asked)
        if said := _EVERY.search(answer):
            every_seconds = float(said[1])
        due += every_seconds / len(requests)
    return every_seconds


@contextmanager
def _measured(connection: psycopg.Connection, site: Site, watched: Watched) -> Iterator[Watched]:
    """Add the time, and the CPU time of the site, of its backends and of this thread."""

    def now() -> tuple[float, float, float, float]:
        pids = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", (f"site {site.name}",)
        )
        backends = sum(_cpu_seconds(pid) for (pid,) in pids)
        return time.monotonic(), _cpu_seconds(site.process.pid), backends, time.thread_time()

    before = now()
    yield watched
    seconds, web, backends, viewers = (late - early for early, late in zip(before, now(), strict=True))
    watched.seconds += seconds
    watched.web_seconds += web
    watched.backend_seconds += backends
    watched.viewer_seconds += viewers


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process of this host."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


if __name__ == "__main__":
    main()
