"""The embedded server, with data of its own, used by real processes that come, go and die."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from core.embedded.account import Account
from core.embedded.binaries import find_programs
from core.embedded.configuration import PORT
from core.embedded.errors import EmbeddedServerError
from core.embedded.server import EmbeddedServer
from core.embedded.state import state_folder

_USER = """
import sys
from pathlib import Path
from core.embedded.server import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
print(server.attach(), flush=True)
sys.stdin.read()
server.leave()
"""


@pytest.fixture
def state() -> Iterator[Path]:
    # Not below pytest's own folder: that is closed to the account which root lends to the server.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o711)
    yield folder
    if (folder / "data" / "postmaster.pid").exists():
        last = EmbeddedServer(folder)
        last.attach()
        last.leave()
    shutil.rmtree(folder)


class _User:
    """A process that uses the server until it is told to go."""

    def __init__(self, state: Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _USER, str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )
        assert self._process.stdout is not None
        self.socket = Path(self._process.stdout.readline().strip())

    def go(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def die(self) -> None:
        self._process.kill()
        self._process.communicate()


def _answers(socket: Path) -> bool:
    try:
        with psycopg.connect(host=str(socket), port=PORT, user="postgres", dbname="rotator"):
            return True
    except psycopg.OperationalError:
        return False


def _postmaster(state: Path) -> int:
    return int((state / "data" / "postmaster.pid").read_text().split("\n", 1)[0])


def test_the_last_one_out_stops_the_server(state: Path) -> None:
    first, second = _User(state), _User(state)
    first.go()
    assert _answers(second.socket)
    second.go()
    assert not _answers(second.socket)


def test_a_killed_user_leaves_the_server_to_the_next_one(state: Path) -> None:
    killed = _User(state)
    killed.die()
    assert _answers(killed.socket)
    following = _User(state)
    following.go()
    assert not _answers(following.socket)


def test_a_killed_server_recovers_at_the_next_start(state: Path) -> None:
    user = _User(state)
    os.kill(_postmaster(state), signal.SIGKILL)
    user.die()
    following = _User(state)
    assert _answers(following.socket)
    following.go()


@pytest.mark.slow
def test_a_stale_pid_file_that_names_a_stranger_is_neither_obeyed_nor_killed(state: Path) -> None:
    user = _User(state)
    pid_file = state / "data" / "postmaster.pid"
    lines = pid_file.read_text().split("\n")
    user.go()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]))
        following = _User(state)
        assert _answers(following.socket)
        following.go()
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.slow
def test_a_stale_pid_file_that_names_another_clone_s_server_is_not_believed(state: Path) -> None:
    other = state / "other"
    neighbour = _User(other)
    user = _User(state)
    pid_file = state / "data" / "postmaster.pid"
    lines = pid_file.read_text().split("\n")
    user.go()
    pid_file.write_text("\n".join([str(_postmaster(other)), *lines[1:]]))
    following = _User(state)
    assert _answers(following.socket)
    following.go()
    assert _answers(neighbour.socket)
    neighbour.go()


def test_the_user_s_own_environment_does_not_lead_elsewhere(state: Path) -> None:
    user = _User(state, PGPORT="1", PGHOST="nowhere", PGDATA="/nowhere", LC_ALL="no_such_locale")
    assert _answers(user.socket)
    user.go()


@pytest.mark.slow
def test_a_forked_child_does_not_keep_the_server_from_its_parent(state: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from core.embedded.server import EmbeddedServer
from core.embedded.state import state_folder
server = EmbeddedServer(Path(sys.argv[1]))
socket = server.attach()
os.register_at_fork(after_in_child=server.abandon)
if os.fork() == 0:
    server.leave()
    os._exit(0)
os.wait()
assert (socket / ".s.PGSQL.5432").exists()
server.leave()
assert not (socket / ".s.PGSQL.5432").exists()
"""
    subprocess.run([sys.executable, "-c", script, str(state)], check=True)


@pytest.mark.slow
def test_data_of_another_major_version_is_left_alone(state: Path) -> None:
    _User(state).go()
    version = state / "data" / "PG_VERSION"
    kept = version.read_text()
    version.write_text("12\n")
    with pytest.raises(EmbeddedServerError, match=r"made by PostgreSQL 12.* remove the folder"):
        EmbeddedServer(state).attach()
    version.write_text(kept)


@pytest.mark.slow
def test_what_the_server_says_reaches_the_user(state: Path) -> None:
    _User(state).go()
    (state / "data" / "pg_hba.conf").write_text("nonsense\n")
    with pytest.raises(EmbeddedServerError, match=r"could not load .*pg_hba\.conf"):
        EmbeddedServer(state).attach()
    (state / "data" / "pg_hba.conf").write_text("local all all trust\n")


@pytest.mark.slow
def test_a_folder_with_special_characters_in_its_name_works(state: Path) -> None:
    unhandy = state / 'it\'s $HOME, "quoted" `by` a friend \\ é'
    user = _User(unhandy)
    assert _answers(user.socket)
    user.go()
    assert not _answers(user.socket)
    user.socket.rmdir()


def test_an_installed_server_replaces_the_missing_wheel(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    try:
        programs = find_programs(Account.for_server(), state)
    except EmbeddedServerError:
        pytest.skip("no PostgreSQL is installed besides the wheel")
    server = EmbeddedServer(state)
    socket = server.attach()
    with psycopg.connect(host=str(socket), user="postgres", dbname="rotator") as connection:
        assert connection.info.server_version // 10000 == programs.major
    server.leave()
    assert not _answers(socket)
    shutil.rmtree(state / "data")


def test_the_system_checks_start_no_server(tmp_path: Path) -> None:
    for part in ("core", "tickets", "rotator"):
        shutil.copytree(Path(part), tmp_path / part)
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    environment |= {"PYTHONPATH": str(tmp_path), "DJANGO_SETTINGS_MODULE": "core.settings"}
    subprocess.run([sys.executable, "-m", "django", "check"], cwd=tmp_path, env=environment, check=True)
    assert not state_folder(tmp_path, Account.for_server()).exists()
