"""Which concurrency and which batch are the fastest."""

import argparse
from dataclasses import dataclass
from functools import partial

from harness import Database, Server, at_least_one, interleaved, parser_for, run_script
from plotting import lines_and_heat, picture
from presenting import Machine, Spread, table, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        rows_per_second: From the first range's begin to the last one's commit.
        seconds: From the process's start to its exit.
        retries: The number of retries.
    """

    rows_per_second: float
    seconds: float
    retries: int


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How many rows a second does async_rotate rewrite, with so many workers and so many rows a range? "
        "From the first range's begin to the last one's commit, without VACUUM, which is alike for all.",
        repetitions=1,
    )
    for name, default, text in (
        ("concurrencies", [1, 2, 4, 8, 16], "--concurrency, to be combined with each"),
        ("batches", [500, 1000, 2000, 5000, 10_000], "--batch, to be combined with each"),
    ):
        parser.add_argument(
            f"--{name}",
            type=at_least_one,
            nargs="+",
            default=default,
            metavar="N",
            help=f"values of {text} (default: {' '.join(map(str, default))})",
        )
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw it, as SVG or PNG")
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    original = server.tickets(options.rows)
    found = interleaved(
        options.repetitions,
        {
            f"concurrency {concurrency}, batch {batch:,}": partial(
                _rotate, server, original, options.rows, concurrency, batch
            )
            for batch in options.batches
            for concurrency in options.concurrencies
        },
    )
    in_order = iter(found.values())
    spreads = {
        batch: [Spread.of([m.rows_per_second for m in next(in_order)]) for _ in options.concurrencies]
        for batch in options.batches
    }
    heads = ["rows/s", *(f"concurrency {concurrency}" for concurrency in options.concurrencies)]
    print(
        table([heads, *([f"batch {batch:,}", *(s.shown() for s in row)] for batch, row in spreads.items())])
    )
    if options.plot is not None:
        lines_and_heat(
            options.plot,
            {batch: [spread.median for spread in row] for batch, row in spreads.items()},
            concurrencies=options.concurrencies,
            title=f"async_rotate, {options.rows:,} rows, {machine.cores} cores, PostgreSQL {machine.server}",
        )
    write_json(options.json, machine, rows=options.rows, measurements=found)
    return True


def _rotate(server: Server, original: Database, rows: int, concurrency: int, batch: int) -> Measurement:
    with server.copied(original) as database:
        run = database.rotate(concurrency=concurrency, batch=batch, rows=rows, vacuum=False)
    return Measurement(
        rows_per_second=run.report["rows_per_second"],
        seconds=run.command.seconds,
        retries=run.report["deferrals"] + run.report["retries"],
    )


if __name__ == "__main__":
    main()
