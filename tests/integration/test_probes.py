"""The probes, on a real server."""

import asyncio
import time

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from rotator.postgres.connection import connected
from rotator.postgres.fence import LOCK_CLASS
from rotator.postgres.probes import probe, read_activity, sessions_that_wait
from tests.integration.rotation_tables import COMMITTING, Database, execute_all

pytestmark = COMMITTING


async def test_a_probe_measures_a_commit_and_an_overrun(control: psycopg.AsyncConnection) -> None:
    before = await control.execute("SELECT pg_current_wal_flush_lsn()")
    began = time.monotonic()
    measured = await probe(control)
    assert 0 < measured.commit_seconds <= time.monotonic() - began
    assert 0 <= measured.overrun_seconds <= time.monotonic() - began
    after = await control.execute(
        "SELECT pg_current_wal_flush_lsn() > %s::pg_lsn", await before.fetchone() or ("",)
    )
    assert await after.fetchone() == (True,)
    assert control.info.transaction_status == TransactionStatus.IDLE


async def test_the_commits_of_other_sessions_are_counted(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    before = await read_activity(control)
    for number in range(50):
        database.execute("SELECT %s::int", (number,))
    database.execute("SELECT pg_stat_force_next_flush()")
    database.execute("SELECT 1")
    after = await read_activity(control)
    assert after.commits - before.commits >= 50
    assert after.at > before.at


async def test_a_session_that_waits_for_a_range_is_found_and_no_other(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 2)
    ours, other = database.connect(), database.connect()
    # A test that fails must not wait for ever.
    waiter = database.connect(options="-c lock_timeout=60s")
    other.execute("BEGIN")
    other.execute("UPDATE tickets_ticket SET title = 'else' WHERE id = 1")
    ours.execute("BEGIN")
    ours.execute("SELECT pg_advisory_xact_lock_shared(%s::integer, 1)", (LOCK_CLASS,))
    ours.execute("UPDATE tickets_ticket SET title = 'ours' WHERE id = 2")

    async def wait(number: int) -> None:
        statement = "UPDATE tickets_ticket SET title = 'waits' WHERE id = %s"
        await asyncio.to_thread(waiter.execute, statement, (number,))

    # It waits for a session that is not a range's.
    waiting = asyncio.create_task(wait(1))
    await database.until_blocked()
    assert (await sessions_that_wait(control, seconds=0.0)).sessions == 0
    other.execute("COMMIT")
    await waiting
    began = time.monotonic()
    waiting = asyncio.create_task(wait(2))
    await database.until_blocked()
    found = await sessions_that_wait(control, seconds=0.0)
    assert found.sessions == 1
    assert 0 < found.seconds <= time.monotonic() - began
    assert (await sessions_that_wait(control, seconds=3600.0)).sessions == 0
    execute_all(ours, "COMMIT")
    await waiting
    assert (await sessions_that_wait(control, seconds=0.0)).sessions == 0


async def test_a_takeover_that_waits_for_the_ranges_is_not_a_session_that_they_block(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    ours, taker = database.connect(), database.connect(options="-c lock_timeout=60s")
    ours.execute("BEGIN")
    ours.execute("SELECT pg_advisory_xact_lock_shared(%s::integer, 1)", (LOCK_CLASS,))
    taking = asyncio.create_task(
        asyncio.to_thread(taker.execute, "SELECT pg_advisory_xact_lock(%s::integer, 1)", (LOCK_CLASS,))
    )
    await database.until_blocked()
    assert (await sessions_that_wait(control, seconds=0.0)).sessions == 0
    execute_all(ours, "COMMIT")
    await taking


async def test_the_probes_work_for_a_role_without_privileges(database: Database) -> None:
    with database.role() as name:
        async with connected(database.server) as connection:
            await connection.execute(sql.SQL("SET ROLE {}").format(name))
            assert (await probe(connection)).commit_seconds > 0
            assert (await read_activity(connection)).commits > 0
            assert (await sessions_that_wait(connection, seconds=0.0)).sessions == 0
