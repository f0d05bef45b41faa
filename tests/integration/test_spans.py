"""Only one helper at a time can write to a span, and no row is lost between two helpers."""

import asyncio
from typing import Any

import psycopg
import pytest

from rotator.exceptions import SupersededError
from rotator.options import RunOptions
from rotator.postgres import spans
from rotator.postgres.fence import Lease
from rotator.postgres.rotations import abandon
from rotator.postgres.spans import ClaimedSpan
from rotator.ranges import Key, KeyInterval
from rotator.runner.context import RunContext
from rotator.runner.distribution import Distribution, ranges_per_span
from tests.integration.rotation_tables import (
    COMMITTING,
    PATIENT,
    TICKETS,
    Database,
    key_range,
    once_each,
    writing,
)

pytestmark = COMMITTING

SPAN = KeyInterval(after=Key("[10]"), through=Key("[100]"))
NEXT_SPAN = KeyInterval(after=Key("[100]"), through=Key("[120]"))


async def _claim(control: psycopg.AsyncConnection, lease: Lease, worker: str) -> ClaimedSpan | None:
    return await spans.claim(control, TICKETS, lease, worker=worker)


def _let_leases_expire(database: Database) -> None:
    database.execute("UPDATE rotator_span SET lease_expires_at = clock_timestamp() - interval '1 s'")


