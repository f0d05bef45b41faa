"""What --prove adds to a rotation: time, space and memory, and how long a verification takes."""

import argparse
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from harness import Database, Server, at_least_one, interleaved, parser_for, run_script
from presenting import MEGABYTE, Machine, Spread, table, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One rotation.

    Attributes:
        seconds: The process's time, without the verification at its end.
        verification_seconds: The time of that verification, or of a later one if it took longer; 0 without.
        bytes_per_row: The space of the ledger with its index; 0 without.
        peak_bytes: The high-water mark of the process's memory.
    """

    seconds: float
    verification_seconds: float
    bytes_per_row: float
    peak_bytes: int


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How much do --prove and --guard add to a rotation? The verification at the end is measured apart. "
        "Exits with 1 if --prove adds more than --percent to the time or more than --memory to the peak, if "
        "a row takes more than --bytes in the ledger, or if a verification takes more than --seconds.",
        repetitions=3,
    )
    parser.add_argument(
        "--rows", type=at_least_one, default=1_000_000, metavar="N", help="tickets (default: %(default)s)"
    )
    for name, default, metavar, text in (
        ("percent", 35.0, "P", "how much time --prove may add"),
        ("bytes", 60.0, "B", "how many bytes a row may take in the ledger, with its index"),
        ("seconds", 5.0, "S", "how long a verification may take"),
        ("memory", 8.0, "MB", "how much memory --prove may add to the peak"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar=metavar, help=f"{text} (default: %(default)s)"
        )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    original = server.tickets(options.rows)
    ways: dict[str, tuple[str, ...]] = {
        "without": (),
        "--prove": ("--prove",),
        "--prove --guard": ("--prove", "--guard"),
    }
    found = interleaved(
        options.repetitions,
        {name: partial(_rotate, server, original, options, more) for name, more in ways.items()},
    )
    lines = [["", "seconds", "verification, s", "bytes a row", "peak memory, MB"]]
    for name, measurements in found.items():
        lines.append(
            [
                name,
                Spread.of([m.seconds for m in measurements]).shown(".2f"),
                Spread.of([m.verification_seconds for m in measurements]).shown(".2f"),
                Spread.of([m.bytes_per_row for m in measurements]).shown(".1f"),
                Spread.of([m.peak_bytes / MEGABYTE for m in measurements]).shown(".1f"),
            ]
        )
    print(table(lines))
    plain, proved = found["without"], found["--prove"]
    percent = 100 * (_median(plain, "seconds", proved) - 1)
    seconds = Spread.of([m.verification_seconds for m in proved]).median
    bytes_per_row = Spread.of([m.bytes_per_row for m in proved]).median
    memory = (
        Spread.of([m.peak_bytes for m in proved]).median - Spread.of([m.peak_bytes for m in plain]).median
    ) / MEGABYTE
    holds: bool = (
        percent <= options.percent
        and bytes_per_row <= options.bytes
        and seconds <= options.seconds
        and memory <= options.memory
    )
    print(
        f"--prove adds {percent:+.0f} % of time (at most {options.percent:g}) before the verification of "
        f"{seconds:.2f} s (at most {options.seconds:g}), {bytes_per_row:.1f} bytes a row (at most "
        f"{options.bytes:g}), {memory:+.1f} MB (at most {options.memory:g}): "
        f"{'holds' if holds else 'TOO MUCH'}."
    )
    write_json(options.json, machine, measurements=found, holds=holds)
    return holds


def _median(plain: list[Measurement], name: str, other: list[Measurement]) -> float:
    """Return by which factor the median of a figure is larger."""
    return (
        Spread.of([getattr(m, name) for m in other]).median
        / Spread.of([getattr(m, name) for m in plain]).median
    )


def _rotate(
    server: Server, original: Database, options: argparse.Namespace, more: tuple[str, ...]
) -> Measurement:
    with server.copied(original) as database:
        run = database.rotate(
            concurrency=options.concurrency, batch=options.batch, rows=options.rows, more=more
        )
        verified, bytes_per_row = run.report["verification"], 0.0
        seconds = _seconds(verified) if verified else 0.0
        later = seconds
        if verified:
            rotation = run.report["rotation"]
            finished = database.manage("verify_rotation", str(rotation), "--json", "--verbosity=0")
            (ledger_bytes,) = database.fetch(f"SELECT pg_total_relation_size('rotator_ledger_{rotation}')")
            bytes_per_row = ledger_bytes / options.rows
            later = finished.seconds
    return Measurement(
        seconds=run.command.seconds - seconds,
        verification_seconds=max(seconds, later),
        bytes_per_row=bytes_per_row,
        peak_bytes=run.report["peak_memory_bytes"],
    )


def _seconds(verified: dict[str, str]) -> float:
    started, ended = (datetime.fromisoformat(verified[name]) for name in ("started_at", "ended_at"))
    return (ended - started).total_seconds()


if __name__ == "__main__":
    main()
