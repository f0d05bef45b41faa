"""Versions of Django and drivers that this environment does not have: benchmarks/matrix.py tests them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.installed import Environment, copy_of_this_repository

pytestmark = [pytest.mark.foreign, pytest.mark.django_db(transaction=True)]

TOOLS = "'.[project,embedded]' pytest pytest-asyncio pytest-django pytest-xdist"
SETTINGS = ("as installed", "without uvloop", "psycopg in Python alone")


def recent_python() -> str:
    """The newest Python at hand that Django 6 runs on; empty where there is none."""
    installed = Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python3")
    named = [shutil.which(f"python3.{minor}") for minor in (14, 13, 12)]
    newest: tuple[tuple[int, ...], str] = ((3, 11), "")
    for python in [sys.executable, *filter(None, named), *map(str, installed)]:
        command = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        # A name that pyenv has put on the path can be without a version behind it.
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            newest = max(newest, (tuple(map(int, said.stdout.split())), python), key=lambda found: found[0])
    return newest[1]


@pytest.mark.parametrize("version", ["6.0", "6.1"])
def test_a_later_django(version: str, tmp_path: Path) -> None:
    python = recent_python()
    if not python:
        pytest.skip("Django 6 needs Python 3.12 or later")
    clone = copy_of_this_repository(tmp_path / "clone")
    environment = Environment.make(tmp_path / "venv", python=python)
    environment.run(f"pip install {TOOLS} 'Django~={version}.0'", cwd=clone)
    table = environment.run("python benchmarks/matrix.py", cwd=clone)
    for setting in SETTINGS:
        assert f"| this one | {setting} | pass | Python 3.1" in table
    assert table.count(f"Django {version}.") == len(SETTINGS)


@pytest.mark.skipif(
    not (shutil.which("pg_config") and shutil.which("cc")), reason="needs a C compiler and libpq"
)
def test_a_driver_that_is_compiled_here_and_no_uvloop(tmp_path: Path) -> None:
    clone = copy_of_this_repository(tmp_path / "clone")
    environment = Environment.make(tmp_path / "venv")
    environment.run(f"pip install {TOOLS} 'Django~=5.2.0' 'psycopg[c]'", cwd=clone)
    environment.run("pip uninstall --yes psycopg-binary uvloop", cwd=clone)
    table = environment.run("python benchmarks/matrix.py", cwd=clone)
    assert table.count("| pass |") == len(SETTINGS)
    assert " c: " in table
