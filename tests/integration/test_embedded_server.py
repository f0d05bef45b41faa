"""The embedded server, with data of its own, used by real processes that come, go and die."""

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

from core.embedded.server import EmbeddedServer

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
    last = EmbeddedServer(folder)
    last.attach()
    last.leave()
    shutil.rmtree(folder)


class _User:
    """A process that uses the server until it is told to go."""

    def __init__(self, state: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _USER, str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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
        with psycopg.connect(host=str(socket), user="postgres", dbname="rotator"):
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
