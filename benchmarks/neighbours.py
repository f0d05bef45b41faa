"""What a rotation costs an application on the same server, and whether the paces keep their promise."""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, Self

from harness import (
    PROJECT,
    TABLE,
    BenchmarkError,
    Database,
    Server,
    add_numbers,
    at_least_one,
    parser_for,
    run_script,
    say,
)
from presenting import Machine, table, write_json
from psycopg.conninfo import conninfo_to_dict

from rotator.exceptions import RotatorError
from rotator.postgres.connection import Server as RotatorServer
from rotator.postgres.connection import connected
from rotator.postgres.probes import probe

# What --pace promises: the application's p99 as a multiple of that without a rotation, and the share of the
# rows/s that --pace full reaches next to the same application.
PROMISED: Final = {"balanced": (3.5, 0.5), "gentle": (2.5, 0.1)}
WORST_MS: Final = 50.0
YIELD_SECONDS: Final = 3.0
BACK_SECONDS: Final = 15.0
SLOWER: Final = 0.05
FRONTIER: Final = (
    (1, 100),
    (1, 250),
    (1, 500),
    (1, 1000),
    (1, 2000),
    (2, 500),
    (2, 2000),
    (4, 500),
    (4, 2000),
    (8, 2000),
)
SYNCHRONOUS: Final = ((1, 500), (2, 500), (4, 2000))

CLIENTS: Final = 8
LOG_COLUMNS: Final = 7
LEAD_SECONDS: Final = 1.0
PROBE_SECONDS: Final = 0.05
MILLISECONDS: Final = 1000.0
_SCRIPT: Final = (
    "\\set id random(1, {rows})\n"
    f"SELECT title FROM {TABLE} WHERE id = :id;\n"
    f"UPDATE {TABLE} SET title = 'neighbour ' || :id WHERE id = :id;\n"
)
_OLD_SNAPSHOT: Final = "balanced, old snapshot"
_PATCH: Final = (
    "import sys; from rotator.postgres import fence; fence.SETTINGS['synchronous_commit'] = 'on'; "
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One way to rotate next to the application.

    Attributes:
        name: Its name in the table.
        options: The options of ``async_rotate``; None for no rotation.
        is_synchronous: Whether the ranges commit synchronously.
        has_old_snapshot: Whether another session keeps a snapshot from before the rotation.
    """

    name: str
    options: tuple[str, ...] | None = None
    is_synchronous: bool = False
    has_old_snapshot: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Latencies:
    """Percentiles in milliseconds; NaN where nothing was measured."""

    count: int
    p50: float
    p90: float
    p95: float
    p99: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Latencies":
        """Sum up latencies in milliseconds."""
        ordered = sorted(values)
        if not ordered:
            return cls(
                count=0,
                p50=float("nan"),
                p90=float("nan"),
                p95=float("nan"),
                p99=float("nan"),
                worst=float("nan"),
            )
        at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.95, 0.99)]
        return cls(count=len(ordered), p50=at[0], p90=at[1], p95=at[2], p99=at[3], worst=ordered[-1])

    @classmethod
    def median_of(cls, repetitions: Sequence["Latencies"]) -> "Latencies":
        """Return the median of each percentile, and the worst of all."""
        p50, p90, p95, p99 = (
            median(getattr(one, name) for one in repetitions) for name in ("p50", "p90", "p95", "p99")
        )
        return cls(
            count=sum(one.count for one in repetitions),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            worst=max(one.worst for one in repetitions),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one load costs.

    Attributes:
        name: The load.
        application: The latency of the application's transactions.
        commit: The commit of the probe.
        overrun: The overrun of ``pg_sleep``.
        rows_per_second: The rate of the rotation; 0 without one.
    """

    name: str
    application: Latencies
    commit: Latencies
    overrun: Latencies
    rows_per_second: float

    @classmethod
    def median_of(cls, repetitions: Sequence["Measurement"]) -> "Measurement":
        """Sum up the repetitions of one load."""
        return cls(
            name=repetitions[0].name,
            application=Latencies.median_of([one.application for one in repetitions]),
            commit=Latencies.median_of([one.commit for one in repetitions]),
            overrun=Latencies.median_of([one.overrun for one in repetitions]),
            rows_per_second=median(one.rows_per_second for one in repetitions),
        )


class Application:
    """pgbench: transactions at a fixed rate, each of them one select and one update by id."""

    def __init__(self, database: Database, rows: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._database = database
        self._script = Path(self._folder.name) / "script.sql"
        self._script.write_text(_SCRIPT.format(rows=rows))
        self._runs = 0

    def start(self, rate: int, seconds: float) -> subprocess.Popen[bytes]:
        """Start it for this time."""
        self._runs += 1
        command = [
            _pgbench(),
            "--no-vacuum",
            f"--client={CLIENTS}",
            f"--rate={rate}",
            f"--time={max(1, round(seconds))}",
            f"--file={self._script}",
            "--log",
            f"--log-prefix={self._folder.name}/{self._runs}",
            self._database.url,
        ]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def latencies(self, began: float, ended: float) -> list[tuple[float, float]]:
        """Return when transactions ended, and their latencies in ms, counted from when they were due."""
        found = list[tuple[float, float]]()
        for file in Path(self._folder.name).glob("[0-9]*"):
            for line in file.read_text().splitlines():
                words = line.split()
                # The last line of a pgbench that was stopped is incomplete.
                if len(words) < LOG_COLUMNS or not words[2].isdigit():
                    continue
                _, _, microseconds, _, seconds, fraction, *_ = words
                at = int(seconds) + int(fraction) / 1e6
                if began <= at <= ended:
                    found.append((at, int(microseconds) / 1000))
        return sorted(found)

    def close(self) -> None:
        """Remove its files."""
        self._folder.cleanup()


class Prober:
    """The rotator's probe, 20 times a second, in a thread and on a connection of its own."""

    def __init__(self, url: str) -> None:
        self._server = RotatorServer(parameters=conninfo_to_dict(url))
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._probe()), name="prober")
        self.found = list[tuple[float, float, float]]()

    def __enter__(self) -> Self:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._over.set()
        self._thread.join()

    async def _probe(self) -> None:
        try:
            async with connected(self._server) as connection:
                while not self._over.is_set():
                    measured = await probe(connection)
                    self.found.append((time.time(), measured.commit_seconds, measured.overrun_seconds))
                    await asyncio.sleep(PROBE_SECONDS)
        except RotatorError as error:
            say(f"the probe ended: {error}")


