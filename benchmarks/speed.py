"""How long does the whole of async_rotate take, compared with one UPDATE statement on the same data?"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from harness import (
    TABLE,
    Database,
    Server,
    Storage,
    interleaved,
    parser_for,
    run_script,
    statement,
)
from presenting import MEGABYTE, Machine, Spread, table, write_json

_ROTATE: Final = "async_rotate"
_WITHOUT_VACUUM: Final = "async_rotate --no-vacuum"
_UPDATE: Final = "one UPDATE"
_STATEMENT: Final = f"UPDATE {TABLE} SET token = gen_random_uuid()"
_VACUUM: Final = f"VACUUM (TRUNCATE false, ANALYZE) {TABLE}"
_RANGE_ROWS: Final = (100, 500, 2000)
_RANGES: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run of one way.

    Attributes:
        seconds: The command from the start of its process to its exit, or the statement alone.
        writing_seconds: The part from the start of the first range to the last commit.
        vacuum_seconds: The VACUUM with ANALYZE that follows: what an UPDATE leaves to be run.
        client_cpu_seconds: The processor time of the client's process; None for a statement.
        retries: The number of deferrals and retries.
        wal_bytes: The WAL that the server wrote.
        wal_vacuumed_bytes: The same, with that of the VACUUM that follows.
        heap_bytes: The growth of the heap.
        index_bytes: The growth of the indexes.
        heap_before_bytes: The size of the heap before.
    """

    seconds: float
    writing_seconds: float
    vacuum_seconds: float
    client_cpu_seconds: float | None = None
    retries: int = 0
    wal_bytes: int
    wal_vacuumed_bytes: int
    heap_bytes: int
    index_bytes: int
    heap_before_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limit:
    """A ratio of seconds in each repetition, and the most that it may be."""

    name: str
    most: float
    ratio: Callable[[Measurement, Measurement], float]


_LIMITS: Final = (
    _Limit(
        name="whole command / UPDATE and VACUUM",
        most=0.70,
        ratio=lambda ours, other: ours.seconds / (other.seconds + other.vacuum_seconds),
    ),
    _Limit(name="whole command / UPDATE", most=0.75, ratio=lambda ours, other: ours.seconds / other.seconds),
    _Limit(
        name="writing alone / UPDATE",
        most=0.62,
        ratio=lambda ours, other: ours.writing_seconds / other.seconds,
    ),
)
_MOST_RANGE_MILLISECONDS: Final = 2.0


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "Compare the seconds of the whole command, from the start of its process to its exit, with those of "
        f'"{_STATEMENT}" on the same data, which holds the locks of all rows until it ends. Each way starts '
        "with a copy of the same files, in turns. Ratios below 1 mean that the command was faster.",
        repetitions=3,
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
            _ROTATE: lambda: _rotate(server, original, options),
            _WITHOUT_VACUUM: lambda: _rotate(server, original, options, vacuum=False),
            _UPDATE: lambda: _update(server, original),
        },
    )
    print(_table(found, options.rows))
    pairs = list(zip(found[_ROTATE], found[_UPDATE], strict=True))
    holds = [
        _shows(limit.name, Spread.of([limit.ratio(*pair) for pair in pairs]), limit.most, ".2f")
        for limit in _LIMITS
    ]
    unvacuumed = [
        ours.seconds / other.seconds
        for ours, other in zip(found[_WITHOUT_VACUUM], found[_UPDATE], strict=True)
    ]
    print(f"whole command with --no-vacuum / UPDATE: {Spread.of(unvacuumed).shown('.2f')}")
    wal = [ours.wal_vacuumed_bytes / other.wal_vacuumed_bytes for ours, other in pairs]
    print(f"WAL, once the table is vacuumed, / that of the UPDATE: {Spread.of(wal).shown('.4f')}")
    fixed, per_row = _cost_of_ranges(server, options.repetitions)
    holds.append(_shows("fixed part of a range, ms", fixed, _MOST_RANGE_MILLISECONDS, ".2f"))
    print(f"each row of a range, µs: {per_row.shown('.1f')}")
    write_json(options.json, machine, rows=options.rows, measurements=found)
    return all(holds)


def _shows(name: str, found: Spread, most: float, shape: str) -> bool:
    """Print a figure with its limit, and return whether it holds."""
    holds = found.median <= most
    print(f"{name}: {found.shown(shape)}, limit {most:{shape}}: {'holds' if holds else 'does not hold'}")
    return holds


