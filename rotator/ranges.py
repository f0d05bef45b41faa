"""Keys and ranges of keys, as PostgreSQL writes them. Only the server compares keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

Key = NewType("Key", str)
"""A row's key as the text of a JSON array, e.g. ``[42]`` or ``["a", 7]``, exactly as the server wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyInterval:
    """The rows with ``after < key <= through``; ``after`` is None at the table's start."""

    after: Key | None
    through: Key

    def __str__(self) -> str:
        return f"({self.after or 'start'}, {self.through}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRange(KeyInterval):
    """An interval that one transaction rotates; ``rows`` is its number of rows when it was planned."""

    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The result of a transaction that gave rows new values.

    Attributes:
        has_other_writes: Whether a trigger wrote other rows of the table in the same transaction.
        entered: The number of old values that entered the ledger with a range.
        server_seconds: The time from the transaction's start to the end of its updates, on the server's
            clock, without the time in which the server waited for new values.
    """

    rows: int
    has_other_writes: bool
    entered: int = 0
    server_seconds: float


def intervals_between(gaps: Sequence[KeyInterval], bound: Key) -> tuple[KeyInterval, ...]:
    """Return the intervals up to the bound that lie between gaps; both are in key order."""
    intervals, after, is_covered = list[KeyInterval](), None, True
    for gap in gaps:
        if gap.after != after and gap.after is not None:
            intervals.append(KeyInterval(after=after, through=gap.after))
        after, is_covered = gap.through, gap.through != bound
    if is_covered:
        intervals.append(KeyInterval(after=after, through=bound))
    return tuple(intervals)
