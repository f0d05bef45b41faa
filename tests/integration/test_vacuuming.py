"""VACUUM during a rotation, and what blocks it."""

import asyncio
import signal
import threading
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from rotator.events import Event, Vacuumed, VacuumSkipped, VacuumStarted
from rotator.postgres.connection import connected
from rotator.postgres.maintenance import BUSY, may_vacuum, read_storage, vacuum
from rotator.runner import maintenance as runner_maintenance
from tests.integration.outcomes import EventRecorder, after_range, assert_completed, rotate_tickets
from tests.integration.rotation_tables import COMMITTING, TICKETS, Database

pytestmark = COMMITTING

LOCKED = "LOCK TABLE tickets_ticket IN SHARE UPDATE EXCLUSIVE MODE"


@pytest.fixture
def slow_vacuum(database: Database) -> Iterator[None]:
    """A VACUUM that rests after each page that it looks at."""
    with database.connect() as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET vacuum_cost_delay = '100ms'").format(name))
        connection.execute(sql.SQL("ALTER DATABASE {} SET vacuum_cost_limit = 1").format(name))
        yield
        connection.execute(sql.SQL("ALTER DATABASE {} RESET vacuum_cost_delay").format(name))
        connection.execute(sql.SQL("ALTER DATABASE {} RESET vacuum_cost_limit").format(name))


def test_the_space_of_old_rows_is_used_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_maintenance, "MIN_ROWS", 100)
    monkeypatch.setattr(runner_maintenance, "POLL_SECONDS", 0.001)
    database.make_tickets(1, 10_000)
    # Slow enough for most eighths to be noticed, also on a busy machine.
    database.before_update("PERFORM pg_sleep(0.0005); RETURN NEW;")
    recorder = EventRecorder()

    stopped = rotate_tickets(recorder, batch=100, concurrency=2, pace="full")

    assert stopped.status == "completed"
    assert stopped.storage_before is not None
    assert stopped.storage is not None
    assert stopped.vacuums == recorder.of(Vacuumed) >= 3
    assert stopped.vacuum_seconds > 0
    assert recorder.of(VacuumStarted) == 1
    assert stopped.storage.heap_bytes < 1.8 * stopped.storage_before.heap_bytes
    assert stopped.storage.dead_rows < 2000


def test_random_keys_need_it_less_often(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_maintenance, "MIN_ROWS", 100)
    monkeypatch.setattr(runner_maintenance, "POLL_SECONDS", 0.001)
    database.execute(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " SELECT i, repeat('x', 100), now(), gen_random_uuid() FROM generate_series(1, 10000) AS i"
        " ORDER BY hashint8(i)"
    )
    database.execute("ANALYZE tickets_ticket")
    database.before_update("PERFORM pg_sleep(0.0001); RETURN NEW;")
    stopped = rotate_tickets(batch=100, concurrency=2)
    assert stopped.status == "completed"
    # Each eighth would be more; a neighbour's lock makes it one less.
    assert 1 <= stopped.vacuums <= 2


def test_without_it_the_table_doubles(database: Database) -> None:
    database.execute("ALTER TABLE tickets_ticket SET (autovacuum_enabled = false)")
    database.make_tickets(1, 10_000)
    recorder = EventRecorder()

    stopped = rotate_tickets(recorder, batch=100, vacuum=False)

    vacuum_events = [recorder.of(kind) for kind in (Vacuumed, VacuumStarted, VacuumSkipped)]
    assert (vacuum_events, stopped.vacuums) == ([0, 0, 0], 0)
    assert stopped.storage_before is not None
    assert stopped.storage is not None
    assert stopped.storage.heap_bytes > 1.8 * stopped.storage_before.heap_bytes
    database.execute("ALTER TABLE tickets_ticket RESET (autovacuum_enabled)")


def test_a_locked_table_is_not_vacuumed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_maintenance, "FINAL_DELAYS_SECONDS", (0.01,))
    monkeypatch.setattr(runner_maintenance, "MIN_ROWS", 100)
    monkeypatch.setattr(runner_maintenance, "POLL_SECONDS", 0.001)
    database.make_tickets(1, 1000)
    # Slow enough for a part to be noticed, also on a busy machine.
    database.before_update("PERFORM pg_sleep(0.0005); RETURN NEW;")
    neighbour = database.connect()
    recorder = EventRecorder(after_range(1, lambda: neighbour.execute(f"BEGIN; {LOCKED}".encode())))

    assert_completed(rotate_tickets(recorder, batch=100), rows=1000)

    skipped = [(event.reason, event.is_once) for event in recorder.events if isinstance(event, VacuumSkipped)]
    assert skipped.count(("the table is busy", True)) >= 1
    assert skipped.count(("the table is busy", False)) == 1
    assert len(set(skipped)) == 2
    assert recorder.of(Vacuumed) == 0


