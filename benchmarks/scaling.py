"""async_rotate on larger tables, compared with one UPDATE statement on the same data."""

import argparse
from dataclasses import dataclass
from functools import partial

from harness import (
    TABLE,
    Database,
    Server,
    add_numbers,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
    statement,
)
from presenting import MEGABYTE, Machine, Spread, table, write_json

_REFERENCE_ROWS = 1_000_000
_CALCULATED_ROWS = (100_000_000, 1_000_000_000)
_HOUR_SECONDS = 3600
_PAGE_BYTES = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run of the command, or of the statement.

    Attributes:
        seconds: The command from its process's start to its exit, or the statement alone.
        wal_bytes: What the server wrote to its WAL.
        full_pages: The number of whole pages in it.
        peak_bytes: The high-water mark of the client's memory; 0 for the statement.
    """

    seconds: float
    wal_bytes: int
    full_pages: int
    peak_bytes: int = 0


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How do rows a second, memory and WAL change with the number of rows, and for one UPDATE? "
        "Exits with 1 if the largest table takes over --difference more memory than the smallest, or has "
        "less than --share of the rows a second of a million rows.",
        repetitions=1,
        rows=None,
    )
    parser.add_argument(
        "--rows",
        type=at_least_one,
        nargs="+",
        default=[100_000, 1_000_000, 10_000_000],
        metavar="N",
        help="how many tickets there are, for each table (default: 100000 1000000 10000000)",
    )
    add_numbers(
        parser,
        float,
        ("difference", 4.0, "MB", "how much more memory the largest may need"),
        ("share", 0.8, "SHARE", "which part of the rows a second of a million rows the largest must have"),
    )
    options = parser.parse_args()
    run_script(lambda server: _scale(server, options), server=options.server)


def _scale(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    found: dict[int, dict[str, list[Measurement]]] = {}
    for rows in sorted(set(options.rows)):
        original = server.tickets(rows)
        found[rows] = interleaved(
            options.repetitions,
            {
                "async_rotate": partial(_rotate, server, original, rows, options),
                "one UPDATE": partial(_update, server, original),
            },
        )
        # Ten million rows take disk space that later steps need.
        server.drop(original)
    print(_table(found))
    holds = _judge(found, options)
    largest = max(found)
    print(_calculated(largest, found[largest]))
    write_json(options.json, machine, server=options.server, measurements=found, holds=holds)
    return holds


def _rotate(server: Server, original: Database, rows: int, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        wal = _Wal(database)
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=rows)
        return wal.measured(run.command.seconds, peak_bytes=run.report["peak_memory_bytes"])


def _update(server: Server, original: Database) -> Measurement:
    with server.copied(original) as database:
        wal = _Wal(database)
        return wal.measured(statement(database, f"UPDATE {TABLE} SET token = gen_random_uuid()"))


class _Wal:
    """What the server writes to its WAL from now on."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._before = self._read()

    def _read(self) -> tuple[int, int]:
        (full_pages,) = self._database.fetch("SELECT wal_fpi FROM pg_stat_wal")
        return self._database.storage().wal_position, full_pages

    def measured(self, seconds: float, *, peak_bytes: int = 0) -> Measurement:
        position, full_pages = self._read()
        return Measurement(
            seconds=seconds,
            wal_bytes=position - self._before[0],
            full_pages=full_pages - self._before[1],
            peak_bytes=peak_bytes,
        )


def _table(found: dict[int, dict[str, list[Measurement]]]) -> str:
    lines = [["rows", "way", "seconds", "rows/s", "WAL B/row", "full pages, B/row", "peak memory, MB"]]
    for rows, ways in found.items():
        for name, measurements in ways.items():
            peak = Spread.of([m.peak_bytes / MEGABYTE for m in measurements])
            lines.append(
                [
                    f"{rows:,}",
                    name,
                    Spread.of([m.seconds for m in measurements]).shown(".2f"),
                    Spread.of([rows / m.seconds for m in measurements]).shown(),
                    f"{Spread.of([m.wal_bytes / rows for m in measurements]).median:,.0f}",
                    # Without the empty middle of a page, so that this is the most that they can take.
                    f"{Spread.of([m.full_pages * _PAGE_BYTES / rows for m in measurements]).median:,.0f}",
                    peak.shown(".1f") if peak.median else "none",
                ]
            )
    return table(lines)


def _judge(found: dict[int, dict[str, list[Measurement]]], options: argparse.Namespace) -> bool:
    holds = True
    smallest, largest = min(found), max(found)
    rates = {
        rows: Spread.of([rows / m.seconds for m in ways["async_rotate"]]).median
        for rows, ways in found.items()
    }
    if _REFERENCE_ROWS in rates and largest != _REFERENCE_ROWS:
        kept = rates[largest] / rates[_REFERENCE_ROWS]
        holds = kept >= options.share
        print(
            f"Rows/s at {largest:,} rows to those at {_REFERENCE_ROWS:,}: {kept:.2f} "
            f"(at least {options.share:g}): {'holds' if holds else 'TOO LITTLE'}."
        )
    ratio = [
        ours.seconds / its.seconds
        for ours, its in zip(found[largest]["async_rotate"], found[largest]["one UPDATE"], strict=True)
    ]
    shown = Spread.of(ratio).shown(".2f")
    print(f"Seconds of async_rotate to those of one UPDATE at {largest:,} rows: {shown}.")
    peaks = [
        Spread.of([m.peak_bytes / MEGABYTE for m in found[rows]["async_rotate"]]).median
        for rows in (smallest, largest)
    ]
    more = peaks[1] - peaks[0]
    is_flat = more <= options.difference
    print(
        f"Peak memory at {largest:,} rows: {more:+.1f} MB to that at {smallest:,} "
        f"(at most {options.difference:g}): {'holds' if is_flat else 'TOO MUCH'}."
    )
    return holds and is_flat


def _calculated(largest: int, ways: dict[str, list[Measurement]]) -> str:
    """Say what more rows would take if they went as fast as the largest number that was measured."""
    lines = [["rows (calculated, not measured)", "way", "hours", "WAL, GB"]]
    for rows in _CALCULATED_ROWS:
        for name, measurements in ways.items():
            times = rows / largest
            hours = Spread.of([m.seconds for m in measurements]).median * times / _HOUR_SECONDS
            gigabytes = Spread.of([m.wal_bytes for m in measurements]).median * times / 1e9
            lines.append([f"{rows:,}", name, f"{hours:.1f}", f"{gigabytes:,.0f}"])
    return table(lines)


if __name__ == "__main__":
    main()
