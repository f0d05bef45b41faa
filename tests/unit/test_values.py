import uuid

import pytest

from rotator.fields.generators import uuid4_block


def _uuids(block: bytes) -> list[uuid.UUID]:
    return [uuid.UUID(bytes=block[start : start + 16]) for start in range(0, len(block), 16)]


def test_every_value_is_a_distinct_version_4_uuid() -> None:
    new_values = _uuids(uuid4_block(5000))
    assert len(set(new_values)) == 5000
    assert {(value.version, value.variant) for value in new_values} == {(4, uuid.RFC_4122)}


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_only_version_and_variant_bits_are_set(byte: int) -> None:
    (new_values,) = _uuids(uuid4_block(1, random_bytes=lambda count: bytes([byte]) * count))
    assert new_values == uuid.UUID(bytes=bytes([byte]) * 16, version=4)


def test_none_are_made_where_none_are_asked_for() -> None:
    assert uuid4_block(0) == b""
