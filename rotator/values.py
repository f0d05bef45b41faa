"""Where new values come from: the field's own default, made in bulk where it is known."""

import os
from collections.abc import Callable

_BYTES = 16
# RFC 9562, section 5.4: version 4 in the high half of byte 6, variant 10 in the top two bits of byte 8.
_VERSION_BYTE = 6
_VARIANT_BYTE = 8
_SET_VERSION = bytes(byte & 0x0F | 0x40 for byte in range(256))
_SET_VARIANT = bytes(byte & 0x3F | 0x80 for byte in range(256))


def uuid4_block(count: int, random_bytes: Callable[[int], bytes] = os.urandom) -> bytes:
    """Make random version 4 UUIDs, all at once.

    Args:
        count: How many; at least 0.
        random_bytes: Gives as many unpredictable bytes as it is asked for.

    Returns:
        ``16 * count`` bytes: one UUID behind the other, in network order.
    """
    block = bytearray(random_bytes(_BYTES * count))
    block[_VERSION_BYTE::_BYTES] = block[_VERSION_BYTE::_BYTES].translate(_SET_VERSION)
    block[_VARIANT_BYTE::_BYTES] = block[_VARIANT_BYTE::_BYTES].translate(_SET_VARIANT)
    return bytes(block)