class Rotation:
    """``async_rotate`` in a process of its own, with its events."""

    def __init__(self, database: Database, load: Load, *more: str) -> None:
        arguments = [
            "async_rotate",
            "--progress=json",
            "--noinput",
            "--no-preflight",
            *(load.options or ()),
            *more,
        ]
        self._program = [sys.executable, "manage.py", *arguments]
        if load.is_synchronous:
            run = "sys.argv[0] = 'manage.py'; import runpy; runpy.run_path('manage.py', run_name='__main__')"
            self._program = [sys.executable, "-c", _PATCH + run, *arguments]
        environment = {**os.environ, "DATABASE_URL": database.url, "PYTHONPATH": str(PROJECT)}
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - it is read after the process has ended
        self.process = subprocess.Popen(
            self._program,
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> list[dict[str, Any]]:
        """Wait for its end, and return its events, with ``at`` as seconds since the epoch.

        Raises:
            BenchmarkError: It failed.
        """
        if self.process.wait():
            raise BenchmarkError(f"{' '.join(self._program)} failed with status {self.process.returncode}.")
        self._out.seek(0)
        events = [json.loads(line) for line in self._out.read().splitlines() if line.startswith(b"{")]
        return [event | {"at": datetime.fromisoformat(event["at"]).timestamp()} for event in events]


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "What does a rotation cost an application on the same server, and do the paces keep their promise?",
        repetitions=3,
    )
    add_numbers(
        parser,
        at_least_one,
        ("rate", 400, "N", "the application's transactions a second"),
        ("seconds", 20, "N", "the longest time of a measurement"),
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("frontier", "paces", "change", "quiet"),
        default=("frontier", "paces", "change", "quiet"),
        help="what to measure: the table of fixed settings, the paces, a load that changes, a quiet server "
        "(default: all)",
    )
    options = parser.parse_args()
    run_script(lambda server: _measure(server, options), server=options.server)


