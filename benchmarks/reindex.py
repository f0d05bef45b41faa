"""What ``async_rotate --reindex`` leaves of the growth of the indexes, and how long it blocks a writer."""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from harness import TABLE, Database, Server, add_numbers, parser_for, run_script, say
from presenting import MEGABYTE, Machine, Spread, table, write_json

_EVERY_SECONDS: Final = 0.005
_UPDATE: Final = f"UPDATE {TABLE} SET title = title WHERE id = (SELECT 1 + (random() * (%s - 1))::bigint)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One rotation, and the rebuild of its indexes.

    Attributes:
        bytes_before: The indexes before the rotation.
        bytes_rotated: The indexes after it.
        bytes_rebuilt: The indexes after the rebuild.
        seconds: The rebuild, from the start of the process to its exit.
        blocked_seconds: The longest UPDATE of one row during the rebuild.
        updates: The number of these.
    """

    bytes_before: int
    bytes_rotated: int
    bytes_rebuilt: int
    seconds: float
    blocked_seconds: float
    updates: int


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How large are the indexes after a rotation, and after async_rotate --reindex? How long does an "
        "UPDATE of one row take at most while they are rebuilt? Exits with 1 if a figure is over its limit.",
        repetitions=3,
    )
    add_numbers(
        parser,
        float,
        ("percent", 10.0, "P", "how much larger than before the indexes may be"),
        ("milliseconds", 100.0, "MS", "how long an UPDATE may take"),
    )
    options = parser.parse_args()
    run_script(lambda server: _measure(server, options), server=options.server)


def _measure(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    original = server.tickets(options.rows)
    found = []
    for repetition in range(1, options.repetitions + 1):
        say(f"repetition {repetition} of {options.repetitions}")
        found.append(_rebuild(server, original, options))
    growth = Spread.of([100 * (m.bytes_rebuilt / m.bytes_before - 1) for m in found])
    blocked = Spread.of([1000 * m.blocked_seconds for m in found])
    print(
        table(
            [
                ["", "before", "rotated", "rebuilt"],
                [
                    "indexes, MB",
                    *(
                        Spread.of([bytes_ / MEGABYTE for bytes_ in each]).shown(".1f")
                        for each in (
                            [m.bytes_before for m in found],
                            [m.bytes_rotated for m in found],
                            [m.bytes_rebuilt for m in found],
                        )
                    ),
                ],
            ]
        )
    )
    print(f"Seconds of the rebuild: {Spread.of([m.seconds for m in found]).shown('.2f')}.")
    holds = True
    for name, spread, worst, limit in (
        ("Indexes after the rebuild, in percent of growth", growth, growth.median, options.percent),
        ("Longest UPDATE of one row, in ms", blocked, blocked.highest, options.milliseconds),
    ):
        is_within = worst <= limit
        holds = holds and is_within
        said = "holds" if is_within else "TOO MUCH"
        print(f"{name}: {spread.shown('.1f')} (at most {limit:g}): {said}.")
    write_json(options.json, machine, rows=options.rows, measurements=found, holds=holds)
    return holds


def _rebuild(server: Server, original: Database, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        before = database.storage()
        database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rows)
        rotated = database.storage()
        with _writer(database, options.rows) as waits:
            finished = database.manage("async_rotate", "--progress=none", "--noinput", "--reindex")
        rebuilt = database.storage()
    return Measurement(
        bytes_before=before.index_bytes,
        bytes_rotated=rotated.index_bytes,
        bytes_rebuilt=rebuilt.index_bytes,
        seconds=finished.seconds,
        blocked_seconds=max(waits),
        updates=len(waits),
    )


@contextmanager
def _writer(database: Database, rows: int) -> Iterator[list[float]]:
    """Update single rows in a session of its own, and collect the seconds of each."""
    waits = list[float]()
    ended = threading.Event()

    def write() -> None:
        with database.connection() as connection:
            while not ended.wait(_EVERY_SECONDS):
                started = time.perf_counter()
                connection.execute(_UPDATE.encode(), (rows,))
                waits.append(time.perf_counter() - started)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield waits
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
