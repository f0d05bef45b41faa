"""Where do a rotation and one UPDATE spend the processor time? Needs perf (Debian's package linux-perf)."""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness import (
    TABLE,
    BenchmarkError,
    Database,
    Server,
    at_least_one,
    interleaved,
    parser_for,
    run_script,
    statement,
)
from presenting import Machine, table, write_json

_UPDATE: Final = f"UPDATE {TABLE} SET token = gen_random_uuid()"
_HERTZ: Final = 499
# The event counts processor time, and needs no hardware counters, which virtual machines rarely have.
_RECORD: Final = ("record", "--quiet", "--all-cpus", "--event", "cpu-clock", "--freq", str(_HERTZ))
_REPORT: Final = ("report", "--stdio", "--sort", "comm,sym", "--show-nr-samples", "--percent-limit", "0")
_LINE: Final = re.compile(r"\s*[\d.]+%\s+(\d+)\s+(\S.*?)\s+\[[.k]\]\s+(\S.*)")
_IDLE: Final = "swapper"

Profile = Counter[tuple[str, str]]
"""The seconds of each function, by the name of the process and that of the function."""


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "Show the processor time of async_rotate with --no-vacuum, and of one UPDATE of the same rows, by "
        "process and by function, for all processes of the machine. Times are sampled; nothing else should "
        "run.",
        repetitions=1,
    )
    parser.add_argument(
        "--functions", type=at_least_one, default=12, metavar="N", help="the number of functions shown"
    )
    options = parser.parse_args()
    run_script(lambda server: _profile(server, options), server=options.server)


def _profile(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    perf = shutil.which("perf")
    if perf is None:
        raise BenchmarkError("perf is needed: install Debian's package linux-perf.")
    original = server.tickets(options.rows)

    def profiled(work: Callable[[Database], object]) -> Profile:
        with server.copied(original) as database:
            return _sampled(perf, lambda: work(database))

    def rotate(database: Database) -> None:
        database.rotate(concurrency=options.concurrency, batch=options.batch, rows=options.rows, vacuum=False)

    found = interleaved(
        options.repetitions,
        {
            "async_rotate --no-vacuum": lambda: profiled(rotate),
            "one UPDATE": lambda: profiled(lambda database: statement(database, _UPDATE)),
        },
    )
    for name, profiles in found.items():
        print(_shown(name, sum(profiles, Profile()), options))
    write_json(
        options.json,
        machine,
        rows=options.rows,
        profiles={name: [_by_process(one) for one in profiles] for name, profiles in found.items()},
    )
    return True


def _sampled(perf: str, work: Callable[[], object]) -> Profile:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "perf.data"
        recording = subprocess.Popen([perf, *_RECORD, "--output", str(file)], stderr=subprocess.DEVNULL)
        try:
            work()
        finally:
            recording.terminate()
            recording.wait()
        if not file.exists():
            raise BenchmarkError("perf cannot record: it needs root, or kernel.perf_event_paranoid = -1.")
        report = subprocess.run(
            [perf, *_REPORT, "--input", str(file)], capture_output=True, text=True, check=False
        )
    found = [line for line in map(_LINE.fullmatch, report.stdout.splitlines()) if line]
    return Profile({(line[2], line[3]): int(line[1]) / _HERTZ for line in found if line[2] != _IDLE})


def _by_process(profile: Profile) -> dict[str, float]:
    seconds = Counter[str]()
    for (process, _), each in profile.items():
        seconds[process] += each
    return dict(seconds.most_common())


def _shown(name: str, profile: Profile, options: argparse.Namespace) -> str:
    """Return the microseconds of a row, by process and by function."""
    rows = options.rows * options.repetitions
    processes = ", ".join(
        f"{process} {1e6 * seconds / rows:.1f}"
        for process, seconds in _by_process(profile).items()
        if seconds * 100 > profile.total()
    )
    lines = [["process", "function", "µs a row", "share"]]
    lines += [
        [process, function, f"{1e6 * seconds / rows:.2f}", f"{seconds / profile.total():.1%}"]
        for (process, function), seconds in profile.most_common(options.functions)
    ]
    return f"{name}, µs of processor time for each row: {processes}\n{table(lines)}"


if __name__ == "__main__":
    main()
