"""How the embedded server is set up, in one place; docker-compose.yml says the same to its server."""

from pathlib import Path
from typing import Final

SUPERUSER: Final = "postgres"
DATABASE: Final = "rotator"
# Nothing listens on it: it only ends the name of the unix socket.
PORT: Final = 5432

OLDEST_MAJOR: Final = 15
_FIRST_MAJOR_WITH_BUILTIN_LOCALES: Final = 17

TUNING: Final = {
    # A rotation writes every row and index entry to the WAL: no forced checkpoint amid it.
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "shared_buffers": "512MB",
    "max_connections": "300",
    # They commit as late as anything can, so the tests want some.
    "max_prepared_transactions": "10",
}


def initdb_arguments(data: Path, major: int) -> list[str]:
    """Return initdb's options for a new cluster.

    Args:
        data: The folder that is to become the cluster.
        major: The server's major version.
    """
    locale = (
        ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if major >= _FIRST_MAJOR_WITH_BUILTIN_LOCALES
        else ["--locale=C"]
    )
    return [
        f"--pgdata={data}",
        f"--username={SUPERUSER}",
        # A user who can reach the socket in its private folder could read the data anyway.
        "--auth=trust",
        "--encoding=UTF8",
        *locale,
    ]


def server_arguments(data: Path, socket_folder: Path) -> list[str]:
    """Return the options of ``postgres``: every setting, so that none hides in the data folder."""
    quoted = str(socket_folder).replace('"', '""')
    settings = {
        **TUNING,
        "listen_addresses": "",
        "port": str(PORT),
        "unix_socket_directories": f'"{quoted}"',
        "unix_socket_permissions": "0700",
    }
    options = (f"--{name}={value}" for name, value in settings.items())
    return ["-D", str(data), *options]
