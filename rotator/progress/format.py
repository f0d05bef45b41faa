"""Numbers as people read them."""

_KEPT_DIGITS = 1000
_MOST_BYTES = 10 * 1024
_MOST_HALVES = 20 * 1024 - 1
_SIZE_UNITS = ("kB", "MB", "GB", "TB", "PB")
_MINUTE_SECONDS = 60
_HOUR_SECONDS = 3600


def count(number: int) -> str:
    """Return a count with thousands separators, e.g. ``1,000,000``."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun, e.g. ``1 row`` or ``2,000 rows``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration, e.g. ``0.4 s``, ``3 s``, ``2 min 05 s`` or ``1 h 12 min``."""
    if 0 < round(seconds, 1) < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE_SECONDS:
        return f"{whole} s"
    if whole < _HOUR_SECONDS:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / _MINUTE_SECONDS)
    return f"{minutes // 60} h {minutes % 60:02} min"


def rate(rows_per_second: float) -> str:
    """Return a rate without its unit and with the digits that mean something, e.g. ``25,100`` or ``3.2``."""
    if 0 < rows_per_second < 10:  # noqa: PLR2004 - below it a whole number is too coarse
        return f"{rows_per_second:.1f}"
    whole = round(rows_per_second)
    unit = 1
    while whole // unit >= _KEPT_DIGITS:
        unit *= 10
    return count(round(whole / unit) * unit)


def size(number_of_bytes: int) -> str:
    """Return an amount of memory as PostgreSQL's ``pg_size_pretty`` does, e.g. ``52 MB``."""
    if number_of_bytes < _MOST_BYTES:
        return f"{number_of_bytes} bytes"
    # The server halves last, so that a half is rounded up.
    halves = number_of_bytes >> 9
    for unit in _SIZE_UNITS:
        if halves < _MOST_HALVES or unit == _SIZE_UNITS[-1]:
            return f"{(halves + 1) // 2} {unit}"
        halves >>= 10
    raise AssertionError("the last unit is for every larger size")


def one_line(text: str) -> str:
    """Return the text without line ends and control characters; names and reasons come from elsewhere."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
