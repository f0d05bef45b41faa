"""Whether gaps between ids slow async_rotate down."""

import argparse
from dataclasses import dataclass

from harness import TABLE, Database, Server, add_numbers, interleaved, parser_for, run_script
from presenting import Machine, Spread, table, write_json

_DENSE = "without gaps"
_GAPPED = "with gaps"
_PERCENT = 100
_VACUUM = {"vacuum": "VACUUM (ANALYZE)", "full": "VACUUM (FULL, ANALYZE)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        rows_per_second: From the first range's begin to the last one's commit.
        seconds: From the process's start to its exit.
        retries: The number of retries.
        ranges: How many were planned.
        odd_ranges: The number of ranges, except the last one, with more or fewer rows than --batch.
    """

    rows_per_second: float
    seconds: float
    retries: int
    ranges: int
    odd_ranges: int


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "Do gaps between ids slow async_rotate down? Compares a table that has never lost a row with one of "
        "as many rows, left over where most were deleted at random: in rows per second of the writing. "
        "Exits with 1 if they are further apart than --limit, or a range but the last held more or fewer "
        "rows than --batch.",
        repetitions=3,
    )
    parser.add_argument(
        "--delete",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="which part of them was deleted at random, so that --rows are left (default: %(default)s)",
    )
    parser.add_argument(
        "--vacuum",
        choices=tuple(_VACUUM),
        default="vacuum",
        help="what both tables got afterwards. A plain VACUUM is what happens to a table in use, and leaves "
        "few rows in each page of the heap and the indexes, so more than ids differs; VACUUM FULL packs "
        "both tables, so that nothing but the ids differs (default: %(default)s)",
    )
    add_numbers(parser, float, ("limit", 20.0, "PERCENT", "how far apart they may be"))
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    dense = server.tickets(options.rows)
    gapped = server.tickets(round(options.rows / (1 - options.delete)))
    _keep(gapped, options.rows)
    for database in (dense, gapped):
        database.run(f"{_VACUUM[options.vacuum]} {TABLE}")
    found = interleaved(
        options.repetitions,
        {
            _DENSE: lambda: _rotate(server, dense, options),
            _GAPPED: lambda: _rotate(server, gapped, options),
        },
    )
    rates = {name: Spread.of([m.rows_per_second for m in runs]) for name, runs in found.items()}
    print(_table(found, {_DENSE: dense, _GAPPED: gapped}))
    change = (rates[_GAPPED].median / rates[_DENSE].median - 1) * _PERCENT
    odd = sum(m.odd_ranges for runs in found.values() for m in runs)
    holds = abs(change) <= options.limit and not odd
    print(
        f"Rows/s with gaps to those without: {change:+.1f} % (at most {options.limit:g} either way); "
        + (f"{odd} ranges did not hold" if odd else "every range but the last held")
        + f" {options.batch:,} rows: {'holds' if holds else 'DOES NOT HOLD'}."
    )
    write_json(options.json, machine, measurements=found, change_percent=change, holds=holds)
    return holds


def _keep(database: Database, rows: int) -> None:
    """Delete tickets at random, the same ones in each call, until this many are left."""
    database.run(
        "SELECT setseed(0.5)",
        f"CREATE TEMPORARY TABLE kept AS SELECT id FROM {TABLE} ORDER BY random() LIMIT {rows}",
        "ANALYZE kept",
        f"DELETE FROM {TABLE} WHERE NOT EXISTS (SELECT FROM kept WHERE kept.id = {TABLE}.id)",
    )


def _rotate(server: Server, original: Database, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rows)
        ranges, odd_ranges = database.fetch(
            f"SELECT count(*), count(*) FILTER (WHERE rows <> {options.batch} AND number < of) FROM ("
            " SELECT rows, row_number() OVER (ORDER BY (through ->> 0)::bigint) AS number,"
            " count(*) OVER () AS of FROM rotator_completedrange) AS ranges"
        )
    return Measurement(
        rows_per_second=run.report["rows_per_second"],
        seconds=run.command.seconds,
        retries=run.report["deferrals"] + run.report["retries"],
        ranges=ranges,
        odd_ranges=odd_ranges,
    )


def _table(found: dict[str, list[Measurement]], databases: dict[str, Database]) -> str:
    lines = [["", "writing, rows/s", "seconds", "ranges", "retries", "highest id", "rows in a heap page"]]
    for name, runs in found.items():
        highest, density = databases[name].fetch(
            f"SELECT max(id), count(*)::float8 / (pg_relation_size('{TABLE}')"
            f" / current_setting('block_size')::bigint) FROM {TABLE}"
        )
        lines.append(
            [
                name,
                Spread.of([m.rows_per_second for m in runs]).shown(),
                Spread.of([m.seconds for m in runs]).shown(".2f"),
                f"{runs[0].ranges:,}",
                f"{sum(m.retries for m in runs):,}",
                f"{highest:,}",
                f"{density:.1f}",
            ]
        )
    return table(lines)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1")
    return share


if __name__ == "__main__":
    main()