def _rotate(
    server: Server, original: Database, options: argparse.Namespace, *, vacuum: bool = True
) -> Measurement:
    with server.copied(original) as database:
        before = database.storage()
        run = database.rotate(
            concurrency=options.concurrency, batch=options.batch, rows=options.rows, vacuum=vacuum
        )
        return _measurement(
            database,
            before,
            seconds=run.command.seconds,
            writing_seconds=options.rows / run.report["rows_per_second"],
            client_cpu_seconds=run.command.cpu_seconds,
            retries=run.report["deferrals"] + run.report["retries"],
        )


def _update(server: Server, original: Database) -> Measurement:
    with server.copied(original) as database:
        before = database.storage()
        seconds = statement(database, _STATEMENT)
        return _measurement(database, before, seconds=seconds, writing_seconds=seconds)


def _cost_of_ranges(server: Server, repetitions: int) -> tuple[Spread, Spread]:
    """Return the milliseconds of an empty range and the microseconds of each row, for one worker.

    A line is fitted through the mean seconds of ranges of different sizes.
    """
    originals = {rows: server.tickets(rows * _RANGES) for rows in _RANGE_ROWS}
    found = interleaved(
        repetitions,
        {
            f"{rows} rows in a range": partial(_seconds_of_range, server, original, rows)
            for rows, original in originals.items()
        },
    )
    lines = [_line(_RANGE_ROWS, seconds) for seconds in zip(*found.values(), strict=True)]
    return (
        Spread.of([1e3 * fixed for fixed, _ in lines]),
        Spread.of([1e6 * per_row for _, per_row in lines]),
    )


def _seconds_of_range(server: Server, original: Database, rows: int) -> float:
    with server.copied(original) as database:
        run = database.rotate(concurrency=1, batch=rows, rows=rows * _RANGES, vacuum=False)
    return rows / float(run.report["rows_per_second"])


def _line(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> tuple[float, float]:
    """Return the least squares line through these points: its value at 0, and its slope."""
    slope, intercept = statistics.linear_regression(sizes, seconds)
    return float(intercept), float(slope)


def _measurement(
    database: Database,
    before: Storage,
    *,
    seconds: float,
    writing_seconds: float,
    client_cpu_seconds: float | None = None,
    retries: int = 0,
) -> Measurement:
    after = database.storage()
    vacuum_seconds = statement(database, _VACUUM)
    vacuumed = database.storage()
    return Measurement(
        seconds=seconds,
        writing_seconds=writing_seconds,
        vacuum_seconds=vacuum_seconds,
        client_cpu_seconds=client_cpu_seconds,
        retries=retries,
        wal_bytes=after.wal_position - before.wal_position,
        wal_vacuumed_bytes=vacuumed.wal_position - before.wal_position,
        heap_bytes=after.heap_bytes - before.heap_bytes,
        index_bytes=after.index_bytes - before.index_bytes,
        heap_before_bytes=before.heap_bytes,
    )


def _table(found: dict[str, list[Measurement]], rows: int) -> str:
    heads = [
        "",
        "seconds",
        "writing",
        "VACUUM after",
        "client CPU s",
        "WAL B/row",
        "vacuumed",
        "heap",
        "indexes",
    ]
    lines = [heads]
    for name, measurements in found.items():
        cpu = [m.client_cpu_seconds for m in measurements if m.client_cpu_seconds is not None]
        heap = Spread.of([m.heap_bytes / MEGABYTE for m in measurements]).median
        growth = Spread.of([1 + m.heap_bytes / m.heap_before_bytes for m in measurements]).median
        indexes = Spread.of([m.index_bytes / MEGABYTE for m in measurements]).median
        lines.append(
            [
                name,
                Spread.of([m.seconds for m in measurements]).shown(".2f"),
                Spread.of([m.writing_seconds for m in measurements]).shown(".2f"),
                Spread.of([m.vacuum_seconds for m in measurements]).shown(".2f"),
                Spread.of(cpu).shown(".2f") if cpu else "none",
                f"{Spread.of([m.wal_bytes / rows for m in measurements]).median:,.1f}",
                f"{Spread.of([m.wal_vacuumed_bytes / rows for m in measurements]).median:,.1f}",
                f"{heap:+,.0f} MB (x{growth:.2f})",
                f"{indexes:+,.0f} MB",
            ]
        )
    return table(lines)


if __name__ == "__main__":
    main()
