"""What the server makes of arrays that are sent in its own binary format."""

import uuid

import psycopg
import pytest

from rotator.fields.generators import uuid4_block
from rotator.postgres.values import UuidBlock
from tests.integration.rotation_tables import COMMITTING

pytestmark = COMMITTING


@pytest.mark.parametrize("count", [0, 1, 2000])
async def test_the_server_reads_a_block_as_the_uuids_that_it_holds(
    control: psycopg.AsyncConnection, count: int
) -> None:
    block = uuid4_block(count)
    cursor = await control.execute(
        "SELECT sent, pg_typeof(sent)::text, cardinality(sent), array_lower(sent, 1)"
        " FROM (SELECT %b AS sent) AS parameter",
        (UuidBlock(block),),
    )
    uuids = [uuid.UUID(bytes=block[start : start + 16]) for start in range(0, len(block), 16)]
    assert await cursor.fetchall() == [(uuids, "uuid[]", count, 1 if count else None)]


async def test_the_server_finds_values_by_their_numbers(control: psycopg.AsyncConnection) -> None:
    block = uuid4_block(3)
    cursor = await control.execute(
        "SELECT (%b::uuid[])[number] FROM generate_series(1, 4) AS number", (UuidBlock(block),)
    )
    expected = [uuid.UUID(bytes=block[start : start + 16]) for start in (0, 16, 32)]
    assert await cursor.fetchall() == [(value,) for value in [*expected, None]]
