"""Questions on a terminal."""

import sys
from contextlib import suppress
from typing import TextIO


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; a closed one is not."""
    # Python has no stream at all for a descriptor that was closed when it started.
    with suppress(ValueError):
        return stream is not None and stream.isatty()
    return False


def can_ask() -> bool:
    """Return whether a user sees a question and can answer it."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def agrees(question: str) -> bool:
    """Ask a question on the terminal, and return whether the answer is yes.

    Standard output is left alone: it may hold JSON lines.
    """
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        # Ctrl-D ends no line.
        sys.stderr.write("\n")
    return answer.strip().lower() in ("y", "yes")
