"""Where new values come from: made in bulk, or one by one from the rows that they are for."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rotator.keys import Key
from rotator.postgres.arrays import Values
from rotator.postgres.table import values_name


class Place(NamedTuple):
    """Where a row is.

    Attributes:
        leaf: The oid of the partition, or of the table itself.
        ctid: The row's place in it, e.g. ``(0,1)``.
    """

    leaf: int
    ctid: str


@dataclass(frozen=True, slots=True)
class InBulk:
    """New values that owe nothing to their rows.

    Attributes:
        make: Makes as many as it is asked for, for each column of the target.
    """

    make: Callable[[int], Awaitable[tuple[Values, ...]]]


@dataclass(frozen=True, slots=True)
class FromRows:
    """New values that depend on their rows.

    Attributes:
        make: Makes those of the rows with these keys, for each column of the target; returns the keys of the
            rows that there still are, in the order of the values.
        make_at: The same for the rows at these places, all of one leaf.
    """

    make: Callable[[Sequence[Key]], Awaitable[tuple[list[Key], tuple[Values, ...]]]]
    make_at: Callable[[Sequence[Place]], Awaitable[tuple[list[Place], tuple[Values, ...]]]]

    async def parameters(self, keys: Sequence[Key]) -> dict[str, object]:
        """Return what the update of these rows is executed with."""
        found, values = await self.make(keys)
        return {"keys": [str(key) for key in found], **named(values)}


ValueSource = InBulk | FromRows


def places_of(table: str) -> tuple[str, str]:
    """Return, for a query of Django's, the condition that a row is at one of some places, and its place.

    The condition takes two parameters: the leaf's oid, and the places in it.

    Args:
        table: The table's quoted name.
    """
    return f"{table}.tableoid = %s AND {table}.ctid = ANY (%s::text[]::tid[])", f"{table}.ctid::text"


def named(values: tuple[Values, ...]) -> dict[str, Values]:
    """Return each column's values by the name of their parameter."""
    return {values_name(at): of_column for at, of_column in enumerate(values)}
