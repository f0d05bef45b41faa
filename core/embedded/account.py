"""The system account that runs the server. PostgreSQL refuses to run as root."""

import errno
import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from core.embedded.errors import EmbeddedServerError


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The account that the server's processes and data belong to.

    Attributes:
        uid: Its user id.
        gid: Its group id.
        lent: Whether it is not our own: we are root and act in its name.
    """

    uid: int
    gid: int
    lent: bool

    @classmethod
    def for_server(cls) -> Self:
        """Return the account of this process; for root, the system account ``nobody``.

        Raises:
            EmbeddedServerError: This process runs as root, and the system has no account ``nobody``.
        """
        if os.geteuid() != 0:
            return cls(uid=os.geteuid(), gid=os.getegid(), lent=False)
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise EmbeddedServerError(
                "PostgreSQL does not run as root, and this system has no account 'nobody' to lend it: "
                "go on as an ordinary user, or set DATABASE_URL."
            ) from None
        return cls(uid=nobody.pw_uid, gid=nobody.pw_gid, lent=True)

    def own(self, folder: Path) -> None:
        """Make a folder of ours the account's, closed to all others.

        Raises:
            EmbeddedServerError: We may not give it to the account.
        """
        folder.chmod(0o700)
        if self.lent:
            try:
                os.chown(folder, self.uid, self.gid)
            except OSError:
                raise _no_right_to_lend() from None

    def run(
        self, command: Sequence[str | Path], *, log: IO[bytes] | int = subprocess.STDOUT
    ) -> subprocess.CompletedProcess[str]:
        """Run a program under the account, in a session of its own, away from our terminal.

        Args:
            command: The program and its arguments.
            log: Where its standard error goes; the file of its standard output if None.

        Raises:
            EmbeddedServerError: We may not act as the account.
            OSError: The account may not run the program.
        """
        no_groups: list[int] = []
        try:
            return subprocess.run(  # noqa: S603 -- a PostgreSQL program with arguments of ours
                command,
                user=self.uid if self.lent else None,
                group=self.gid if self.lent else None,
                extra_groups=no_groups if self.lent else None,
                # The account may not be allowed where we stand.
                cwd="/",
                # Neither our locale nor our PG* variables are to shape the cluster.
                env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                check=False,
                # A Ctrl-C in the terminal goes to every process of its session's foreground group.
                start_new_session=True,
            )
        except OSError as error:
            # What execve refuses is EACCES; these two come from changing the user.
            if self.lent and error.errno in {errno.EPERM, errno.EINVAL}:
                raise _no_right_to_lend() from None
            raise


def _no_right_to_lend() -> EmbeddedServerError:
    return EmbeddedServerError(
        "PostgreSQL does not run as root, and this root may not act as 'nobody': "
        "go on as an ordinary user, or set DATABASE_URL."
    )
