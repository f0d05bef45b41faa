"""Sessions that block ranges, on a real server."""

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql

from rotator.events import Event, LockHeld, RangeDeferred
from rotator.options import WaitLimits
from rotator.postgres.activity import blocking_transactions, open_transactions
from rotator.postgres.connection import APPLICATION_NAME, connected
from rotator.runner import locks, retry
from tests.integration.outcomes import EventRecorder, assert_completed, rotate_tickets
from tests.integration.rotation_tables import COMMITTING, PATIENCE_SECONDS, UPDATE, Database, execute_all

pytestmark = COMMITTING

HOLD_ROW = "SELECT FROM tickets_ticket WHERE id = 3 FOR UPDATE"
HOLD_TABLE = "LOCK TABLE tickets_ticket IN SHARE MODE"


def waiting(database: Database, application_name: str) -> Awaitable[object]:
    """Have a session of this name wait for row 3; a test that fails must not wait for ever."""
    session = database.connect(
        application_name=application_name, options=f"-c lock_timeout={PATIENCE_SECONDS:.0f}s"
    )
    return asyncio.create_task(asyncio.to_thread(session.execute, UPDATE))


async def blocking(control: psycopg.AsyncConnection) -> frozenset[str]:
    """Return what blocks the rotator's session, as soon as it waits."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := await blocking_transactions(control)):  # noqa: ASYNC110 - a session of the server
            await asyncio.sleep(0.01)
    return found


@pytest.mark.parametrize("lock", [HOLD_ROW, HOLD_TABLE])
async def test_the_transaction_that_blocks_a_range_is_remembered_until_it_ends(
    database: Database, control: psycopg.AsyncConnection, lock: str
) -> None:
    database.make_tickets(1, 5)
    holder = database.connect(application_name="psql")
    execute_all(holder, "BEGIN", lock)
    assert await blocking_transactions(control) == frozenset()
    range_ = waiting(database, APPLICATION_NAME)
    found = await blocking(control)
    assert len(found) == 1
    ((transaction, phrase),) = (await open_transactions(control, found)).items()
    assert transaction in found
    assert re.fullmatch(rf"pid {holder.info.backend_pid}, psql, idle in transaction for \d+ s", phrase)
    execute_all(holder, "COMMIT", "BEGIN", lock)
    assert await open_transactions(control, found) == {}
    execute_all(holder, "COMMIT")
    await range_


async def test_the_holder_is_found_behind_a_queue_of_sessions(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 5)
    holder = database.connect(application_name="psql")
    execute_all(holder, "BEGIN", HOLD_ROW)
    queue = []
    for name in ("web", "web", "web", APPLICATION_NAME):
        queue.append(waiting(database, name))
        await database.until_blocked(len(queue))
    phrases = await open_transactions(control, await blocking(control))
    assert [phrase.split(", ")[0] for phrase in phrases.values()] == [f"pid {holder.info.backend_pid}"]
    execute_all(holder, "COMMIT")
    await asyncio.gather(*queue)


async def test_a_session_of_the_rotator_is_no_holder(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 5)
    own = database.connect(application_name=APPLICATION_NAME)
    execute_all(own, "BEGIN", HOLD_ROW)
    range_ = waiting(database, APPLICATION_NAME)
    await database.until_blocked()
    assert await blocking_transactions(control) == frozenset()
    execute_all(own, "COMMIT")
    await range_


async def test_sessions_of_the_application_are_others_if_the_project_names_all_its_sessions(
    database: Database,
) -> None:
    database.make_tickets(1, 5)
    holder = database.connect(application_name="shop")
    execute_all(holder, "BEGIN", HOLD_ROW)
    named = replace(database.server, parameters={**database.server.parameters, "application_name": "shop"})
    async with connected(named) as control:
        range_ = waiting(database, f"{APPLICATION_NAME} shop")
        phrases = await open_transactions(control, await blocking(control))
    assert list(phrases.values()) == [f"pid {holder.info.backend_pid}, shop, idle in transaction for 0 s"]
    execute_all(holder, "COMMIT")
    await range_


async def test_a_role_without_privileges_sees_the_pid_alone(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 5)
    holder = database.connect(application_name="psql")
    execute_all(holder, "BEGIN", HOLD_ROW)
    range_ = waiting(database, APPLICATION_NAME)
    found = await blocking(control)
    with database.role() as name:
        async with connected(database.server) as visitor:
            await visitor.execute(sql.SQL("SET ROLE {}").format(name))
            phrases = await open_transactions(visitor, found)
    assert list(phrases.values()) == [f"pid {holder.info.backend_pid}, psql"]
    execute_all(holder, "COMMIT")
    await range_


async def test_a_prepared_transaction_is_named(database: Database, control: psycopg.AsyncConnection) -> None:
    ((allowed,),) = database.execute("SELECT current_setting('max_prepared_transactions')::int")
    if not allowed:
        pytest.skip("the server has no prepared transactions")
    database.make_tickets(1, 5)
    execute_all(database.connect(), "BEGIN", UPDATE, "PREPARE TRANSACTION 'a forgotten one'")
    execute_all(database.connect(), "BEGIN", "SELECT 1", "PREPARE TRANSACTION 'another one'")
    try:
        range_ = waiting(database, APPLICATION_NAME)
        phrases = await open_transactions(control, await blocking(control))
        assert list(phrases.values()) == ["prepared transaction a forgotten one"]
    finally:
        database.execute("COMMIT PREPARED 'a forgotten one'")
        database.execute("COMMIT PREPARED 'another one'")
    await range_
    assert await open_transactions(control, phrases) == {}


def test_who_holds_a_lock_is_named_between_two_attempts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "NAMED_AFTER_SECONDS", 1.0)
    monkeypatch.setattr(locks, "CHECK_SECONDS", 0.1)
    # The second attempt waits long enough to show who holds the row, and the third is far away.
    limits = WaitLimits(lock_seconds=0.5, statement_seconds=5)
    monkeypatch.setattr(retry, "backoff_seconds", lambda attempt: 0.3 if attempt == 1 else 3.0)
    database.make_tickets(1, 5)
    holder = database.connect(application_name="psql")
    execute_all(holder, "BEGIN", HOLD_ROW)
    deferrals = list[int]()

    def release(event: Event) -> None:
        if isinstance(event, LockHeld) and event.is_new:
            deferrals.append(recorder.of(RangeDeferred))
        if holder.info.transaction_status and (deferrals or recorder.of(RangeDeferred) > 2):
            execute_all(holder, "COMMIT")

    recorder = EventRecorder(release)
    assert_completed(rotate_tickets(recorder, limits=limits), rows=5)
    assert deferrals == [2]
    first, *_, last = [event for event in recorder.events if isinstance(event, LockHeld)]
    (phrase,) = first.holders
    assert phrase.startswith(f"pid {holder.info.backend_pid}, psql, idle in transaction for ")
    assert last == LockHeld(holders=(), is_new=False)


async def test_its_queries_are_counted_as_commits_of_the_rotator(control: psycopg.AsyncConnection) -> None:
    commits = list[int]()
    watch = locks.LockWatch(lambda _event: None, count_commits=commits.append)
    watch.take(RangeDeferred(rows=1))
    watching = asyncio.create_task(watch.watch(control))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(commits) < 3:  # noqa: ASYNC110 - a session of the server
            await asyncio.sleep(0.01)
    watching.cancel()
    assert set(commits) == {1}


@pytest.fixture
def named_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "NAMED_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(locks, "CHECK_SECONDS", 0.05)


@pytest.mark.usefixtures("named_soon")
def test_an_error_of_the_observer_ends_a_preflight_that_waits(database: Database) -> None:
    database.make_tickets(1, 5)
    holder = database.connect(application_name="psql")
    execute_all(holder, "BEGIN", "LOCK TABLE tickets_ticket IN ACCESS EXCLUSIVE MODE")

    def observer(event: Event) -> None:
        if not isinstance(event, LockHeld):
            return
        holder.rollback()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        rotate_tickets(observer)


@pytest.mark.usefixtures("named_soon")
def test_a_preflight_that_waits_names_who_holds_the_lock(database: Database) -> None:
    database.make_tickets(1, 5)
    holder, named = database.connect(application_name="psql"), list[tuple[str, ...]]()
    execute_all(holder, "BEGIN", "LOCK TABLE tickets_ticket IN ACCESS EXCLUSIVE MODE")

    def observer(event: Event) -> None:
        if isinstance(event, LockHeld) and event.is_new:
            named.append(event.holders)
            holder.rollback()

    recorder = EventRecorder(observer)
    assert_completed(rotate_tickets(recorder), rows=5)
    ((phrase,),) = named
    assert [event.holders for event in recorder.events if isinstance(event, LockHeld)][-1] == ()
    assert phrase.startswith(f"pid {holder.info.backend_pid}, psql, idle in transaction")
