"""New values as the binary arrays that the server takes, without an object for each value."""

import struct
from dataclasses import dataclass
from typing import Any, Final

from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format

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
    """Many UUIDs as one block of bytes, 16 for each, in network order."""

    block: bytes


class UuidBlockDumper(Dumper):
    """Sends a :class:`UuidBlock` as ``uuid[]``."""

    format = Format.BINARY
    oid = UUID_ARRAY_OID

    def dump(self, obj: UuidBlock) -> bytes:
        """Return the array in the server's binary format."""
        count = len(obj.block) // UUID_BYTES
        elements = bytearray(_STRIDE * count)
        # A copy for each byte of the stride rather than for each element: 20 copies, however many elements.
        for offset, byte in enumerate(_LENGTH):
            elements[offset::_STRIDE] = bytes([byte]) * count
        for offset in range(UUID_BYTES):
            elements[len(_LENGTH) + offset :: _STRIDE] = obj.block[offset::UUID_BYTES]
        return _HEADER.pack(1, 0, UUID_OID, count, 1) + bytes(elements)


def register(context: AdaptContext) -> None:
    """Let a connection send blocks of UUIDs."""
    context.adapters.register_dumper(UuidBlock, UuidBlockDumper)


Values = UuidBlock | list[Any]
"""Parameters that arrive at the server as an array of the column's type."""


def part(values: Values, start: int, stop: int) -> Values:
    """Return the values from ``start`` up to ``stop``."""
    if isinstance(values, UuidBlock):
        return UuidBlock(values.block[start * UUID_BYTES : stop * UUID_BYTES])
    return values[start:stop]
