"""How the embedded server is set up, in one place; docker-compose.yml says the same to its server."""

from typing import Final

SUPERUSER: Final = "postgres"
DATABASE: Final = "rotator"

SERVER_SETTINGS: Final = {
    # Only the unix socket in a private folder: authentication is trust there.
    "listen_addresses": "",
    # A rotation of a million rows writes about half a gigabyte of WAL: no forced checkpoint amid it.
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "shared_buffers": "512MB",
    "max_connections": "100",
}
