import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.embedded.account import Account
from core.embedded.errors import EmbeddedServerError
from core.embedded.state import make_state_folder, private_socket_folder, state_folder

_OURSELVES = Account(uid=os.geteuid(), gid=os.getegid(), lent=False)
_LENT = Account(uid=65534, gid=65534, lent=True)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket, which pytest's own may not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_an_ordinary_user_keeps_the_data_in_the_clone(tmp_path: Path) -> None:
    assert state_folder(tmp_path, _OURSELVES) == tmp_path / ".postgres"


@pytest.mark.parametrize("mode", [0o700, 0o777, 0o1777], ids=oct)
def test_root_keeps_the_data_out_of_a_clone_that_is_closed_or_shared(short: Path, mode: int) -> None:
    short.chmod(mode)
    assert state_folder(short, _LENT).is_relative_to("/var/lib/django-async-rotator")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of root's")
def test_root_keeps_the_data_in_its_own_clone_that_others_can_enter(short: Path) -> None:
    short.chmod(0o755)
    assert state_folder(short, _LENT) == short / ".postgres"
    os.chown(short, 1000, 1000)
    assert state_folder(short, _LENT) != short / ".postgres"


def test_two_clones_never_share_a_folder(short: Path) -> None:
    short.chmod(0o700)
    assert state_folder(short / "a", _OURSELVES) != state_folder(short / "b", _OURSELVES)
    for clone in ("a", "b"):
        (short / clone).mkdir()
    assert state_folder(short / "a", _LENT) != state_folder(short / "b", _LENT)


def test_the_folder_is_private_whatever_the_umask(short: Path) -> None:
    before = os.umask(0)
    try:
        make_state_folder(short / "state", _OURSELVES)
    finally:
        os.umask(before)
    assert (short / "state").stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_folder_s_place_is_refused(short: Path) -> None:
    (short / "state").write_text("")
    with pytest.raises(EmbeddedServerError, match="DATABASE_URL"):
        make_state_folder(short / "state", _OURSELVES)


@pytest.mark.parametrize("name", ["n" * 90, "a,b"])
def test_a_name_that_no_socket_can_have_leads_to_a_private_temporary_folder(short: Path, name: str) -> None:
    state = short / name
    state.mkdir()
    folder = private_socket_folder(state, _OURSELVES)
    assert not folder.is_relative_to(state)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_socket_folder(state, _OURSELVES) == folder
    folder.rmdir()


def test_a_recorded_folder_is_not_taken_from_others_nor_from_a_copied_clone(short: Path) -> None:
    original, copy = short / "a,b", short / "a,c"
    original.mkdir()
    copy.mkdir()
    folder = private_socket_folder(original, _OURSELVES)
    (copy / "socket.json").write_text((original / "socket.json").read_text())
    of_the_copy = private_socket_folder(copy, _OURSELVES)
    folder.chmod(0o777)
    renewed = private_socket_folder(original, _OURSELVES)
    assert len({folder, of_the_copy, renewed}) == 3
    for new_values in (folder, of_the_copy, renewed):
        new_values.rmdir()
