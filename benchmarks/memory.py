"""How much memory async_rotate needs, whatever the table holds."""

import argparse
from dataclasses import dataclass
from functools import partial

from harness import (
    BenchmarkError,
    Database,
    Server,
    add_numbers,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
)
from presenting import MEGABYTE, Machine, Spread, table, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        peak_bytes: The most memory that its process ever had resident.
        seconds: From the process's start to its exit.
    """

    peak_bytes: int
    seconds: float


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How much memory does async_rotate need at its peak, and does it need more for more rows? Exits with "
        "1 if the peaks of the smallest and the largest table are further apart than --difference, or any "
        "peak is above --peak.",
        repetitions=2,
        rows=None,
    )
    parser.add_argument(
        "--rows",
        type=at_least_one,
        nargs="+",
        default=[100_000, 1_000_000],
        metavar="N",
        help="how many tickets there are, for each table (default: 100000 1000000)",
    )
    add_numbers(
        parser,
        float,
        ("difference", 8.0, "MB", "how much more the largest may need"),
        ("peak", 90.0, "MB", "how much any of them may need"),
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    originals = {rows: server.tickets(rows) for rows in sorted(set(options.rows))}
    found = interleaved(
        options.repetitions,
        {
            f"{rows:,} rows": partial(_rotate, server, original, rows, options)
            for rows, original in originals.items()
        },
    )
    peaks = [[m.peak_bytes / MEGABYTE for m in measurements] for measurements in found.values()]
    lines = [["", "peak memory, MB", "seconds"]]
    for (name, measurements), megabytes in zip(found.items(), peaks, strict=True):
        seconds = Spread.of([m.seconds for m in measurements])
        lines.append([name, Spread.of(megabytes).shown(".1f"), seconds.shown(".2f")])
    print(table(lines))
    difference = Spread.of(peaks[-1]).median - Spread.of(peaks[0]).median
    highest = max(max(megabytes) for megabytes in peaks)
    holds: bool = difference <= options.difference and highest <= options.peak
    print(
        f"From the smallest to the largest: {difference:+.1f} MB (at most {options.difference:g}); "
        f"highest peak: {highest:.1f} MB (at most {options.peak:g}): {'holds' if holds else 'TOO MUCH'}."
    )
    write_json(options.json, machine, measurements=found, difference_megabytes=difference, holds=holds)
    return holds


def _rotate(server: Server, original: Database, rows: int, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=rows)
    if not run.report["peak_memory_bytes"]:
        raise BenchmarkError("This system does not say how much memory a process has needed.")
    return Measurement(peak_bytes=run.report["peak_memory_bytes"], seconds=run.command.seconds)


if __name__ == "__main__":
    main()