async def test_a_helper_whose_lease_has_expired_cannot_write_once_another_has_the_span(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    database.count_updates()
    # Another span's checkpoint is none of this one's gaps.
    async with writing(database, lease) as writer:
        await writer(key_range(None, 10, 10))
    since = await spans.clear(control, lease)
    await spans.plan(control, lease, SPAN)
    first = await _claim(control, lease, "one")
    assert first is not None
    assert first.gaps == [SPAN]
    async with writing(database, first.lease) as writer:
        await writer(key_range(20, 30, 10))
    assert await _claim(control, lease, "two") is None

    _let_leases_expire(database)
    second = await _claim(control, lease, "two")

    assert second is not None
    assert second.gaps == [
        KeyInterval(after=Key("[10]"), through=Key("[20]")),
        KeyInterval(after=Key("[30]"), through=Key("[100]")),
    ]
    async with writing(database, first.lease) as writer:
        with pytest.raises(SupersededError):
            await writer(key_range(30, 40, 10))
    async with writing(database, second.lease) as writer:
        await writer(key_range(30, 100, 70))
    with pytest.raises(SupersededError):
        await spans.finish(control, first.lease, deferrals=0, retries=0)
    await spans.finish(control, second.lease, deferrals=2, retries=3)
    progress = await spans.read_progress(control, lease.rotation, since=since)
    assert (progress.spans, progress.rows, progress.ranges) == (1, 80, 2)
    (finished,) = await spans.collect_finished(control, lease)
    assert (finished.deferrals, finished.retries) == (2, 3)
    assert await _claim(control, lease, "three") is None
    assert database.updates() == once_each((1, 10), (21, 100))


async def test_a_claim_waits_for_the_transaction_of_the_helper_before(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    await spans.plan(control, lease, SPAN)
    first = await _claim(control, lease, "one")
    assert first is not None
    # The update waits for this one, after it has passed the fence.
    with database.connect() as other:
        other.execute("SELECT pg_advisory_lock(1)")
        database.make_trigger("PERFORM pg_advisory_xact_lock(1);", each="STATEMENT")
        async with writing(database, first.lease, limits=PATIENT) as writer:
            writes = asyncio.create_task(writer(key_range(10, 20, 10)))
            await database.until_rotator_waits_for_a_lock()
            _let_leases_expire(database)
            claims = asyncio.create_task(_claim(control, lease, "two"))
            await database.until_rotator_waits_for_a_lock(backends=2)
            other.execute("SELECT pg_advisory_unlock(1)")
            assert (await writes).rows == 10
    second = await claims
    assert second is not None
    assert second.gaps == [KeyInterval(after=Key("[20]"), through=Key("[100]"))]


async def test_two_helpers_get_two_spans(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    await spans.plan(control, lease, SPAN)
    await spans.plan(control, lease, NEXT_SPAN)
    with database.connect() as other:
        # As another helper does that has not committed its claim yet.
        other.execute("BEGIN")
        other.execute("SELECT FROM rotator_span ORDER BY id LIMIT 1 FOR UPDATE")
        second = await _claim(control, lease, "two")
        assert await _claim(control, lease, "two") is None
        other.execute("ROLLBACK")
    first = await _claim(control, lease, "one")
    assert first is not None
    assert second is not None
    assert (first.gaps, second.gaps) == ([SPAN], [NEXT_SPAN])


async def test_a_released_span_is_claimed_at_once(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    await spans.plan(control, lease, SPAN)
    first = await _claim(control, lease, "one")
    assert first is not None
    await spans.release(control, first.lease, deferrals=2, retries=1)
    assert await _claim(control, lease, "two") is not None
    # Too late for the first one.
    await spans.release(control, first.lease, deferrals=2, retries=1)
    assert await _claim(control, lease, "three") is None


async def test_deferrals_are_counted_while_the_helper_works(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    since = await spans.clear(control, lease)
    await spans.plan(control, lease, SPAN)
    first = await _claim(control, lease, "one")
    assert first is not None
    for _ in range(2):
        await spans.report_deferrals(control, first.lease, 3)
    assert (await spans.read_progress(control, lease.rotation, since=since)).deferrals == 6
    await spans.finish(control, first.lease, deferrals=1, retries=0)
    (finished,) = await spans.collect_finished(control, lease)
    assert finished.deferrals == 7
    assert (await spans.read_progress(control, lease.rotation, since=since)).deferrals == 0


async def test_the_spans_of_another_owner_cannot_be_claimed(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 100)
    await spans.plan(control, lease, SPAN)
    claimed = await _claim(control, lease, "one")
    assert claimed is not None
    await abandon(control, lease)
    _let_leases_expire(database)

    assert await _claim(control, lease, "two") is None
    with pytest.raises(SupersededError):
        await spans.plan(control, lease, SPAN)
    with pytest.raises(SupersededError):
        await spans.add_helper(control, lease, instead_of=None)
    async with writing(database, claimed.lease) as writer:
        with pytest.raises(SupersededError):
            await writer(key_range(10, 20, 10))


async def test_a_helper_is_not_wanted_once_another_message_was_sent_instead(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    first = await spans.add_helper(control, lease, instead_of=None)
    assert await spans.renew(control, lease, first)
    (helper,) = await spans.read_helpers(control, lease.rotation)
    assert (helper.is_alive, helper.seconds_since_sent) == (True, None)
    other = await spans.add_helper(control, lease, instead_of=helper.id)
    assert not await spans.renew(control, lease, first)
    await spans.mark_sent(control, [other])
    (helper,) = await spans.read_helpers(control, lease.rotation)
    assert helper.is_alive is False
    assert helper.seconds_since_sent is not None
    database.execute("UPDATE rotator_rotation SET status = 'interrupted'")
    assert not await spans.renew(control, lease, other)


async def test_rows_are_counted_once_whatever_the_order_of_the_commits(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 120)
    since = await spans.clear(control, lease)
    await spans.plan(control, lease, SPAN)
    first = await _claim(control, lease, "one")
    assert first is not None
    counted = 0
    reported = 0

    async def count() -> None:
        nonlocal counted, reported, since
        progress = await spans.read_progress(control, lease.rotation, since=since)
        counted += progress.rows - reported
        since, reported = progress.settled, progress.rows - progress.settled_rows

    with database.connect() as other:
        # A checkpoint whose id is lower than those that are visible before it.
        other.execute("BEGIN")
        other.execute(
            "INSERT INTO rotator_completedrange (rotation_id, after, through, rows, seconds)"
            " VALUES (%s, '[50]', '[100]', 50, 1)",
            (lease.rotation,),
        )
        async with writing(database, first.lease) as writer:
            await writer(key_range(10, 50, 40))
        await count()
        await spans.plan(control, lease, NEXT_SPAN)
        second = await _claim(control, lease, "two")
        assert second is not None
        async with writing(database, second.lease) as writer:
            await writer(key_range(100, 120, 20))
        await spans.finish(control, second.lease, deferrals=0, retries=0)
        await count()
        assert counted == 60
        other.execute("COMMIT")
    await spans.finish(control, first.lease, deferrals=0, retries=0)
    await spans.plan(control, lease, KeyInterval(after=Key("[120]"), through=Key("[130]")))
    for _ in range(2):
        await count()
        assert counted == 110
    assert since > 0


class _Owner:
    """An owner's messages, and what it does with helpers in a state that a test has made."""

    def __init__(self, control: psycopg.AsyncConnection, lease: Lease) -> None:
        self.sent: list[int] = []
        self.events: list[object] = []
        self._control = control
        self._lease = lease
        unused: Any = None
        context = RunContext(server=unused, target=unused, options=RunOptions(), notify=self.events.append)
        self._distribution = Distribution(control, lease, context, self._send)

    async def _send(self, _rotation: int, message: int) -> None:
        self.sent.append(message)

    async def ask(self) -> int:
        """Look at the helpers once, and return the number of new messages."""
        before = len(self.sent)
        await self._distribution.ask(await spans.read_helpers(self._control, self._lease.rotation))
        await asyncio.sleep(0.01)
        assert not await self._distribution.is_sending()
        return len(self.sent) - before


async def test_messages_are_few_and_a_lost_one_is_sent_again(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    owner = _Owner(control, lease)
    assert await owner.ask() == 2
    assert await owner.ask() == 0

    def let_time_pass() -> None:
        database.execute("UPDATE rotator_helper SET sent_at = sent_at - interval '31 s'")

    let_time_pass()
    assert await owner.ask() == 2
    helpers = database.execute("SELECT id FROM rotator_helper")
    assert {message for (message,) in helpers} == set(owner.sent[2:])
    # While one is alive, the other may wait in the queue, and one more is worth a try.
    assert await spans.renew(control, lease, owner.sent[2])
    let_time_pass()
    assert await owner.ask() == 1
    # Each of them answers, until there are as many as spans.
    for _ in range(20):
        database.execute("UPDATE rotator_helper SET expires_at = clock_timestamp() + interval '20 s'")
        await owner.ask()
    assert database.execute("SELECT count(*) FROM rotator_helper") == [(16,)]
    # One has died.
    ((dead,),) = database.execute(
        "UPDATE rotator_helper SET expires_at = now() - interval '1 s', sent_at = now() - interval '1 h'"
        " WHERE id = (SELECT min(id) FROM rotator_helper) RETURNING id"
    )
    assert await owner.ask() == 1
    assert database.execute("SELECT count(*) FROM rotator_helper") == [(16,)]
    assert not await spans.renew(control, lease, dead)


@pytest.mark.parametrize(
    ("rows", "batch", "ranges"),
    [(0, 2000, 10), (20_000, 2000, 10), (1_000_000, 2000, 62), (10**9, 2000, 100), (1_000_000, 50_000, 10)],
)
def test_small_tables_too_have_spans_for_several_workers(rows: int, batch: int, ranges: int) -> None:
    assert ranges_per_span(rows, batch) == ranges
