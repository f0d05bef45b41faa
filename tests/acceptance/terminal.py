"""A terminal for the command to run in, and what a person would see on it."""

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tests.acceptance.harness import COMMAND, MANAGE, PROJECT, environment, resolved, url_of, wait_until

CTRL_C, CTRL_D = "\x03", "\x04"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"

# The terminal that a session's leader opens first becomes the session's own: it types Ctrl-C, it hangs up.
_OPEN_TERMINAL = 'exec "$@" < "$0" > "$0" 2>&1'
_PIECES = re.compile(r"\x1b\[(?P<parameters>\??[0-9;]*)(?P<final>[A-Za-z])|(?P<char>.)", re.DOTALL)
_READ_SECONDS = 0.02


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, columns: int, command: Sequence[str]) -> None:
        self._columns = columns
        self._master, self._slave = os.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _OPEN_TERMINAL, os.ttyname(self._slave), *resolved(command)],
            cwd=PROJECT,
            env={**environment(url_of()), "TERM": "xterm-256color"},
            start_new_session=True,
        )
        self._said = bytearray()
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def said(self) -> str:
        """What has been written on it so far."""
        return bytes(self._said).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.said, f"the terminal shows {text!r}")

    def wait(self, seconds: float = 60.0) -> int:
        """Wait until the process has ended and all that it wrote is here."""
        status = self._process.wait(seconds)
        self._stop_reading()
        return status

    def answer(self, keys: str) -> int:
        """Answer the last question, and wait for the end.

        A key that comes just before the process begins to read is lost, and people press it again.
        """
        for _ in range(5):
            self.type(keys)
            with suppress(subprocess.TimeoutExpired):
                return self.wait(10)
        return self.wait()

    def close(self) -> None:
        """Close the window, which hangs up on the process."""
        self._stop_reading()
        for descriptor in (self._slave, self._master):
            os.close(descriptor)
        self._slave = self._master = -1

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._master >= 0:
            self.close()

    def lines(self) -> list[str]:
        """Return the lines as they stand at the end; fail where one ever was wider than the window."""
        return seen(self.said, self._columns)

    def _read(self) -> None:
        while True:
            is_over = self._over.is_set()
            if select.select([self._master], [], [], _READ_SECONDS)[0]:
                self._said += os.read(self._master, 65536)
            elif is_over:
                return

    def _stop_reading(self) -> None:
        self._over.set()
        self._reader.join()


@contextmanager
def rotating_in_a_terminal(*options: str, columns: int = 120, **variables: str) -> Iterator[Terminal]:
    known = ["env", *(f"{name}={value}" for name, value in variables.items())]
    terminal = Terminal(columns, [*known, *MANAGE, COMMAND, *options])
    try:
        yield terminal
    finally:
        terminal.end()


def seen(said: str, columns: int) -> list[str]:
    """Play what was written, as far as the command uses a terminal's abilities."""
    lines, column = [[" "] * columns], 0
    for piece in _PIECES.finditer(said):
        char, final, parameters = piece["char"], piece["final"], piece["parameters"]
        if char == "\n":
            lines.append([" "] * columns)
        elif char == "\r":
            column = 0
        elif (final, parameters) == ("K", "2"):
            lines[-1] = [" "] * columns
        elif (final, parameters) in (("K", ""), ("J", "")):
            # There is never anything below the last line.
            lines[-1][column:] = [" "] * (columns - column)
        elif char is not None and unicodedata.category(char) == "Mn":
            # It only says how the character before it looks.
            pass
        elif char is not None and char.isprintable():
            assert column < columns, f"wider than {columns} columns: {''.join(lines[-1])!r}"
            lines[-1][column] = char
            column += 1
        else:
            assert (final, parameters) in (("h", "?25"), ("l", "?25")), f"unknown: {piece[0]!r}"
    return ["".join(line).rstrip() for line in lines]
