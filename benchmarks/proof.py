"""What --prove adds to a rotation: time, space and memory, and how long a verification takes."""

import argparse
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

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

_DIGESTS: Final = f"SELECT count(sha256(convert_to(token::text, 'UTF8'))) FROM {TABLE}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One rotation.

    Attributes:
        seconds: The process's time, without the verification at its end.
        verification_seconds: The time of that verification, or of a later one if it took longer; 0 without.
        bytes_per_row: The space of the ledger with its index; 0 without.
        scan_seconds: The time of a query that reads the table and makes the digests, with nothing else.
        leaked_seconds: The time of a rotation of the values in a list, after that.
        peak_bytes: The high-water mark of the process's memory.
    """

    seconds: float
    verification_seconds: float
    bytes_per_row: float
    scan_seconds: float
    leaked_seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure with a limit."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the figure is within its limit."""
        return self.value <= self.limit

    def __str__(self) -> str:
        """Return the figure, its limit and the verdict as one line."""
        verdict = "holds" if self.holds else "TOO MUCH"
        return f"{self.name}: {self.value:.1f} {self.unit}, limit {self.limit:g} {self.unit}: {verdict}."


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How much do --prove and --guard add to a rotation? The verification at the end is measured apart, "
        "and so is --leaked with a list of --lines. Exits with 1 if a figure is over its limit.",
        repetitions=3,
    )
    add_numbers(parser, at_least_one, ("lines", 1000, "N", "leaked values"))
    add_numbers(
        parser,
        float,
        ("percent", 35.0, "P", "how much time --prove may add"),
        ("bytes", 60.0, "B", "how many bytes a row may take in the ledger, with its index"),
        ("seconds", 5.0, "S", "how long a verification may take"),
        ("leaked", 2.0, "S", "how long a rotation of the leaked values may take"),
        ("memory", 8.0, "MB", "how much memory --prove may add to the peak"),
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
    lines = [["", "seconds", "verification, s", "digests alone, s", "--leaked, s", "bytes a row", "peak, MB"]]
    for name, measurements in found.items():
        lines.append(
            [
                name,
                Spread.of([m.seconds for m in measurements]).shown(".2f"),
                Spread.of([m.verification_seconds for m in measurements]).shown(".2f"),
                Spread.of([m.scan_seconds for m in measurements]).shown(".2f"),
                Spread.of([m.leaked_seconds for m in measurements]).shown(".2f"),
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
    leaked = Spread.of([m.leaked_seconds for m in plain]).median
    figures = (
        Figure(name="time that --prove adds", value=percent, limit=options.percent, unit="%"),
        Figure(name="time of a verification", value=seconds, limit=options.seconds, unit="s"),
        Figure(name="space of a row in the ledger", value=bytes_per_row, limit=options.bytes, unit="bytes"),
        Figure(name="memory that --prove adds", value=memory, limit=options.memory, unit="MB"),
        Figure(
            name=f"time of --leaked with {options.lines:,} values",
            value=leaked,
            limit=options.leaked,
            unit="s",
        ),
    )
    print(*figures, sep="\n")
    scan = Spread.of([m.scan_seconds for m in proved]).median
    print(
        f"In relation to a query that only makes the digests: verification {seconds / scan:.1f}, --leaked "
        f"{leaked / scan:.1f}."
    )
    holds = all(figure.holds for figure in figures)
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
        scan_seconds = statement(database, _DIGESTS)
        leaked_seconds = _rotate_leaked(database, options.lines)
    return Measurement(
        seconds=run.command.seconds - seconds,
        verification_seconds=max(seconds, later),
        bytes_per_row=bytes_per_row,
        scan_seconds=scan_seconds,
        leaked_seconds=leaked_seconds,
        peak_bytes=run.report["peak_memory_bytes"],
    )


def _rotate_leaked(database: Database, lines: int) -> float:
    with database.folder() as folder:
        file = folder / "leaked.txt"
        (tokens,) = database.fetch(
            f"SELECT string_agg(token::text, E'\\n') FROM (SELECT token FROM {TABLE} LIMIT {lines}) AS leaked"
        )
        file.write_text(tokens)
        finished = database.manage(
            "async_rotate", "--progress=none", "--noinput", "--no-vacuum", f"--leaked={file}"
        )
    return finished.seconds


def _seconds(verified: dict[str, str]) -> float:
    started, ended = (datetime.fromisoformat(verified[name]) for name in ("started_at", "ended_at"))
    return (ended - started).total_seconds()


if __name__ == "__main__":
    main()
