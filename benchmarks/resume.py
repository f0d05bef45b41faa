"""How long async_rotate takes to its first new range when many are completed already."""

import argparse
import time
from dataclasses import dataclass
from functools import partial

from harness import TABLE, Database, Server, add_numbers, at_least_one, interleaved, parser_for, run_script
from presenting import MEGABYTE, Machine, Spread, table, write_json

# A checkpoint of one row each: as many as there would be after a billion rows in ranges of 2,000.
_CRAFT = """
INSERT INTO rotator_completedrange (rotation_id, after, through, rows, seconds)
SELECT r.id, CASE WHEN t.number > 1 THEN jsonb_build_array(t.previous) END, jsonb_build_array(t.id), 1, 0.01
FROM (
    SELECT id, lag(id) OVER (ORDER BY id) AS previous, row_number() OVER (ORDER BY id) AS number FROM {table}
) AS t, rotator_rotation r
WHERE t.number <= {checkpoints}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        first_range_seconds: From the process's start to the first new range's commit.
        peak_bytes: The high-water mark of its memory.
    """

    first_range_seconds: float
    peak_bytes: int


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How long does it take from the process's start to the first new range's commit, with so many "
        "checkpoints of the same rotation? The server's clock tells when a range was committed, so it has to "
        "be this machine's. Exits with 1 if the most checkpoints take over --seconds, or over --difference "
        "more memory than none.",
        repetitions=3,
        rows=None,
    )
    parser.add_argument(
        "--checkpoints",
        type=int,
        nargs="+",
        default=[0, 1000, 100_000, 500_000],
        metavar="N",
        help="how many ranges are completed already (default: 0 1000 100000 500000)",
    )
    add_numbers(parser, at_least_one, ("rest", 100_000, "N", "how many rows are left to rotate"))
    add_numbers(
        parser,
        float,
        ("seconds", 2.0, "S", "how long the most may take"),
        ("difference", 4.0, "MB", "how much more memory they may need"),
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    counts = sorted(set(options.checkpoints))
    originals = {count: _interrupted(server, count, options.rest) for count in counts}
    found = interleaved(
        options.repetitions,
        {
            f"{count:,} checkpoints": partial(_resume, server, original, count, options)
            for count, original in originals.items()
        },
    )
    lines = [["", "first new range after, s", "peak memory, MB"]]
    for name, measurements in found.items():
        seconds = Spread.of([m.first_range_seconds for m in measurements])
        peak = Spread.of([m.peak_bytes / MEGABYTE for m in measurements])
        lines.append([name, seconds.shown(".2f"), peak.shown(".1f")])
    print(table(lines))
    fewest, *_, most = found.values()
    slowest = Spread.of([m.first_range_seconds for m in most]).median
    more = (
        Spread.of([m.peak_bytes for m in most]).median - Spread.of([m.peak_bytes for m in fewest]).median
    ) / MEGABYTE
    holds: bool = slowest <= options.seconds and more <= options.difference
    print(
        f"With {counts[-1]:,} checkpoints: {slowest:.2f} s (at most {options.seconds:g}), {more:+.1f} MB to "
        f"{counts[0]:,} (at most {options.difference:g}): {'holds' if holds else 'TOO MUCH'}."
    )
    write_json(options.json, machine, measurements=found, holds=holds)
    return holds


def _interrupted(server: Server, checkpoints: int, rest: int) -> Database:
    """A database with an unfinished rotation that has this many checkpoints, and so many rows left."""
    database = server.tickets(checkpoints + rest)
    # A real one, which a limit of one row ends at once.
    database.manage("async_rotate", "--progress=none", "--noinput", "--no-preflight", "--stop-after=1")
    database.run(
        "TRUNCATE rotator_completedrange",
        _CRAFT.format(table=TABLE, checkpoints=checkpoints),
        # Rows that no session has written since the rotation began would count as late rows.
        f"UPDATE {TABLE} SET title = title WHERE id <= {checkpoints}",
        f"VACUUM {TABLE}",
        f"UPDATE rotator_rotation SET rows_done = {checkpoints}",
        "VACUUM (ANALYZE) rotator_completedrange",
    )
    return database


def _resume(server: Server, original: Database, checkpoints: int, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        # A rotation refuses to continue in another database.
        database.run(
            "UPDATE rotator_rotation SET identity ="
            " jsonb_set(identity, '{database_oid}', to_jsonb(oid::bigint))"
            " FROM pg_database WHERE datname = current_database()"
        )
        started = time.time()
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rest)
        (committed,) = database.fetch(
            "SELECT EXTRACT(epoch FROM min(committed_at))::float8 FROM"
            f" (SELECT committed_at FROM rotator_completedrange ORDER BY id OFFSET {checkpoints}) AS new"
        )
    return Measurement(first_range_seconds=committed - started, peak_bytes=run.report["peak_memory_bytes"])


if __name__ == "__main__":
    main()
