"""Parsers for the values of command options: durations, row counts and files."""

import re
import shlex
from pathlib import Path
from typing import Final

from rotator.exceptions import OptionError

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
# A year; clocks count further, but event loops do not.
_MAX_SECONDS: Final = 365 * 24 * 3600.0
_THIS_RUN_ALONE: Final = ("--restart", "--take-over", "--stop-after")


def seconds(text: str | float) -> float:
    """Read a time, e.g. ``100ms``, ``30s``, ``5m`` or ``2h``; a number is one in seconds already.

    Raises:
        OptionError: It is none.
    """
    if not isinstance(text, str):
        if not 0 < text <= _MAX_SECONDS:
            raise OptionError(f"{text} s is no time to wait: it must be more than 0 and at most a year.")
        return text
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", text)
    if found is None or not float(found[1]):
        raise OptionError(f"'{text}' is no time: write it as 100ms, 30s, 5m or 2h.")
    time = float(found[1]) * _SECONDS[found[2]]
    if time > _MAX_SECONDS:
        raise OptionError(f"'{text}' is too long a time: the longest is {_MAX_SECONDS / 3600:.0f}h.")
    return time


def rows_or_seconds(text: str | float | None) -> int | float | None:
    """Read a number of rows, as an int, or a time in seconds, as a float.

    Raises:
        OptionError: It is neither.
    """
    if not isinstance(text, str):
        return text
    if re.fullmatch(r"[1-9][0-9_]*", text):
        return int(text)
    try:
        return seconds(text)
    except OptionError:
        raise OptionError(f"'{text}' is neither rows (5000) nor a time (90s, 30m, 2h).") from None


def writable(path: Path | str | None) -> Path | None:
    """Return the path of a file that can be written to; nothing is written yet.

    Raises:
        OptionError: It cannot.
    """
    if path is None:
        return None
    path = Path(path)
    try:
        # Should this run not come to write one, an older report stays as it is, and a new one is not begun.
        is_new = not path.exists()
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise OptionError(
            f"The report cannot be written to {path} ({error.strerror}): name a file that can be."
        ) from error
    return path


def resume_command(arguments: list[str], *, python: Path, folder: Path) -> str:
    """Return the command line of a run, without what was meant for that run alone.

    Args:
        arguments: The program and its arguments, as in ``sys.argv``.
        python: The interpreter that runs it.
        folder: The folder that it is run in.
    """
    program, *words = arguments
    kept = [program]
    if Path(program).suffix == ".py":
        # A virtual environment below this folder need not be active.
        interpreter = python.relative_to(folder) if python.is_relative_to(folder) else "python"
        kept = [str(interpreter), program]
    is_value = False
    for word in words:
        if not is_value and word not in _THIS_RUN_ALONE and not word.startswith("--stop-after="):
            kept.append(word)
        is_value = word == "--stop-after"
    return shlex.join(kept)
