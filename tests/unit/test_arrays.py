"""Blocks of UUIDs, cut and in the server's binary format."""

import struct

import pytest
from psycopg.adapt import Transformer

from rotator.fields.generators import uuid4_block
from rotator.postgres.values import UuidBlock, UuidBlockDumper, Values, part

BLOCK = UuidBlock(uuid4_block(5))


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 5, BLOCK),
        (0, 2, UuidBlock(BLOCK.block[:32])),
        (3, 5, UuidBlock(BLOCK.block[48:])),
        # A slice may be longer than what is left, and a range without rows has a slice without values.
        (4, 2004, UuidBlock(BLOCK.block[64:])),
        (5, 2005, UuidBlock(b"")),
    ],
)
def test_a_part_of_a_block_is_a_block_of_whole_uuids(start: int, stop: int, expected: Values) -> None:
    assert part(BLOCK, start, stop) == expected


def test_a_part_of_a_list_is_a_list() -> None:
    assert part(["a", "b", "c"], 1, 3) == ["b", "c"]
    assert part([], 0, 2000) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_block_becomes_an_array_of_one_dimension(count: int) -> None:
    block = uuid4_block(count)
    dumped = UuidBlockDumper(UuidBlock, Transformer()).dump(UuidBlock(block))
    # One dimension, no nulls, of uuid, so many elements, counted from 1.
    assert dumped[:20] == struct.pack("!iiIii", 1, 0, 2950, count, 1)
    elements = [dumped[start : start + 20] for start in range(20, len(dumped), 20)]
    assert elements == [
        struct.pack("!i", 16) + block[start : start + 16] for start in range(0, len(block), 16)
    ]