def test_the_final_vacuum_waits_for_autovacuum(database: Database) -> None:
    database.make_tickets(1, 1000)
    autovacuum = database.connect()

    def lock(event: Event) -> None:
        if isinstance(event, VacuumStarted):
            autovacuum.execute(f"BEGIN; {LOCKED}".encode())
            threading.Timer(0.3, autovacuum.rollback).start()

    recorder = EventRecorder(lock)
    assert_completed(rotate_tickets(recorder), rows=1000)

    assert (recorder.of(Vacuumed), recorder.of(VacuumSkipped)) == (1, 0)


async def test_it_pauses_as_autovacuum_does_where_other_sessions_are_at_work(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 100)

    async def delay_during_vacuum(*, is_slow: bool) -> str:
        async with connected(database.server) as connection:
            assert not await vacuum(connection, control, TICKETS, indexes=True, is_slow=is_slow)
            row = await (await connection.execute("SHOW vacuum_cost_delay")).fetchone()
            assert row is not None
            return str(row[0])

    assert await delay_during_vacuum(is_slow=False) == "0"
    assert await delay_during_vacuum(is_slow=True) == "2ms"
    name = sql.Identifier(control.info.dbname)
    database.execute(sql.SQL("ALTER DATABASE {} SET vacuum_cost_delay = '5ms'").format(name))
    try:
        assert await delay_during_vacuum(is_slow=True) == "5ms"
    finally:
        database.execute(sql.SQL("ALTER DATABASE {} RESET vacuum_cost_delay").format(name))


@pytest.mark.usefixtures("slow_vacuum")
async def test_it_is_cancelled_when_another_session_waits(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 5000)
    database.execute("UPDATE tickets_ticket SET title = 'another'")
    neighbour = database.connect()
    neighbour.execute("SET lock_timeout = '5s'")
    async with connected(database.server) as connection:
        vacuuming = asyncio.create_task(vacuum(connection, control, TICKETS, indexes=True))
        await database.until(
            "EXISTS (SELECT FROM pg_stat_progress_vacuum WHERE datname = current_database()"
            " AND relid = 'tickets_ticket'::regclass)"
        )

        await asyncio.to_thread(neighbour.execute, f"BEGIN; {LOCKED}".encode())

        assert await vacuuming == BUSY
        # The connection is as good as before.
        await connection.execute("SELECT 1")


@pytest.mark.usefixtures("slow_vacuum")
def test_a_stop_ends_the_last_one_and_the_rotation_is_completed_all_the_same(database: Database) -> None:
    database.make_tickets(1, 5000)

    def stop(event: Event) -> None:
        if isinstance(event, VacuumStarted):
            signal.raise_signal(signal.SIGINT)

    recorder = EventRecorder(stop)
    assert_completed(rotate_tickets(recorder), rows=5000)
    assert recorder.of(Vacuumed) == 0


async def test_only_who_maintains_the_table_may(database: Database, control: psycopg.AsyncConnection) -> None:
    assert await may_vacuum(control, TICKETS)
    with database.role() as visitor:
        database.execute(sql.SQL("GRANT SELECT, UPDATE ON tickets_ticket TO {}").format(visitor))
        await control.execute(sql.SQL("SET ROLE {}").format(visitor))
        assert not await may_vacuum(control, TICKETS)
        if control.info.server_version >= 170_000:
            database.execute(sql.SQL("GRANT MAINTAIN ON tickets_ticket TO {}").format(visitor))
            assert await may_vacuum(control, TICKETS)
        await control.execute("RESET ROLE")


async def test_what_the_table_takes(database: Database, control: psycopg.AsyncConnection) -> None:
    empty = await read_storage(control, TICKETS)
    database.make_tickets(1, 1000)
    filled = await read_storage(control, TICKETS)

    assert empty.heap_bytes == 0
    assert filled.heap_bytes > 50_000
    assert filled.index_bytes > empty.index_bytes
