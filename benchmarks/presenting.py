"""How the benchmarks say what they found: the machine, spreads, a table, a file."""

import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from harness import Server

MEGABYTE: Final = 1_000_000
_GIGABYTE: Final = 1_000_000_000
_SETTINGS: Final = (
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "synchronous_commit",
    "full_page_writes",
    "fsync",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where the figures come from; without it they mean nothing.

    Attributes:
        processor: Its model.
        cores: How many of them this process may use.
        memory_bytes: All there is.
        system: The operating system.
        python: Its version.
        server: PostgreSQL's version.
        settings: PostgreSQL's settings that weigh most here.
        load: How many processes wanted a core on average over the last minute, before the benchmark began.
    """

    processor: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    server: str
    settings: dict[str, str]
    load: float

    @classmethod
    def of(cls, server: Server) -> Self:
        """Describe this machine and the server, wherever that is."""
        version, *settings = server.fetch(
            "SELECT current_setting('server_version'), "
            + ", ".join(f"current_setting('{name}')" for name in _SETTINGS)
        )
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 0,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=_system(),
            python=platform.python_version(),
            server=version,
            settings=dict(zip(_SETTINGS, settings, strict=True)),
            load=os.getloadavg()[0],
        )

    def __str__(self) -> str:
        """Return it as one line."""
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_bytes / _GIGABYTE:.0f} GB, {self.system}, "
            f"load {self.load:.1f} before; Python {self.python}; PostgreSQL {self.server}, {settings}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Some measurements of one thing.

    Attributes:
        median: The one in the middle.
        lowest: The lowest.
        highest: The highest.
    """

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Self:
        """Sum up at least one measurement."""
        return cls(median=statistics.median(numbers), lowest=min(numbers), highest=max(numbers))

    def shown(self, form: str = ",.0f") -> str:
        """Return the median with the range it was found in.

        Args:
            form: How to format each number.
        """
        return f"{self.median:{form}} ({self.lowest:{form}} to {self.highest:{form}})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the first of them the heads, as text: names to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in ruled
    )


def write_json(file: Path | None, machine: Machine, **found: object) -> None:
    """Write everything that was measured, if there is a file to write it to."""
    if file is not None:
        file.write_text(json.dumps({"machine": asdict(machine), **found}, indent=2, default=_plain) + "\n")


def _plain(thing: Any) -> object:  # noqa: ANN401 - whatever json does not know
    return asdict(thing)


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    return " ".join(part for part in (name, platform.system(), platform.release()) if part)
