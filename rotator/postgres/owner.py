"""The process that owns a rotation: its identity, and whether it has ended."""

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rotator import __version__

# The owner of a running rotation sends a heartbeat each second. After this time without one, helpers do not
# rely on the throttles that it reads ...
UNKNOWN_THROTTLES_SECONDS: Final = 5.0
# ... and after this time other processes call it silent, or take the rotation over.
SILENT_SECONDS: Final = 10.0

_PROC: Final = Path("/proc")
# proc_pid_stat(5): the process's start in clock ticks since boot, counted from after the command's name.
_START_TIME_FIELD: Final = 19
# A zombie has ended, though its parent process has not read its exit status.
_ENDED: Final = "ZX"


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that owns a rotation, or owned it.

    Attributes:
        process: The boot, the pid namespace and the start time, which identify the process among all with
            this pid; empty where the system does not provide them.
        user: The system user that runs it.
        version: The version of this package that it runs.
    """

    host: str
    pid: int
    process: str
    user: str
    version: str

    def __str__(self) -> str:
        """Return the user, the host and the pid."""
        return f"{self.user or 'an unknown user'} on {self.host} (pid {self.pid})"

    def is_gone(self) -> bool:
        """Return whether it ran on this host and has ended; False where that is unknown."""
        machine, _, started = self.process.rpartition(" ")
        if not machine or self.host != socket.gethostname() or machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            # It exists, and belongs to another user.
            pass
        fields = _stat(self.pid)
        # /proc may hide the processes of other users (hidepid).
        return bool(fields) and (fields[0] in _ENDED or fields[_START_TIME_FIELD] != started)


def this_process() -> Owner:
    """Return this process as an owner."""
    pid = os.getpid()
    machine, fields = _machine(), _stat(pid)
    return Owner(
        host=socket.gethostname(),
        pid=pid,
        process=f"{machine} {fields[_START_TIME_FIELD]}" if machine and fields else "",
        user=_user(),
        version=__version__,
    )


def _machine() -> str:
    """Return the boot and the pid namespace of this process; empty where they are unknown."""
    boot = _read(_PROC / "sys" / "kernel" / "random" / "boot_id").strip()
    try:
        namespace = (_PROC / "self" / "ns" / "pid").readlink()
    except OSError:
        return ""
    return f"{boot} {namespace}" if boot else ""


def _stat(pid: int) -> list[str]:
    """Return the fields of proc_pid_stat(5) from the state on; empty where they cannot be read."""
    # The command's name is in parentheses and can contain parentheses.
    fields = _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    return fields if len(fields) > _START_TIME_FIELD else []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container may run with an id that no account has.
        return ""
