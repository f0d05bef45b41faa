"""Of two tasks at one span only one can write, and nothing is lost between them."""

import psycopg
import pytest

from rotator.exceptions import SupersededError
from rotator.postgres import spans
from rotator.postgres.fence import Lease
from rotator.postgres.rotations import abandon
from rotator.ranges import Key, KeyInterval
from rotator.runner.distribution import ranges_per_span
from tests.integration.rotation_tables import (
    COMMITTING,
    TICKETS,
    Database,
    key_range,
    once_each,
    writing,
)

pytestmark = COMMITTING

SPAN = KeyInterval(after=Key("[10]"), through=Key("[100]"))


async def test_the_second_task_takes_over_and_the_first_writes_no_more(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    database.count_updates()
    # Another span's checkpoint is none of this one's gaps.
    async with writing(database, lease) as writer:
        await writer.rewrite(key_range(None, 10, 10))
    number = await spans.plan(control, lease, SPAN)
    first = await spans.claim_span(control, TICKETS, lease, number, worker="one")
    assert first is not None
    assert first.gaps == [SPAN]
    async with writing(database, first.lease) as writer:
        await writer.rewrite(key_range(20, 30, 10))

    second = await spans.claim_span(control, TICKETS, lease, number, worker="two")

    assert second is not None
    assert second.gaps == [
        KeyInterval(after=Key("[10]"), through=Key("[20]")),
        KeyInterval(after=Key("[30]"), through=Key("[100]")),
    ]
    async with writing(database, first.lease) as writer:
        with pytest.raises(SupersededError):
            await writer.rewrite(key_range(30, 40, 10))
    async with writing(database, second.lease) as writer:
        await writer.rewrite(key_range(30, 100, 70))
    with pytest.raises(SupersededError):
        await spans.finish(control, first.lease, retries=0)
    await spans.finish(control, second.lease, retries=3)
    assert await spans.claim_span(control, TICKETS, lease, number, worker="three") is None
    (progress,) = await spans.read_progress(control, [number])
    assert (progress.rows, progress.ranges, progress.retries, progress.is_finished) == (80, 2, 3, True)
    assert database.updates() == once_each((1, 10), (21, 100))


async def test_what_another_owner_planned_is_nobodys(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 100)
    number = await spans.plan(control, lease, SPAN)
    claimed = await spans.claim_span(control, TICKETS, lease, number, worker="one")
    assert claimed is not None
    await abandon(control, lease)

    assert await spans.claim_span(control, TICKETS, lease, number, worker="two") is None
    with pytest.raises(SupersededError):
        await spans.plan(control, lease, SPAN)
    async with writing(database, claimed.lease) as writer:
        with pytest.raises(SupersededError):
            await writer.rewrite(key_range(10, 20, 10))


@pytest.mark.parametrize(
    ("rows", "batch", "ranges"),
    [(0, 2000, 10), (20_000, 2000, 10), (1_000_000, 2000, 62), (10**9, 2000, 100), (1_000_000, 50_000, 10)],
)
def test_small_tables_too_have_spans_for_several_workers(rows: int, batch: int, ranges: int) -> None:
    assert ranges_per_span(rows, batch) == ranges
