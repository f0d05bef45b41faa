"""Keys and ranges of keys, as PostgreSQL writes them; nothing here compares two keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

Key = NewType("Key", str)
"""A row's key as the server's own JSON array text, e.g. ``[42]`` or ``["a", 7]``.

Opaque on purpose: only the server orders keys, with the key's own type and collation, so the text
goes back to it exactly as it came.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyInterval:
    """The rows with ``after < key <= through``, however many there are.

    Attributes:
        after: The last key before the span; None where it begins with the table.
        through: The span's last key.
    """

    after: Key | None
    through: Key

    def __str__(self) -> str:
        """Return the span as logs and messages show it."""
        return f"({self.after or 'start'}, {self.through}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRange(KeyInterval):
    """A span that was planned as one unit of work.

    Attributes:
        rows: How many rows it held when it was planned; 0 where they were deleted before.
    """

    rows: int


def intervals_between(gaps: Sequence[KeyInterval], bound: Key) -> tuple[KeyInterval, ...]:
    """Return the spans up to the bound that lie between gaps.

    Args:
        gaps: The gaps up to the bound, in key order.
        bound: The upper key bound.
    """
    spans, after, is_covered = list[KeyInterval](), None, True
    for gap in gaps:
        if gap.after != after and gap.after is not None:
            spans.append(KeyInterval(after=after, through=gap.after))
        after, is_covered = gap.through, gap.through != bound
    if is_covered:
        spans.append(KeyInterval(after=after, through=bound))
    return tuple(spans)
