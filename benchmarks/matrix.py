"""Runs the tests of foreign fields in each environment with each setting, and prints one table.

    python benchmarks/matrix.py --environment 'Django 6.1 on Python 3.12=/path/to/its/venv' ...
    python benchmarks/matrix.py --server 'PostgreSQL 15=postgres://user:password@host/postgres' ...

An environment has the packages of ``.[project,embedded,test]``. The first one is that of this script. The
settings are the installed packages on the embedded server, an event loop and a driver without the packages
that a project may lack, and the given servers. Versions that are not given are not run.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parent.parent
TESTS: Final = ("tests/integration/test_foreign_fields.py", "tests/integration/test_callers.py")
SECONDS: Final = 600
SERVER: Final = "TEST_DATABASE_URL"
# Put before the tests: a module of this name cannot be imported.
_WITHOUT: Final = "import sys; sys.modules[{!r}] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
_VERSIONS: Final = f"""
import django, os, platform, psycopg
print("Python", platform.python_version(), "Django", django.__version__, end=" ")
print("psycopg", psycopg.__version__, psycopg.pq.__impl__, end=" ")
if url := os.environ.get({SERVER!r}):
    with psycopg.connect(url) as server:
        print("PostgreSQL", server.info.parameter_status("server_version"))
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of an environment.

    Attributes:
        name: The name of the setting.
        variables: The environment variables to add.
        without: The module that is missing; empty for none.
    """

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    without: str = ""

    def run(self, python: Path) -> tuple[bool, str]:
        """Return whether the tests pass, and the versions or the reason why not."""
        environment = {name: value for name, value in os.environ.items() if name != SERVER} | self.variables
        try:
            versions = _output(python, ["-c", _VERSIONS], environment)
        except subprocess.CalledProcessError as error:
            return False, last_line(error.output)
        start = ["-c", _WITHOUT.format(self.without)] if self.without else ["-m", "pytest"]
        try:
            said = _output(python, [*start, *TESTS, "-q", "-o", "filterwarnings="], environment)
        except subprocess.CalledProcessError as error:
            return False, f"{versions}: {last_line(error.output)}"
        except subprocess.TimeoutExpired:
            return False, f"{versions}: no end after {SECONDS} s"
        return True, f"{versions}: {last_line(said)}"


def _output(python: Path, arguments: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(
        [python, *arguments],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=True,
    ).stdout.strip()


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def environments(given: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield the names and interpreters of the environments: this one, then those that the user gives."""
    yield "this one", Path(sys.executable)
    for text in given:
        name, _, folder = text.partition("=")
        yield name, Path(folder) / "bin" / "python"


def settings(servers: list[str]) -> Iterator[Setting]:
    """Yield the settings: the packages, then the servers that the user gives."""
    yield Setting(name="as installed")
    yield Setting(name="without uvloop", without="uvloop")
    yield Setting(name="psycopg in Python alone", variables={"PSYCOPG_IMPL": "python"})
    for text in servers:
        name, _, url = text.partition("=")
        yield Setting(name=name, variables={SERVER: url})


def main() -> int:
    """Print the table; return 1 where a row fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL")
    options = parser.parse_args()
    print("| environment | setting | result | versions, or the reason |\n| --- | --- | --- | --- |")
    passed = True
    for name, python in environments(options.environment):
        for setting in settings(options.server):
            is_passed, reason = setting.run(python)
            passed = passed and is_passed
            result = "pass" if is_passed else "FAIL"
            print(f"| {name} | {setting.name} | {result} | {reason} |", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
