"""New values, made in bulk or from each row, and their binary arrays."""

import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format

from rotator.postgres.table import values_name
from rotator.ranges import Key

UUID_OID: Final = 2950
UUID_ARRAY_OID: Final = 2951
UUID_BYTES: Final = 16
# Dimensions, flags, element type, length, lower bound; then each element's length and bytes. The format
# is that of array_send() in the server's src/backend/utils/adt/arrayfuncs.c.
_HEADER: Final = struct.Struct("!iiIii")
_LENGTH: Final = struct.pack("!i", UUID_BYTES)
_STRIDE: Final = len(_LENGTH) + UUID_BYTES


@dataclass(frozen=True, slots=True)
class UuidBlock:
    """UUIDs as one block of bytes, 16 for each, in network order."""

    block: bytes


class UuidBlockDumper(Dumper):
    """Sends a :class:`UuidBlock` as ``uuid[]``."""

    format = Format.BINARY
    oid = UUID_ARRAY_OID

    def dump(self, obj: UuidBlock) -> bytes:
        """Return the array in the server's binary format."""
        count = len(obj.block) // UUID_BYTES
        elements = bytearray(_STRIDE * count)
        # One copy for each byte of the stride: 20 copies for any number of elements.
        for offset, byte in enumerate(_LENGTH):
            elements[offset::_STRIDE] = bytes([byte]) * count
        for offset in range(UUID_BYTES):
            elements[len(_LENGTH) + offset :: _STRIDE] = obj.block[offset::UUID_BYTES]
        return _HEADER.pack(1, 0, UUID_OID, count, 1) + bytes(elements)


def register(context: AdaptContext) -> None:
    """Let a connection send blocks of UUIDs."""
    context.adapters.register_dumper(UuidBlock, UuidBlockDumper)


Values = UuidBlock | list[Any]
"""A parameter that the server receives as an array of the column's type."""


def part(values: Values, start: int, stop: int) -> Values:
    """Return the values from ``start`` up to ``stop``."""
    if isinstance(values, UuidBlock):
        return UuidBlock(values.block[start * UUID_BYTES : stop * UUID_BYTES])
    return values[start:stop]


class Place(NamedTuple):
    """The place of a row: the oid of the partition or table, and the ``ctid`` in it, e.g. ``(0,1)``."""

    leaf: int
    ctid: str


@dataclass(frozen=True, slots=True)
class InBulk:
    """New values that do not depend on their rows; ``make`` returns this number of them for each column."""

    make: Callable[[int], Awaitable[tuple[Values, ...]]]


@dataclass(frozen=True, slots=True)
class FromRows:
    """New values that depend on their rows.

    Attributes:
        make: A function that makes values for the rows with these keys, for each column of the target. It
            returns the keys of the rows that still exist, in the order of the values.
        make_at: The same for the rows at these places, all of one leaf.
    """

    make: Callable[[Sequence[Key]], Awaitable[tuple[list[Key], tuple[Values, ...]]]]
    make_at: Callable[[Sequence[Place]], Awaitable[tuple[list[Place], tuple[Values, ...]]]]


ValueSource = InBulk | FromRows


def places_of(table: str) -> tuple[str, str]:
    """Return SQL for a query of Django's: a condition that a row is at one of some places, and its place.

    The condition takes two parameters: the leaf's oid, and the places in it. ``table`` is the quoted name.
    """
    return f"{table}.tableoid = %s AND {table}.ctid = ANY (%s::text[]::tid[])", f"{table}.ctid::text"


def keys_of(columns: Sequence[str], types: Sequence[str]) -> tuple[str, str, str]:
    """Return the parts of Django's queries for rows with some keys; each takes the keys as ``text[]``.

    They are a condition, the text of a row's key in this session (which takes no parameter), and a query of
    the keys' texts in this session next to the keys themselves: settings change these texts. The columns are
    quoted, with their table.
    """
    key = ", ".join(columns)
    decoded = ", ".join(f"(k.key::jsonb ->> {at})::{name}" for at, name in enumerate(types))
    keys = "unnest(%s::text[]) AS k (key)"
    return (
        f"({key}) IN (SELECT {decoded} FROM {keys})",  # noqa: S608 - quoted names and types
        f"jsonb_build_array({key})::text",
        f"SELECT jsonb_build_array({decoded})::text, k.key FROM {keys}",  # noqa: S608 - the same
    )


def named(values: tuple[Values, ...]) -> dict[str, Values]:
    """Return the values of each column by the name of their parameter."""
    return {values_name(at): of_column for at, of_column in enumerate(values)}
