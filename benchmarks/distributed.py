"""What a rotation by Celery workers costs, and what it makes of a slow way to the server."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

from harness import (
    PROJECT,
    BenchmarkError,
    Database,
    Server,
    add_numbers,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
)
from presenting import Machine, Spread, table, write_json

from core.broker import broker_url, running_broker
from core.proxy import Proxy

_LOCAL: Final = "local, 4 connections"
_CELERY: Final = "2 Celery workers, 2 connections each"
_READY_SECONDS: Final = 30.0
_DELAYS_MS: Final = (0, 5, 50)
# Workers, and connections of each.
_HANDS: Final = ((2, 2), (2, 4), (2, 8), (4, 4), (8, 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        seconds: From the coordinator's, or the only, process's start to its exit.
        rows_per_second: From the first range to the last.
    """

    seconds: float
    rows_per_second: float


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "What does it cost to have Celery workers do it on the same machine? And how many connections make "
        "up for a way to the server that delays everything? The workers run already when the command starts. "
        "Exits with 1 if they take over a fifth longer than the command alone.",
        repetitions=3,
    )
    add_numbers(
        parser,
        at_least_one,
        ("delayed-rows", 500_000, "N", "tickets where the workers' way to the server is slow"),
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    original = server.tickets(options.rows)
    found = interleaved(
        options.repetitions,
        {
            _LOCAL: partial(_alone, server, original, options.rows, options.batch),
            _CELERY: partial(_by_workers, server, original, options.rows, options.batch, 2),
        },
    )
    print(_table(found, options.rows))
    ratios = Spread.of(
        [ours.seconds / alone.seconds for ours, alone in zip(found[_CELERY], found[_LOCAL], strict=True)]
    )
    holds = ratios.median <= 1.2  # noqa: PLR2004 - what the help says
    print(f"Seconds of the workers to those of the command alone: {ratios.shown('.2f')} (at most 1.20).")
    smaller = server.tickets(options.delayed_rows)
    delayed = interleaved(
        1,
        {
            f"{delay} ms each way, {workers} workers, {connections} connections each": partial(
                _by_workers,
                server,
                smaller,
                options.delayed_rows,
                options.batch,
                connections,
                workers=workers,
                delay_seconds=delay / 1000,
            )
            for delay in _DELAYS_MS
            for workers, connections in _HANDS
        },
    )
    print(_table(delayed, options.delayed_rows))
    write_json(options.json, machine, measurements=found, delayed=delayed, holds=holds)
    return holds


def _alone(server: Server, original: Database, rows: int, batch: int) -> Measurement:
    with server.copied(original) as database:
        run = database.rotate(concurrency=4, batch=batch, rows=rows)
    return Measurement(seconds=run.command.seconds, rows_per_second=run.report["rows_per_second"])


def _by_workers(
    server: Server,
    original: Database,
    rows: int,
    batch: int,
    connections: int,
    *,
    workers: int = 2,
    delay_seconds: float | None = None,
) -> Measurement:
    with server.copied(original) as database, database.folder() as folder, ExitStack() as stack:
        stack.enter_context(running_broker(folder))
        os.environ["CELERY_BROKER_URL"] = broker_url(folder)
        url = (
            database.url
            if delay_seconds is None
            else stack.enter_context(_slow_way(database.url, delay_seconds))
        )
        stack.enter_context(_workers(workers, url, folder))
        run = database.rotate(concurrency=connections, batch=batch, rows=rows, more=("--celery",))
    return Measurement(seconds=run.command.seconds, rows_per_second=run.report["rows_per_second"])


@contextmanager
def _slow_way(url: str, seconds: float) -> Iterator[str]:
    """A URL of the same database through a proxy that delays each piece, in either direction."""
    parts = urlsplit(url)
    # Not parts.hostname, which is in lower case: it may be the folder of a socket.
    account, at, address = parts.netloc.rpartition("@")
    host, port = unquote(address.rpartition(":")[0]), parts.port or 5432
    is_socket = host.startswith("/")
    with Proxy(path=f"{host}/.s.PGSQL.{port}") if is_socket else Proxy(port=port) as proxy:
        proxy.delay(to_server_seconds=seconds, to_client_seconds=seconds)
        yield urlunsplit(parts._replace(netloc=f"{account}{at}127.0.0.1:{proxy.port}", query=""))


@contextmanager
def _workers(number: int, url: str, folder: Path) -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "celery",
        "--app",
        "core.celery",
        "worker",
        "--concurrency=1",
        "--loglevel=INFO",
    ]
    started, logs = [], []
    with ExitStack() as stack:
        for at in range(number):
            logs.append(folder / f"worker{at}")
            log = stack.enter_context(logs[-1].open("wb"))
            environment = {**os.environ, "DATABASE_URL": url}
            started.append(
                subprocess.Popen(
                    [*command, f"--hostname=benchmark{at}@%h"],
                    cwd=PROJECT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while not all("ready." in log.read_text() for log in logs):
                if time.monotonic() > deadline or any(worker.poll() is not None for worker in started):
                    raise BenchmarkError("A Celery worker did not start.")
                time.sleep(0.05)
            yield
        finally:
            for worker in started:
                worker.terminate()
            for worker in started:
                worker.wait()


def _table(found: dict[str, list[Measurement]], rows: int) -> str:
    lines = [["", "rows", "seconds", "rows/s, from the first range to the last"]]
    for name, measurements in found.items():
        lines.append(
            [
                name,
                f"{rows:,}",
                Spread.of([m.seconds for m in measurements]).shown(".2f"),
                Spread.of([m.rows_per_second for m in measurements]).shown(),
            ]
        )
    return table(lines)


if __name__ == "__main__":
    main()
