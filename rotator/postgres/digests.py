"""Compares the values that rows had before an update with those that triggers have left in them."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from psycopg import AsyncCursor

Digests: TypeAlias = Mapping[str, Sequence[int | None]]
"""For each key a number for each rotated column; see :attr:`TargetTable.digests`."""


async def by_key(cursor: AsyncCursor | None) -> Digests:
    """Return the digests that a cursor reads, by the rows' keys."""
    return {} if cursor is None else {key: digests async for key, digests in cursor}


def count_kept(before: Digests, after: Digests) -> int:
    """Return the number of rows that have in one of their columns the value that they had before."""
    return sum(
        any(old is not None and old == new for old, new in zip(digests, after[key], strict=True))
        for key, digests in before.items()
        if key in after
    )
