"""Whose account the server runs under: PostgreSQL refuses to run as root, so root lends it to nobody."""

import hashlib
import os
import pwd
import subprocess
from pathlib import Path

from django.db.utils import OperationalError

_COMMAND_TIMEOUT_SECONDS = 330


def account_ids() -> tuple[int, int]:
    """The uid and gid that the server's processes and data belong to."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def reachable(path: Path) -> bool:
    """Whether the server's account may enter every folder down to this path."""
    if os.geteuid() != 0:
        return True
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents if parent.exists())


def state_folder(project: Path) -> Path:
    """Where this clone's server keeps its data: in the clone, or in root's own part of /var/lib."""
    folder = project / ".postgres"
    if reachable(folder):
        return folder
    clone = hashlib.sha256(str(project).encode()).hexdigest()[:16]
    return Path("/var/lib/django-async-rotator") / clone


def run(*command: str | Path) -> None:
    """Run one of the server's programs under the server's account.

    Raises:
        OperationalError: It failed; carries the last line that it printed.
    """
    lend: dict[str, object] = {}
    if os.geteuid() == 0:
        uid, gid = account_ids()
        lend = {"user": uid, "group": gid, "extra_groups": []}
    # A server that is started inherits the output: a pipe would keep this call waiting for its end.
    completed = subprocess.run(  # type: ignore[call-overload]  # noqa: S603 -- our own programs and paths
        command,
        cwd="/",
        env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=_COMMAND_TIMEOUT_SECONDS,
        check=False,
        **lend,
    )
    if completed.returncode:
        program = Path(command[0]).name
        raise OperationalError(
            f"The embedded PostgreSQL could not be started ({program} ended with {completed.returncode}): "
            "see server.log in its data folder, or set DATABASE_URL to a server of yours."
        )
