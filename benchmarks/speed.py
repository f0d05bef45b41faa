"""The whole of async_rotate beside one UPDATE statement on the same data."""

import argparse
from dataclasses import dataclass

from harness import (
    TABLE,
    Database,
    Server,
    Storage,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
    statement,
)
from presenting import MEGABYTE, Machine, Spread, table, write_json

_ROTATE = "async_rotate"
_WITHOUT_VACUUM = "--no-vacuum"
_UPDATE = "one UPDATE"
_STATEMENT = f"UPDATE {TABLE} SET token = gen_random_uuid()"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One contestant, once.

    Attributes:
        seconds: The command from its process's start to its exit, or the statement alone.
        writing_seconds: Of these, from the first range's begin to the last one's commit.
        making_seconds: Of these, what making the values alone takes the server; 0 where it makes none.
        client_cpu_seconds: What the client's process used of the processor; None for the statement.
        retries: The number of retries.
        wal_bytes: What the server wrote to its log.
        wal_cleaned_bytes: The same with a VACUUM after it, which removes what old rows are still there.
        heap_bytes: What the heap grew by.
        index_bytes: What the indexes grew by.
        heap_before_bytes: What the heap was.
    """

    seconds: float
    writing_seconds: float
    making_seconds: float = 0.0
    client_cpu_seconds: float | None = None
    retries: int = 0
    wal_bytes: int
    wal_cleaned_bytes: int
    heap_bytes: int
    index_bytes: int
    heap_before_bytes: int


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How long does the whole command take, from its process's start to its exit, beside the statement "
        f'"{_STATEMENT}" on the same data, which holds the lock of every row until it ends? Both begin with '
        "the very same files, in turns; a ratio below 1 says that the command was faster. The command runs "
        "once more without its VACUUM, to see what that costs.",
        repetitions=3,
    )
    parser.add_argument(
        "--rows",
        type=at_least_one,
        default=1_000_000,
        metavar="N",
        help="how many tickets there are (default: %(default)s)",
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), settings=options.settings)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    original = server.tickets(options.rows)
    found = interleaved(
        options.repetitions,
        {
            _ROTATE: lambda: _rotate(server, original, options),
            _WITHOUT_VACUUM: lambda: _rotate(server, original, options, vacuum=False),
            _UPDATE: lambda: _update(server, original, options.rows),
        },
    )
    print(_table(found, options.rows))
    pairs = list(zip(found[_ROTATE], found[_UPDATE], strict=True))
    ratios = [ours.seconds / its.seconds for ours, its in pairs]
    print(f"Seconds of {_ROTATE} to those of {_UPDATE}, in each turn: {Spread.of(ratios).shown('.2f')}.")
    writing = [ours.writing_seconds / its.seconds for ours, its in pairs]
    print(f"Its writing alone, without its start and its checks: {Spread.of(writing).shown('.2f')}.")
    costs = [
        ours.writing_seconds / without.writing_seconds
        for ours, without in zip(found[_ROTATE], found[_WITHOUT_VACUUM], strict=True)
    ]
    print(f"Its writing beside VACUUM to that without: {Spread.of(costs).shown('.2f')}.")
    costs = [
        ours.seconds / without.seconds
        for ours, without in zip(found[_ROTATE], found[_WITHOUT_VACUUM], strict=True)
    ]
    print(f"As a whole, with the VACUUM at the end, to that without: {Spread.of(costs).shown('.2f')}.")
    wal = [ours.wal_cleaned_bytes / its.wal_cleaned_bytes for ours, its in pairs]
    print(
        f"WAL of {_ROTATE} to that of {_UPDATE}, once the table is vacuumed: {Spread.of(wal).shown('.4f')}."
    )
    # Worth a line of its own: a server that was built without OpenSSL opens /dev/urandom for every value.
    making = [its.making_seconds for _, its in pairs]
    unmade = [ours.seconds / (its.seconds - its.making_seconds) for ours, its in pairs]
    print(
        f"Of the seconds of {_UPDATE}, gen_random_uuid() alone takes {Spread.of(making).shown('.2f')}; "
        f"if that were free, the first ratio would be {Spread.of(unmade).shown('.2f')}."
    )
    write_json(options.json, machine, rows=options.rows, measurements=found, ratios=ratios)
    return True


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


def _update(server: Server, original: Database, rows: int) -> Measurement:
    with server.copied(original) as database:
        before = database.storage()
        seconds = statement(database, _STATEMENT)
        making_seconds = _seconds_for(database, "gen_random_uuid()", rows) - _seconds_for(database, "n", rows)
        return _measurement(
            database, before, seconds=seconds, writing_seconds=seconds, making_seconds=making_seconds
        )


def _seconds_for(database: Database, expression: str, rows: int) -> float:
    """How long the server takes to work an expression out for this many rows that are in no table."""
    return statement(database, f"SELECT count({expression}) FROM generate_series(1, {rows}) AS n")


def _measurement(
    database: Database,
    before: Storage,
    *,
    seconds: float,
    writing_seconds: float,
    making_seconds: float = 0.0,
    client_cpu_seconds: float | None = None,
    retries: int = 0,
) -> Measurement:
    after = database.storage()
    # Old rows that are still there have to be removed some day.
    statement(database, f"VACUUM (TRUNCATE false) {TABLE}")
    cleaned = database.storage()
    return Measurement(
        seconds=seconds,
        writing_seconds=writing_seconds,
        making_seconds=making_seconds,
        client_cpu_seconds=client_cpu_seconds,
        retries=retries,
        wal_bytes=after.wal_position - before.wal_position,
        wal_cleaned_bytes=cleaned.wal_position - before.wal_position,
        heap_bytes=after.heap_bytes - before.heap_bytes,
        index_bytes=after.index_bytes - before.index_bytes,
        heap_before_bytes=before.heap_bytes,
    )


def _table(found: dict[str, list[Measurement]], rows: int) -> str:
    heads = [
        "",
        "seconds",
        "rows/s",
        "writing, rows/s",
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
                Spread.of([rows / m.seconds for m in measurements]).shown(),
                f"{Spread.of([rows / m.writing_seconds for m in measurements]).median:,.0f}",
                Spread.of(cpu).shown(".2f") if cpu else "none",
                f"{Spread.of([m.wal_bytes / rows for m in measurements]).median:,.1f}",
                f"{Spread.of([m.wal_cleaned_bytes / rows for m in measurements]).median:,.1f}",
                f"{heap:+,.0f} MB (x{growth:.2f})",
                f"{indexes:+,.0f} MB",
            ]
        )
    return table(lines)


if __name__ == "__main__":
    main()
