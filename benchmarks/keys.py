"""Does it matter what the rows' keys are?"""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Final

from harness import TABLE, Database, Server, add_numbers, interleaved, parser_for, run_script
from presenting import Machine, Spread, table, write_json

_INTEGER: Final = "integers, in the order of the rows"
# The rotator asks the server for the key's type, not the model, so these are the tickets all the same.
_KEYS: Final = {
    _INTEGER: None,
    "random UUIDs": "uuid USING gen_random_uuid()",
    "UUIDs in the order of the rows": "uuid USING lpad(to_hex(id), 32, '0')::uuid",
    "texts in the order of the rows": "text USING lpad(id::text, 12, '0')",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        seconds: From the process's start to its exit.
        writing_seconds: Of these, from the first range to the last.
    """

    seconds: float
    writing_seconds: float


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "How long does async_rotate take where the same rows have keys of another kind? Random keys are in "
        "another order than the rows, so that each range writes to pages all over the table. Exits with 1 if "
        "any kind takes more than --factor of the time that integers do.",
        repetitions=3,
    )
    add_numbers(parser, float, ("factor", 1.2, "X", "how much longer any of them may take"))
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    originals = {name: _tickets(server, options.rows, kind) for name, kind in _KEYS.items()}
    found = interleaved(
        options.repetitions,
        {name: partial(_rotate, server, original, options) for name, original in originals.items()},
    )
    lines = [["keys", "seconds", "of which writing", "to integers"]]
    worst = 0.0
    for name, measurements in found.items():
        ratios = Spread.of(
            [m.seconds / base.seconds for m, base in zip(measurements, found[_INTEGER], strict=True)]
        )
        worst = max(worst, ratios.median)
        lines.append(
            [
                name,
                Spread.of([m.seconds for m in measurements]).shown(".2f"),
                Spread.of([m.writing_seconds for m in measurements]).shown(".2f"),
                ratios.shown(".2f"),
            ]
        )
    print(table(lines))
    holds: bool = worst <= options.factor
    print(f"At most {options.factor:g} times what integers take: {'holds' if holds else 'TOO MUCH'}.")
    write_json(options.json, machine, rows=options.rows, measurements=found, holds=holds)
    return holds


def _tickets(server: Server, rows: int, kind: str | None) -> Database:
    new_values = server.tickets(rows)
    if kind is not None:
        new_values.run(
            f"ALTER TABLE {TABLE} ALTER id DROP IDENTITY",
            f"ALTER TABLE {TABLE} ALTER id TYPE {kind}",
            f"VACUUM ANALYZE {TABLE}",
            "CHECKPOINT",
        )
    return new_values


def _rotate(server: Server, original: Database, options: argparse.Namespace) -> Measurement:
    with server.copied(original) as database:
        run = database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rows)
    return Measurement(
        seconds=run.command.seconds, writing_seconds=options.rows / run.report["rows_per_second"]
    )


if __name__ == "__main__":
    main()
