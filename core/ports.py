"""Ports for servers that go away and come back."""

import secrets
import socket
from typing import Final

# Below the ports that Linux, macOS and the BSDs choose for clients: a client of another test would keep the
# port from a server that is just being restarted.
_PORTS: Final = range(20_000, 30_000)


def unused_port() -> int:
    """Return a port of this host that no socket is bound to."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
