"""How far off is the time that a dry run estimates?"""

import argparse
import re
from dataclasses import dataclass

from harness import BenchmarkError, Database, Server, add_numbers, interleaved, parser_for, run_script
from presenting import Machine, Spread, table, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One dry run, and the rotation after it.

    Attributes:
        estimated_seconds: What the dry run said.
        writing_seconds: What the rotation took from its first range to its last.
    """

    estimated_seconds: float
    writing_seconds: float


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How far is the time that async_rotate --dry-run estimates, from ranges that it rewrites and rolls "
        "back, from what the rotation then takes, from its first range to its last? Exits with 1 if the "
        "median is off by more than --factor.",
        repetitions=5,
    )
    add_numbers(parser, float, ("factor", 1.5, "X", "how far off it may be"))
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    original = server.tickets(options.rows)
    found = interleaved(options.repetitions, {"estimate": lambda: _measure(server, original, options)})
    measurements = found["estimate"]
    estimated = Spread.of([m.estimated_seconds for m in measurements])
    writing = Spread.of([m.writing_seconds for m in measurements])
    ratios = Spread.of([m.estimated_seconds / m.writing_seconds for m in measurements])
    print(
        table(
            [
                ["", "seconds"],
                ["estimated", estimated.shown(".2f")],
                ["from the first range to the last", writing.shown(".2f")],
            ]
        )
    )
    holds: bool = 1 / options.factor <= ratios.median <= options.factor
    print(
        f"The estimate to what it took: {ratios.shown('.2f')} (within a factor of {options.factor:g}): "
        f"{'holds' if holds else 'OFF'}."
    )
    write_json(options.json, machine, measurements=found, ratio=ratios.median, holds=holds)
    return holds


def _measure(server: Server, original: Database, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        limits = (f"--concurrency={options.concurrency}", f"--batch={options.batch}")
        shown = database.manage("async_rotate", "--dry-run", *limits).output
        rate = re.search(r"rewritten at ([0-9,]+) rows/s", shown)
        if rate is None:
            raise BenchmarkError("The dry run gave no estimate.")
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rows)
    return Measurement(
        estimated_seconds=options.rows / int(rate[1].replace(",", "")),
        writing_seconds=options.rows / run.report["rows_per_second"],
    )


if __name__ == "__main__":
    main()
