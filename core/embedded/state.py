"""Where a clone's server keeps its data, its locks and its socket."""

import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

from core.embedded.account import Account
from core.embedded.configuration import PORT
from core.embedded.errors import EmbeddedServerError

_ROOTS_FOLDER = Path("/var/lib/django-async-rotator")
# macOS has the smallest sun_path: 104 bytes, of which the last is NUL.
_LONGEST_SOCKET_BYTES = 103
_OTHERS_MAY_ENTER = stat.S_IXOTH
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def state_folder(project: Path, account: Account) -> Path:
    """Choose the folder for a clone's server: in the clone, or in a part of the system that is root's.

    Root gives folders away to the account that it lends. It does so only where no other user can put
    a link in the way, and where that account can enter.

    Args:
        project: The clone.
        account: The account that the server runs under.
    """
    project = project.resolve()
    inside = project / ".postgres"
    if not account.lent or (_is_roots_alone(project) and _holds_a_socket(inside / "socket")):
        return inside
    clone = hashlib.sha256(os.fsencode(project)).hexdigest()[:16]
    return _ROOTS_FOLDER / clone


def make_state_folder(state: Path, account: Account) -> None:
    """Make the folder where it is missing.

    Raises:
        EmbeddedServerError: It cannot be made, or it belongs to another user.
    """
    mode = 0o711 if account.lent else 0o700
    try:
        for folder in reversed((state, *state.parents)):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                # Not by mkdir's own mode: the umask would take rights away.
                folder.chmod(mode)
        found = state.lstat()
    except OSError as error:
        raise EmbeddedServerError(
            f"The embedded PostgreSQL cannot keep its data in {state} ({error.strerror}): "
            "clone the project to a folder of yours, or set DATABASE_URL."
        ) from None
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise belongs_to_another(state)


def belongs_to_another(state: Path) -> EmbeddedServerError:
    """Return the error for a server that another user has set up."""
    return EmbeddedServerError(
        f"The embedded PostgreSQL in {state} belongs to another user: "
        "go on as that user, remove the folder, or set DATABASE_URL."
    )


def private_socket_folder(state: Path, account: Account) -> Path:
    """Return the private folder of the server's socket, made where it is missing.

    It is in the state folder, or, where that has too long a name for a socket, a temporary one with
    a name that cannot be foretold, kept on record.

    Raises:
        EmbeddedServerError: The system's temporary folder has too long a name as well.
    """
    folder = state / "socket"
    if _holds_a_socket(folder):
        if not _is_private(folder, account):
            folder.mkdir(mode=0o700, exist_ok=True)
            account.own(folder)
        return folder
    record = state / "socket.json"
    recorded = _read_record(record, state)
    if recorded is not None and _is_private(recorded, account):
        return recorded
    folder = Path(tempfile.mkdtemp(prefix="rotator-"))
    if not _holds_a_socket(folder):
        folder.rmdir()
        raise EmbeddedServerError(
            f"A unix socket in {state} or in {folder.parent} would have too long a name: "
            "clone the project to a folder with a shorter one, or set DATABASE_URL."
        )
    account.own(folder)
    record.write_text(json.dumps({"state": str(state), "socket": str(folder)}))
    return folder


def _read_record(record: Path, state: Path) -> Path | None:
    if not record.exists():
        return None
    content = json.loads(record.read_text())
    # A copy of the clone has the record too, and would meet the original's server there.
    return Path(content["socket"]) if content["state"] == str(state) else None


def _holds_a_socket(folder: Path) -> bool:
    lock = folder / f".s.PGSQL.{PORT}.lock"
    # libpq and the server read a comma as the end of a folder's name.
    return len(os.fsencode(lock)) <= _LONGEST_SOCKET_BYTES and "," not in str(folder)


def _is_private(folder: Path, account: Account) -> bool:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == account.uid and not found.st_mode & 0o077


def _is_roots_alone(project: Path) -> bool:
    for folder in (project, *project.parents):
        found = folder.stat()
        shared = found.st_mode & _OTHERS_MAY_WRITE
        # In a sticky folder others cannot replace what is root's; in the clone they could be first.
        protected = found.st_mode & stat.S_ISVTX and folder != project
        if found.st_uid != 0 or not found.st_mode & _OTHERS_MAY_ENTER or (shared and not protected):
            return False
    return True
