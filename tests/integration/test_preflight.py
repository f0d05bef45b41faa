"""What a real server says before the first write."""

import asyncio
from contextlib import suppress

import psycopg
import pytest
from psycopg import sql

from rotator.api import prepare
from rotator.events import Findings, Preflighted, RotationStarted
from rotator.models import Rotation
from rotator.options import RunOptions, WaitLimits
from rotator.postgres.preflight import examine_server, examine_table, sample
from rotator.postgres.writer import RangeUpdate
from tests.integration.outcomes import EventRecorder, rotate_tickets
from tests.integration.rotation_tables import COMMITTING, TARGET, TICKETS, UUIDS, Database

pytestmark = COMMITTING

UPDATE = RangeUpdate(TICKETS, UUIDS, WaitLimits())


def dry_run() -> Findings:
    return prepare([TARGET], "default", RunOptions(sample=True)).examine(EventRecorder())


async def test_the_table(database: Database, control: psycopg.AsyncConnection) -> None:
    database.make_tickets(1, 1000)
    database.execute("CREATE INDEX tickets_by_title ON tickets_ticket (title)")
    trigger = database.before_update("RETURN NEW;")

    try:
        found = await examine_table(control, TICKETS, counts=True)
    finally:
        database.execute("DROP INDEX tickets_by_title")

    assert (found.rows, found.rows_is_exact) == (1000, True)
    assert found.heap_bytes > 50_000
    holding = {index.name.split("_")[2]: index.holds_column for index in found.indexes}
    assert holding == {"token": True, "pkey": False, "title": False}
    assert all(index.size_bytes > 0 for index in found.indexes)
    assert [f'"{name}"' for name in found.triggers] == [trigger]


