"""What viewers of the page cost a rotation, in rows per second."""

import argparse
import http.client
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Final

from harness import (
    PROJECT,
    BenchmarkError,
    Database,
    Server,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
    say,
)
from presenting import Machine, Spread, write_json

MOST_COST: Final = 0.02
EVERY_SECONDS: Final = 2.0
_PORT: Final = 8791
_START_SECONDS: Final = 20.0
_LOG_IN: Final = (
    "from django.contrib.auth.models import User; from django.test import Client; c = Client();"
    " c.force_login(User.objects.create_superuser('viewer')); print('session', c.cookies['sessionid'].value)"
)


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "Compare the rows per second of a rotation with and without viewers of its page, in turns. Each "
        "viewer reads the JSON view every 2 s, as the page's script does.",
        repetitions=3,
    )
    parser.add_argument("--viewers", type=at_least_one, default=20, metavar="N", help="the number of viewers")
    parser.add_argument("--pace", default="balanced", help="async_rotate's --pace (default: %(default)s)")
    parser.add_argument(
        "--nice",
        type=int,
        default=0,
        help="the priority of the web process: 19 stands for one on another host (default: %(default)s)",
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    # Both processes of the site have the same.
    os.environ["SECRET_KEY"] = secrets.token_hex(30)
    original = server.tickets(options.rows)
    answers = list[float]()

    def alone() -> float:
        with server.copied(original) as database, _site(database, options.nice):
            return _rotate(database, options)

    def watched() -> float:
        with (
            server.copied(original) as database,
            _site(database, options.nice) as cookie,
            _viewers(database, cookie, options.viewers, answers),
        ):
            return _rotate(database, options)

    found = interleaved(options.repetitions, {"alone": alone, "watched": watched})
    costs = [1 - seen / own for own, seen in zip(found["alone"], found["watched"], strict=True)]
    spread = Spread.of(costs)
    for name, rates in found.items():
        print(f"{name}: {Spread.of(rates).shown(',.0f')} rows/s")
    holds = spread.median <= MOST_COST
    print(
        f"{options.viewers} viewers, {len(answers)} answers, {Spread.of(answers).shown('.3f')} s each; they"
        f" cost {spread.shown('.1%')}, limit {MOST_COST:.0%}: {'holds' if holds else 'does not hold'}"
    )
    write_json(options.json, machine, rows=options.rows, measurements=found)
    return holds


def _rotate(database: Database, options: argparse.Namespace) -> float:
    run = database.rotate(
        concurrency=options.concurrency,
        batch=options.batch,
        rows=options.rows,
        vacuum=False,
        more=(f"--pace={options.pace}",),
    )
    limited = run.report["limited_seconds"]
    say(f"{run.report['rows_per_second']:,.0f} rows/s, {limited:.1f} s of them limited by the pace")
    return float(run.report["rows_per_second"])


@contextmanager
def _site(database: Database, nice: int) -> Iterator[str]:
    """Start a web process, and yield the cookie of a session."""
    manage = [sys.executable, str(PROJECT / "manage.py")]
    cookie = database.manage("shell", "-c", _LOG_IN).output.partition("session ")[2].split()[0]
    site = subprocess.Popen(
        [
            "/usr/bin/nice",
            "-n",
            str(nice),
            *manage,
            "runserver",
            "--noreload",
            "--insecure",
            f"127.0.0.1:{_PORT}",
        ],
        env={**os.environ, "DATABASE_URL": database.url, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + _START_SECONDS
        with closing(_connection()) as first:
            while not _answers(first, "/admin/", cookie):
                if time.monotonic() > until or site.poll() is not None:
                    raise BenchmarkError("The site did not start.")
                time.sleep(0.1)
        yield cookie
    finally:
        site.terminate()
        site.wait()


@contextmanager
def _viewers(database: Database, cookie: str, number: int, answers: list[float]) -> Iterator[None]:
    """Read the page from so many threads; add the seconds of each answer."""
    over, has_begun = threading.Event(), threading.Event()

    def find() -> None:
        # One connection: each new one counts as a commit of another session.
        with database.connection() as connection:
            while not over.wait(0.2):
                if connection.execute("SELECT FROM rotator_rotation").fetchall():
                    has_begun.set()
                    return

    def watch(place: int) -> None:
        has_begun.wait()
        # Each copy of the database has one rotation, with the first id.
        path = "/admin/rotator/rotation/1/state/"
        over.wait(EVERY_SECONDS * place / number)
        # A browser keeps its connection too.
        with closing(_connection()) as site:
            while not over.wait(EVERY_SECONDS):
                began = time.perf_counter()
                if _answers(site, path, cookie):
                    answers.append(time.perf_counter() - began)

    threads = [threading.Thread(target=find)]
    threads += [threading.Thread(target=watch, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        has_begun.set()
        for thread in threads:
            thread.join()


def _connection() -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", _PORT, timeout=10)


def _answers(site: http.client.HTTPConnection, path: str, cookie: str) -> bool:
    try:
        site.request("GET", path, headers={"Cookie": f"sessionid={cookie}"})
        response = site.getresponse()
        response.read()
    except OSError:
        # The next request opens a new connection.
        site.close()
        return False
    return response.status == http.HTTPStatus.OK


if __name__ == "__main__":
    main()
