"""Runs the tests of foreign fields in one environment after another, and prints one table of the results.

    python benchmarks/matrix.py --environment 'Django 6.1 on Python 3.12=/path/to/its/venv' ...

Each environment has the packages of ``.[project,embedded,test]``. The first rows are this environment's own,
with settings that change the event loop, the driver or Django. Versions that are not given are not run.
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
# Put before the tests: a module of this name cannot be imported.
_WITHOUT: Final = "import sys; sys.modules[{!r}] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
_VERSIONS: Final = (
    "import django, platform, psycopg; print('Python', platform.python_version(), 'Django',"
    " django.__version__, 'psycopg', psycopg.__version__, psycopg.pq.__impl__)"
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table.

    Attributes:
        name: The name of the row.
        python: The interpreter of the environment.
        variables: The environment variables to add.
        without: The module that is missing; empty for none.
    """

    name: str
    python: Path
    variables: dict[str, str] = field(default_factory=dict)
    without: str = ""

    def run(self) -> tuple[bool, str]:
        """Return whether the tests pass, and the versions or the reason why not."""
        environment = {**os.environ, **self.variables}
        try:
            versions = self._output(["-c", _VERSIONS], environment)
        except subprocess.CalledProcessError as error:
            return False, last_line(error.output)
        start = ["-c", _WITHOUT.format(self.without)] if self.without else ["-m", "pytest"]
        try:
            said = self._output([*start, *TESTS, "-q", "-o", "filterwarnings="], environment)
        except subprocess.CalledProcessError as error:
            return False, f"{versions}: {last_line(error.output)}"
        except subprocess.TimeoutExpired:
            return False, f"{versions}: no end after {SECONDS} s"
        return True, f"{versions}: {last_line(said)}"

    def _output(self, arguments: list[str], environment: dict[str, str]) -> str:
        return subprocess.run(
            [self.python, *arguments],
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


def settings(given: list[str], database: str) -> Iterator[Setting]:
    """Return the rows: this environment's, then those that the user gives."""
    own = Path(sys.executable)
    yield Setting(name="as it is installed", python=own)
    yield Setting(name="without uvloop", python=own, without="uvloop")
    yield Setting(name="psycopg in Python alone", python=own, variables={"PSYCOPG_IMPL": "python"})
    if database:
        yield Setting(name="another server", python=own, variables={"DATABASE_URL": database})
    for text in given:
        name, _, folder = text.partition("=")
        yield Setting(name=name, python=Path(folder) / "bin" / "python")


def main() -> int:
    """Print the table; return 1 where a row fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--database", default="", metavar="URL", help="Another server, as a DATABASE_URL.")
    options = parser.parse_args()
    print("| setting | result | versions, or the reason |\n| --- | --- | --- |")
    passed = True
    for setting in settings(options.environment, options.database):
        is_passed, reason = setting.run()
        passed = passed and is_passed
        print(f"| {setting.name} | {'pass' if is_passed else 'FAIL'} | {reason} |", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