def _measure(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    _pgbench()
    original = server.tickets(options.rows)
    checks = dict[str, bool]()
    found = list[Measurement]()
    if {"frontier", "paces"} & set(options.parts):
        found = _measure_loads(server, original, options)
        print(f"medians of {options.repetitions} repetitions, and the worst of all:")
        print(_shown(found))
        print(_prediction(found))
    if "paces" in options.parts:
        checks |= _check_paces(found)
    change: dict[str, Any] = {}
    if "change" in options.parts:
        change = _change_load(server, original, options)
        checks |= change["checks"]
    if "quiet" in options.parts:
        checks |= _compare_when_quiet(server, original, options)
    for check, holds in checks.items():
        print(f"{'ok    ' if holds else 'FAILED'}  {check}")
    write_json(
        options.json,
        machine,
        rows=options.rows,
        rate=options.rate,
        measurements=found,
        change=change,
        checks=checks,
    )
    return all(checks.values())


def _loads(parts: Sequence[str]) -> Iterator[Load]:
    yield Load(name="idle")
    if "frontier" in parts:
        for is_synchronous, settings in ((False, FRONTIER), (True, SYNCHRONOUS)):
            for workers, rows in settings:
                yield Load(
                    name=f"{workers} x {rows:,}{', synchronous' if is_synchronous else ''}",
                    options=("--pace=full", f"--concurrency={workers}", f"--batch={rows}"),
                    is_synchronous=is_synchronous,
                )
    if "paces" in parts:
        for pace in ("full", "balanced", "gentle"):
            yield Load(name=f"pace {pace}", options=(f"--pace={pace}",))
        yield Load(name=_OLD_SNAPSHOT, options=("--pace=balanced",), has_old_snapshot=True)
    yield Load(name="idle again")


def _measure_loads(server: Server, original: Database, options: argparse.Namespace) -> list[Measurement]:
    found = dict[str, list[Measurement]]()
    for repetition in range(options.repetitions):
        for load in _loads(options.parts):
            say(f"{load.name}, repetition {repetition + 1}")
            with server.copied(original) as database:
                found.setdefault(load.name, []).append(_measure_load(database, load, options))
    return [Measurement.median_of(repetitions) for repetitions in found.values()]


def _measure_load(database: Database, load: Load, options: argparse.Namespace) -> Measurement:
    application = Application(database, options.rows)
    try:
        running = application.start(options.rate, LEAD_SECONDS + options.seconds + 10)
        with Prober(database.url) as prober, ExitStack() as stack:
            if load.has_old_snapshot:
                reader = stack.enter_context(database.connection())
                reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                reader.execute(f"SELECT FROM {TABLE} LIMIT 1".encode())
            time.sleep(LEAD_SECONDS)
            began, rate = time.time(), 0.0
            if load.options is None:
                time.sleep(options.seconds)
                ended = time.time()
            else:
                events = Rotation(database, load, "--no-vacuum", f"--stop-after={options.seconds}s").wait()
                began = next(event["at"] for event in events if event["event"] == "started")
                stopped = events[-1]
                ended, rate = stopped["at"], stopped["rows_per_second"]
        running.terminate()
        running.wait()
        latencies = [latency for _, latency in application.latencies(began, ended)]
        probes = [one for one in prober.found if began <= one[0] <= ended]
    finally:
        application.close()
    return Measurement(
        name=load.name,
        application=Latencies.of(latencies),
        commit=Latencies.of([commit * MILLISECONDS for _, commit, _ in probes]),
        overrun=Latencies.of([overrun * MILLISECONDS for _, _, overrun in probes]),
        rows_per_second=rate,
    )


def _shown(found: Sequence[Measurement]) -> str:
    heads = [
        "load, ms",
        "p50",
        "p95",
        "p99",
        "worst",
        "commit p50",
        "p90",
        "p95",
        "p99",
        "overrun p90",
        "rows/s",
    ]
    return table(
        [
            heads,
            *(
                [
                    one.name,
                    *(
                        f"{value:.1f}"
                        for value in (one.application.p50, one.application.p95, one.application.p99)
                    ),
                    f"{one.application.worst:.0f}",
                    *(
                        f"{value:.1f}"
                        for value in (one.commit.p50, one.commit.p90, one.commit.p95, one.commit.p99)
                    ),
                    f"{one.overrun.p90:.2f}",
                    f"{one.rows_per_second:,.0f}" if one.rows_per_second else "",
                ]
                for one in found
            ),
        ]
    )


def _prediction(found: Sequence[Measurement]) -> str:
    """Return how well the order of the probes predicts that of the application's p99."""
    target = [one.application.p99 for one in found]
    ways: dict[str, Callable[[Measurement], float]] = {
        "commit p90": lambda one: one.commit.p90,
        "commit p95": lambda one: one.commit.p95,
        "commit p99": lambda one: one.commit.p99,
        "overrun p90": lambda one: one.overrun.p90,
    }
    shown = [
        f"{name} {_rank_correlation([way(one) for one in found], target):.2f}" for name, way in ways.items()
    ]
    return f"rank correlation with the application's p99: {', '.join(shown)}"


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's coefficient."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    mean = (len(first) - 1) / 2
    products = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
    squares = [sum((rank - mean) ** 2 for rank in one) for one in ranks]
    return products / (squares[0] * squares[1]) ** 0.5 if all(squares) else float("nan")


def _check_paces(found: Sequence[Measurement]) -> dict[str, bool]:
    by_name = {one.name: one for one in found}
    idle = min((by_name["idle"], by_name["idle again"]), key=lambda one: one.application.p99)
    full, checks = by_name["pace full"], dict[str, bool]()
    for pace, (multiple, share) in PROMISED.items():
        one = by_name[f"pace {pace}"]
        factor = one.application.p99 / idle.application.p99
        speed = one.rows_per_second / full.rows_per_second
        checks[f"{pace}: p99 {factor:.1f} times idle, at most {multiple}"] = factor <= multiple
        checks[f"{pace}: {speed:.0%} of the rows/s of full, at least {share:.0%}"] = speed >= share
        checks[f"{pace}: worst {one.application.worst:.0f} ms, below {WORST_MS:.0f}"] = (
            one.application.worst < WORST_MS
        )
    factor = by_name[_OLD_SNAPSHOT].application.p99 / idle.application.p99
    multiple, _ = PROMISED["balanced"]
    checks[f"{_OLD_SNAPSHOT}: p99 {factor:.1f} times idle, at most {multiple}"] = factor <= multiple
    frontier = [
        one
        for one in found
        if " x " in one.name and one.rows_per_second >= PROMISED["gentle"][1] * full.rows_per_second
    ]
    if frontier:
        lowest = min(one.application.p99 for one in frontier)
        gentle = by_name["pace gentle"].application.p99
        # Two measurements of the same setting differ by about a tenth.
        checks[f"gentle: p99 {gentle:.1f} ms, the lowest of the frontier is {lowest:.1f} ms"] = (
            gentle <= 1.1 * lowest
        )
    return checks


def _change_load(server: Server, original: Database, options: argparse.Namespace) -> dict[str, Any]:
    """Rotate while the application's load goes from 0 to the rate, to four times as much, and to 0."""
    quiet_seconds, high = 5.0, options.rate * 4
    with server.copied(original) as database:
        application = Application(database, options.rows)
        try:
            rotation = Rotation(database, Load(name="balanced", options=("--pace=balanced",)), "--no-vacuum")
            time.sleep(quiet_seconds)
            marks = [time.time()]
            for rate in (options.rate, high):
                say(f"{rate} transactions/s")
                application.start(rate, options.seconds / 2).wait()
                marks.append(time.time())
            say("no transactions")
            events = rotation.wait()
            latencies = application.latencies(0, marks[-1])
        finally:
            application.close()
    limited = [event["at"] for event in events if event["event"] == "pace_changed" and event["is_limited"]]
    if rotation_ended := events[-1]["at"] < marks[-1] + BACK_SECONDS:
        say("the rotation ended too soon to see its speed come back: more --rows are needed")
    quiet = _rate(events, events[0]["at"], marks[0])
    # Later rows are slower, with or without a load: checkpoints write whole pages, and indexes grow.
    usual = min(quiet, _rate(events, events[-1]["at"] - quiet_seconds, events[-1]["at"]))
    back = next((at for at, rate in _rates(events) if at > marks[2] + 1 and rate >= 0.8 * usual), None)
    yielded = limited[0] - marks[0] if limited else float("inf")
    after = Latencies.of([latency for at, latency in latencies if marks[0] + YIELD_SECONDS <= at <= marks[1]])
    checks = {f"change: yielded after {yielded:.1f} s, at most {YIELD_SECONDS:.0f}": yielded <= YIELD_SECONDS}
    if not rotation_ended:
        waited = float("inf") if back is None else back - marks[2]
        checks[f"change: speed back after {waited:.1f} s, at most {BACK_SECONDS:.0f}"] = (
            waited <= BACK_SECONDS
        )
    print(
        f"changing load: p99 {after.p99:.1f} ms from {YIELD_SECONDS:.0f} s after it began; "
        f"{quiet:,.0f} rows/s before it, {usual:,.0f} rows/s usually"
    )
    workers = [(event["at"], event["workers"]) for event in events if event["event"] == "pace_changed"]
    return {
        "checks": checks,
        "latencies": latencies,
        "workers": workers,
        "marks": marks,
        "rates": list(_rates(events)),
    }


def _rates(events: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Yield the rows/s between two lines of progress."""
    progress = [event for event in events if event["event"] == "progress"]
    for before, now in pairwise(progress):
        if now["at"] > before["at"]:
            yield now["at"], (now["rows_done"] - before["rows_done"]) / (now["at"] - before["at"])


def _rate(events: Sequence[dict[str, Any]], began: float, ended: float) -> float:
    found = [rate for at, rate in _rates(events) if began <= at <= ended]
    return sum(found) / len(found) if found else 0.0


def _compare_when_quiet(server: Server, original: Database, options: argparse.Namespace) -> dict[str, bool]:
    rates: dict[str, list[float]] = {"full": [], "balanced": []}
    for repetition in range(options.repetitions):
        for pace, found in rates.items():
            say(f"quiet server, pace {pace}, repetition {repetition + 1}")
            with server.copied(original) as database:
                run = database.rotate(
                    concurrency=options.concurrency,
                    batch=options.batch,
                    rows=options.rows,
                    vacuum=False,
                    more=(f"--pace={pace}", "--no-preflight"),
                )
            found.append(run.report["rows_per_second"])
    full, balanced = (sorted(found)[len(found) // 2] for found in rates.values())
    slower = 1 - balanced / full
    print(f"quiet server: full {full:,.0f} rows/s, balanced {balanced:,.0f} rows/s")
    return {f"quiet: balanced is {slower:.0%} slower, at most {SLOWER:.0%}": slower <= SLOWER}


def _pgbench() -> str:
    """Return the path of pgbench.

    Raises:
        BenchmarkError: It is not installed.
    """
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
    found = shutil.which("pgbench") or (str(installed[-1]) if installed else None)
    if found is None:
        raise BenchmarkError("pgbench is needed: install Debian's package postgresql-contrib or postgresql.")
    return found


if __name__ == "__main__":
    main()