async def test_triggers_that_a_session_of_a_replica_does_not_fire_are_named(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    trigger = database.before_update("RETURN NEW;")
    await control.execute("SET session_replication_role = replica")

    found = await examine_table(control, TICKETS, counts=False)
    assert (found.triggers, [f'"{name}"' for name in found.skipped_triggers]) == ((), [trigger])

    database.execute(f"ALTER TABLE tickets_ticket ENABLE REPLICA TRIGGER {trigger}")
    found = await examine_table(control, TICKETS, counts=False)
    assert ([f'"{name}"' for name in found.triggers], found.skipped_triggers) == ([trigger], ())


async def test_triggers_that_write_to_the_table_are_named(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    for name, body in {
        "touch": "UPDATE tickets_ticket SET title = 'x' WHERE id = 1;",
        "copy": "INSERT INTO public.tickets_ticket SELECT NEW.*;",
        "elsewhere": "PERFORM 'update tickets_ticket_old';",
    }.items():
        trigger = database.before_update(f"{body} RETURN NEW;")
        database.execute(f"ALTER TRIGGER {trigger} ON tickets_ticket RENAME TO {name}")
    found = await examine_table(control, TICKETS, counts=False)
    assert found.writing_triggers == ("copy on tickets_ticket", "touch on tickets_ticket")


async def test_a_subscription_that_writes_to_the_table_is_named(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    try:
        database.execute(
            "CREATE SUBSCRIPTION elsewhere CONNECTION 'dbname=none' PUBLICATION none WITH (connect = false)"
        )
    except psycopg.Error as error:
        pytest.skip(f"this role cannot make a subscription: {error}")
    try:
        database.execute(
            "INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)"
            " SELECT oid, 'tickets_ticket'::regclass, 'r' FROM pg_subscription"
        )
        database.execute("UPDATE pg_subscription SET subenabled = true")
        assert (await examine_table(control, TICKETS, counts=False)).subscriptions == ("elsewhere",)
    finally:
        database.execute("UPDATE pg_subscription SET subenabled = false")
        database.execute("ALTER SUBSCRIPTION elsewhere SET (slot_name = NONE)")
        database.execute("DROP SUBSCRIPTION elsewhere")


async def test_a_publication_for_which_every_update_fails(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    async def refusing() -> tuple[str, ...]:
        return (await examine_table(control, TICKETS, counts=False)).refusing_publications

    # What is published is only of use with another wal_level, of which the server warns.
    database.execute("CREATE PUBLICATION warehouse FOR TABLE tickets_ticket")
    try:
        assert await refusing() == ()
        database.execute("ALTER TABLE tickets_ticket REPLICA IDENTITY NOTHING")
        assert await refusing() == ("warehouse",)
    finally:
        database.execute("ALTER TABLE tickets_ticket REPLICA IDENTITY DEFAULT")
        database.execute("DROP PUBLICATION warehouse")


async def test_an_estimate_is_called_one(database: Database, control: psycopg.AsyncConnection) -> None:
    database.make_tickets(1, 1000)
    database.execute("ANALYZE tickets_ticket")
    database.make_tickets(1001, 1500)

    found = await examine_table(control, TICKETS, counts=False)

    assert (found.rows, found.rows_is_exact) == (1000, False)


async def test_an_empty_table(database: Database, control: psycopg.AsyncConnection) -> None:  # noqa: ARG001
    found = await examine_table(control, TICKETS, counts=True)
    assert (found.rows, found.rows_is_exact, found.heap_bytes) == (0, True, 0)


async def test_who_holds_vacuum_back(
    database: Database, control: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotator.postgres.preflight.OLD_SECONDS", 0)
    # Other tests use the same server.
    monkeypatch.setattr("rotator.postgres.preflight.HOLDERS_NAMED", 1000)
    neighbour = database.connect(application_name="a report")
    neighbour.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    neighbour.execute("SELECT 1")

    found = await examine_server(control)

    named = [holder for holder in found.holders if f"pid {neighbour.info.backend_pid}, a report" in holder]
    assert len(named) == 1
    assert found.max_wal_size_bytes > 1_000_000
    assert found.checkpoint_timeout_seconds >= 30
    assert found.log_settings == ()


async def test_a_role_that_may_see_little(database: Database, control: psycopg.AsyncConnection) -> None:
    with database.role() as visitor:
        await control.execute(sql.SQL("SET ROLE {}").format(visitor))
        found = await examine_server(control)
        await control.execute("RESET ROLE")
    assert found.max_wal_size_bytes > 1_000_000


async def test_slots_are_named(database: Database, control: psycopg.AsyncConnection) -> None:
    if database.execute("SHOW max_replication_slots") == [("0",)]:
        pytest.skip("this server has no replication slots")
    # Slots belong to the server, and other tests may use it too.
    name = f"rotator_forgotten_{control.info.backend_pid}"
    database.execute("SELECT pg_create_physical_replication_slot(%s, true)", (name,))
    try:
        found = await examine_server(control)
    finally:
        database.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    assert [slot for slot in found.slots if slot.startswith(f"{name} (NOT ACTIVE, keeps ")]


async def test_a_sample_measures_and_changes_nothing(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 10_000)
    before = database.values()

    found = await sample(control, database.server, UPDATE, rows=10_000, batch=20, concurrency=3)

    assert found.skipped == ""
    assert 100 < found.rows <= 10_000 / 30
    assert found.rows_per_second > 0
    assert database.values() == before


@pytest.mark.parametrize("batch", [200, 10_000])
async def test_a_small_table_is_not_sampled(
    database: Database, control: psycopg.AsyncConnection, batch: int
) -> None:
    database.make_tickets(1, 1000)
    found = await sample(control, database.server, UPDATE, rows=1000, batch=batch, concurrency=2)
    assert found.skipped == "the table is too small for a sample"


async def test_a_sample_stops_where_another_session_holds_locks(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 10_000)
    neighbour = database.connect()
    neighbour.execute("BEGIN; SELECT FROM tickets_ticket FOR UPDATE")

    found = await sample(control, database.server, UPDATE, rows=10_000, batch=20, concurrency=2)

    assert found.skipped == "other sessions wrote to its rows"


async def test_a_sample_that_is_refused_names_the_condition(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 10_000)
    database.before_update("RAISE check_violation USING MESSAGE = 'it is ' || NEW.token;")

    found = await sample(control, database.server, UPDATE, rows=10_000, batch=20, concurrency=2)

    assert found.skipped == "the server rejected a range: check_violation (23514)"


async def test_a_stop_during_a_sample_leaves_nothing_open(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    database.make_tickets(1, 10_000)
    database.before_update("PERFORM pg_sleep(0.01); RETURN NEW;")
    sampling = asyncio.create_task(
        sample(control, database.server, UPDATE, rows=10_000, batch=20, concurrency=2)
    )
    await asyncio.sleep(0.2)
    sampling.cancel()
    # On a busy server, a range may have taken too long before.
    with suppress(asyncio.CancelledError):
        await sampling
    await database.until(
        "1 = (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rotator'"
        " AND datname = current_database())"
    )


def test_the_preflight_precedes_a_new_rotation_and_not_a_resumed_one(database: Database) -> None:
    database.make_tickets(1, 1000)
    recorder = EventRecorder()
    rotate_tickets(recorder, preflight=True, stop_after_rows=100)
    kinds = [type(event) for event in recorder.events]
    assert kinds.index(Preflighted) < kinds.index(RotationStarted)

    recorder = EventRecorder()
    rotate_tickets(recorder, preflight=True)
    assert recorder.of(Preflighted) == 0


def test_a_dry_run_of_an_unfinished_rotation_says_what_is_left(database: Database) -> None:
    database.make_tickets(1, 1000)
    rotate_tickets(stop_after_rows=300)

    found = dry_run()

    assert (found.unfinished, found.rows_left, found.table.rows) == (Rotation.objects.get().pk, 700, 1000)
    assert Rotation.objects.get().status == "interrupted"
