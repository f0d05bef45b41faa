"""One process owns a rotation: who begins it, who takes it over, and what the former owner can still do."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import psycopg
import pytest

from rotator.events import ActionKind, EndStatus
from rotator.exceptions import RotationRepeatedError, RowsLockedError, SupersededError
from rotator.postgres import rotations
from rotator.postgres.connection import APPLICATION_NAME, connected
from rotator.postgres.fence import LOCK_CLASS, Lease
from rotator.postgres.owner import Owner, this_process
from rotator.postgres.rotations import (
    Figures,
    OwnerReport,
    Terms,
    abandon,
    beat,
    complete,
    find_completed,
    find_unfinished,
    freeze_bound,
    read_state,
    stop,
    take_over,
    take_over_from_self,
)
from rotator.ranges import Key
from tests.integration.rotation_tables import (
    COMMITTING,
    PATIENT,
    TABLE_NAME,
    TARGET,
    TICKETS,
    Database,
    begin,
    key_range,
    try_to_begin,
    writing,
)

pytestmark = COMMITTING

STRANGER = Owner(host="elsewhere.example", pid=4711, process="boot pid:[1] 99", user="ann", version="9.9")
BOUND = Key("[20]")


async def _take(
    control: psycopg.AsyncConnection, lease: Lease, *, database: str = "default", owner: Owner = STRANGER
) -> Lease | None:
    return await take_over(
        control,
        lease,
        Terms(
            target=TARGET,
            table_name=TABLE_NAME,
            database=database,
            options={"batch": 7},
            selection={},
            identity={},
        ),
        owner,
        action=ActionKind.TAKEN_OVER,
    )


def _in_a_range(
    database: Database, lease: Lease, application_name: str = f"{APPLICATION_NAME} shop"
) -> psycopg.Connection:
    """A connection in the middle of a range's transaction."""
    opened = database.connect(application_name=application_name)
    opened.execute("BEGIN")
    opened.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, lease.rotation))
    return opened


# --- Beginning -------------------------------------------------------------------------------------


async def test_a_rotation_remembers_the_transaction_that_began_it(database: Database, lease: Lease) -> None:
    ((started_xid, xmin),) = database.execute("SELECT started_xid, xmin::text::bigint FROM rotator_rotation")
    assert started_xid % 2**32 == xmin
    assert lease.generation == 1


async def test_a_second_beginning_begins_nothing(control: psycopg.AsyncConnection, lease: Lease) -> None:
    again = await try_to_begin(control, STRANGER)
    assert again is None
    found = await find_unfinished(control, TARGET, TABLE_NAME)
    assert found is not None
    assert (found.id, found.owner, found.status) == (lease.rotation, this_process(), "running")


async def test_of_two_that_begin_at_the_same_time_one_does(database: Database) -> None:
    async def try_one() -> Lease | None:
        async with connected(database.server) as connection:
            return await try_to_begin(connection, STRANGER)

    begun = await asyncio.gather(*(try_one() for _ in range(5)))
    assert sum(lease is not None for lease in begun) == 1


async def test_other_targets_and_tables_are_rotated_beside_it(
    control: psycopg.AsyncConnection, lease: Lease
) -> None:
    for target, name in ((TARGET, "tenant.tickets_ticket"), ("tickets.Ticket.title", TABLE_NAME)):
        other = await try_to_begin(control, STRANGER, target=target, table_name=name)
        assert other is not None
        assert other.rotation != lease.rotation


async def test_by_another_alias_it_is_the_same_rotation(
    control: psycopg.AsyncConnection, lease: Lease
) -> None:
    assert await try_to_begin(control, STRANGER, database="direct") is None
    taken = await _take(control, lease, database="direct")
    assert taken == Lease(rotation=lease.rotation, generation=2)


async def test_a_completion_just_before_the_insert_is_not_repeated(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.execute(
        "CREATE FUNCTION completes() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE rotator_rotation"
        " SET status = 'completed', finished_at = clock_timestamp() WHERE status = 'running';"
        " RETURN NEW; END $$",
    )
    database.execute(
        "CREATE TRIGGER completes BEFORE INSERT ON rotator_rotation FOR EACH ROW EXECUTE FUNCTION completes()"
    )
    try:
        with pytest.raises(RotationRepeatedError, match=f"Rotation {lease.rotation} of {TARGET} completed"):
            await try_to_begin(control, STRANGER, repeats=False)
    finally:
        database.execute("DROP FUNCTION completes() CASCADE")
    assert database.execute("SELECT count(*) FROM rotator_rotation") == [(1,)]


async def test_nothing_is_unfinished_before_the_first_rotation(control: psycopg.AsyncConnection) -> None:
    assert await find_unfinished(control, TARGET, TABLE_NAME) is None


# --- Coming back after a lost reply ----------------------------------------------------------------


async def test_this_process_takes_over_from_itself_whatever_the_lost_reply_was_to(
    control: psycopg.AsyncConnection, lease: Lease
) -> None:
    taken = await _take(control, lease, owner=this_process())
    assert taken is not None
    again = await take_over_from_self(control, lease.rotation, owner=this_process(), options={})
    assert again == Lease(rotation=lease.rotation, generation=taken.generation + 1)
    assert await find_completed(control, lease.rotation, this_process()) is None


async def test_what_this_process_has_completed_is_not_taken_over_but_found(
    control: psycopg.AsyncConnection, lease: Lease
) -> None:
    await complete(control, TICKETS, lease, None, figures=Figures(active_seconds=1.0))
    assert await take_over_from_self(control, lease.rotation, owner=this_process(), options={}) is None
    assert await find_completed(control, lease.rotation, this_process()) == lease


async def test_what_another_process_owns_is_neither(control: psycopg.AsyncConnection, lease: Lease) -> None:
    taken = await _take(control, lease)
    assert taken is not None
    assert await take_over_from_self(control, lease.rotation, owner=this_process(), options={}) is None
    await complete(control, TICKETS, taken, None, figures=Figures(active_seconds=1.0))
    assert await find_completed(control, lease.rotation, this_process()) is None


# --- Taking over -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
async def test_taking_over_makes_a_new_owner_of_a_new_generation(
    database: Database, control: psycopg.AsyncConnection, lease: Lease, status: str
) -> None:
    database.execute("UPDATE rotator_rotation SET status = %s, error = 'broken'", (status,))
    taken = await _take(control, lease)
    assert taken == Lease(rotation=lease.rotation, generation=2)
    found = await find_unfinished(control, TARGET, TABLE_NAME)
    assert found is not None
    assert (found.owner, found.generation, found.status) == (STRANGER, 2, "running")
    assert (database.rotation("error"), database.rotation("options")) == ("", {"batch": 7})


async def test_who_was_taken_over_writes_nothing_any_more(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    before = database.values()
    taken = await _take(control, lease)
    assert taken is not None
    async with writing(database, lease) as former, writing(database, taken) as latter:
        with pytest.raises(SupersededError):
            await former(key_range(None, 20, 20))
        assert database.values() == before
        assert (await latter(key_range(None, 20, 20))).rows == 20


@pytest.mark.parametrize("status", ["completed", "abandoned"])
async def test_what_has_ended_is_not_taken_over(
    database: Database, control: psycopg.AsyncConnection, lease: Lease, status: str
) -> None:
    database.execute("UPDATE rotator_rotation SET status = %s, finished_at = now()", (status,))
    assert await _take(control, lease) is None
    assert database.rotation("status") == status


async def test_a_takeover_that_was_overtaken_changes_nothing(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    await _take(control, lease)
    again = await _take(control, lease, owner=this_process())
    assert again is None
    assert (database.rotation("generation"), database.rotation("owner_host")) == (2, STRANGER.host)


async def test_of_two_that_take_over_at_the_same_time_one_does(database: Database, lease: Lease) -> None:
    async def try_to_take() -> Lease | None:
        async with connected(database.server) as connection:
            return await _take(connection, lease)

    taken = await asyncio.gather(*(try_to_take() for _ in range(4)))
    assert sorted(taken, key=str) == [Lease(rotation=lease.rotation, generation=2), None, None, None]


async def test_taking_over_waits_for_the_range_in_flight(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    gate = database.connect()
    gate.execute("SELECT pg_advisory_lock(1, 1)")
    database.before_update("PERFORM pg_advisory_xact_lock_shared(1, 1); RETURN NEW;")
    async with writing(database, lease, limits=PATIENT) as writer, asyncio.TaskGroup() as tasks:
        rewriting = tasks.create_task(writer(key_range(None, 20, 20)))
        await database.until_rotator_waits_for_a_lock()
        taking = tasks.create_task(_take(control, lease))
        await database.until_rotator_waits_for_a_lock(backends=2)
        assert database.rotation("generation") == 1
        gate.execute("SELECT pg_advisory_unlock(1, 1)")
        assert (await rewriting).rows == 20
        taken = await taking
    assert taken is not None
    # The new owner sees all that its predecessor has done.
    assert (await read_state(control, taken)).rows_done == 20


async def test_a_session_that_keeps_the_lock_is_terminated(
    database: Database,
    control: psycopg.AsyncConnection,
    lease: Lease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotations, "_TAKE_OVER_LOCK_SECONDS", 0.1)
    frozen, also_frozen = _in_a_range(database, lease), _in_a_range(database, lease)
    bystander = _in_a_range(database, replace(lease, rotation=lease.rotation + 1))
    assert await _take(control, lease) is not None
    for ended in (frozen, also_frozen):
        with pytest.raises(psycopg.OperationalError):
            ended.execute("SELECT")
    bystander.execute("COMMIT")


async def test_a_session_of_the_application_with_the_same_lock_is_left_alone(
    database: Database,
    control: psycopg.AsyncConnection,
    lease: Lease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotations, "_TAKE_OVER_LOCK_SECONDS", 0.01)
    holding = _in_a_range(database, lease, "shop")
    with pytest.raises(RowsLockedError, match=rf"classid {LOCK_CLASS}, objid {lease.rotation} in pg_locks"):
        await _take(control, lease)
    holding.execute("COMMIT")


async def test_a_lock_that_cannot_be_released_is_an_error(
    database: Database,
    control: psycopg.AsyncConnection,
    lease: Lease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotations, "_TAKE_OVER_LOCK_SECONDS", 0.01)
    ((allowed,),) = database.execute("SELECT current_setting('max_prepared_transactions')::int")
    if not allowed:
        pytest.skip("this server allows no prepared transactions")
    holding = _in_a_range(database, lease)
    holding.execute("PREPARE TRANSACTION 'keeps the lock'")
    try:
        with pytest.raises(RowsLockedError):
            await _take(control, lease)
    finally:
        database.execute("ROLLBACK PREPARED 'keeps the lock'")


# --- Heartbeat and leaving -------------------------------------------------------------------------


async def test_the_heartbeat_moves_on_the_database_s_clock(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    for _ in range(2):
        before = database.rotation("updated_at")
        await beat(control, lease, OwnerReport(rows_done=12, figures=Figures(active_seconds=3.5)))
        assert database.rotation("updated_at") > before
    assert (database.rotation("rows_done"), database.rotation("active_seconds")) == (12, 3.5)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
async def test_a_stop_stores_the_rows_that_checkpoints_confirm(
    database: Database, control: psycopg.AsyncConnection, lease: Lease, status: EndStatus
) -> None:
    database.make_tickets(1, 20)
    async with writing(database, lease) as writer:
        await writer(key_range(None, 5, 5))
        await writer(key_range(10, 12, 2))
    database.execute("UPDATE rotator_rotation SET late_rows = 3")
    # The heartbeat said what was in memory.
    await beat(control, lease, OwnerReport(rows_done=4711, figures=Figures(active_seconds=1)))
    rows_done = await stop(control, lease, status=status, error="because", figures=Figures(active_seconds=2))
    assert rows_done == database.rotation("rows_done") == 10
    assert (database.rotation("status"), database.rotation("error")) == (status, "because")
    assert database.rotation("finished_at") is None


async def _beat(control: psycopg.AsyncConnection, lease: Lease) -> None:
    await beat(control, lease, OwnerReport(rows_done=1, figures=Figures(active_seconds=1)))


async def _stop(control: psycopg.AsyncConnection, lease: Lease) -> None:
    await stop(control, lease, status="failed", error="", figures=Figures(active_seconds=1))


async def _complete(control: psycopg.AsyncConnection, lease: Lease) -> None:
    await complete(control, TICKETS, lease, None, figures=Figures(active_seconds=1))


async def _read(control: psycopg.AsyncConnection, lease: Lease) -> None:
    await read_state(control, lease)


async def _freeze(control: psycopg.AsyncConnection, lease: Lease) -> None:
    await freeze_bound(control, lease, bound=BOUND, rows_total=1, is_exact=True)


@pytest.mark.parametrize("act", [_beat, _stop, _complete, _read, _freeze])
async def test_who_was_taken_over_says_nothing_of_the_rotation_any_more(
    database: Database,
    control: psycopg.AsyncConnection,
    lease: Lease,
    act: Callable[[psycopg.AsyncConnection, Lease], Awaitable[None]],
) -> None:
    await _take(control, lease)
    row = database.execute("SELECT * FROM rotator_rotation")
    with pytest.raises(SupersededError):
        await act(control, lease)
    assert database.execute("SELECT * FROM rotator_rotation") == row


# --- Completing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranges", [[], [(None, 5, 5)], [(None, 10, 10), (15, 20, 5)], [(5, 20, 15)]], ids=str
)
async def test_nothing_with_a_gap_is_completed(
    database: Database,
    control: psycopg.AsyncConnection,
    lease: Lease,
    ranges: list[tuple[int | None, int, int]],
) -> None:
    database.make_tickets(1, 20)
    async with writing(database, lease) as writer:
        for after, through, rows in ranges:
            await writer(key_range(after, through, rows))
    row = database.execute("SELECT * FROM rotator_rotation")
    assert await complete(control, TICKETS, lease, BOUND, figures=Figures(active_seconds=1)) is None
    assert database.execute("SELECT * FROM rotator_rotation") == row


async def test_without_a_gap_it_is_completed(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    async with writing(database, lease) as writer:
        for through in (20, 5, 10, 15):
            await writer(key_range(through - 5 or None, through, 5))
    assert await complete(control, TICKETS, lease, BOUND, figures=Figures(active_seconds=8)) == 20
    assert (database.rotation("status"), database.rotation("rows_done")) == ("completed", 20)
    assert database.rotation("finished_at") is not None
    assert await find_unfinished(control, TARGET, TABLE_NAME) is None


async def test_checkpoints_of_another_rotation_complete_nothing(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    async with writing(database, lease) as writer:
        await writer(key_range(None, 20, 20))
    assert await complete(control, TICKETS, lease, BOUND, figures=Figures(active_seconds=1)) == 20
    following = await begin(control)
    assert await complete(control, TICKETS, following, BOUND, figures=Figures(active_seconds=1)) is None
    assert (await read_state(control, following)).rows_done == 0


async def test_an_empty_table_needs_no_checkpoint(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    assert await complete(control, TICKETS, lease, None, figures=Figures(active_seconds=1)) == 0
    assert database.rotation("status") == "completed"


# --- Abandoning ------------------------------------------------------------------------------------


async def test_what_is_abandoned_makes_room_for_a_new_rotation(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    assert await abandon(control, lease)
    assert database.rotation("status") == "abandoned"
    assert database.rotation("finished_at") is not None
    following = await begin(control)
    assert following.rotation != lease.rotation


async def test_only_what_was_seen_is_abandoned(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    await _take(control, lease)
    assert not await abandon(control, lease)
    assert database.rotation("status") == "running"


async def test_abandoning_waits_for_the_range_in_flight(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    in_flight = _in_a_range(database, lease)
    async with asyncio.TaskGroup() as tasks:
        abandoning = tasks.create_task(abandon(control, lease))
        await database.until_rotator_waits_for_a_lock()
        assert database.rotation("status") == "running"
        in_flight.execute("COMMIT")
        assert await abandoning


# --- The state ------------------------------------------------------------------------------------


async def test_the_next_owner_reads_the_state(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    new = await read_state(control, lease)
    assert (new.bound, new.rows_total, new.rows_done, new.late_rows) == (None, 0, 0, 0)
    await freeze_bound(control, lease, bound=BOUND, rows_total=20, is_exact=False)
    async with writing(database, lease) as writer:
        await writer(key_range(None, 5, 5))
    database.execute("UPDATE rotator_rotation SET late_rows = 2")
    await stop(control, lease, status="interrupted", error="", figures=Figures(active_seconds=7.5))
    taken = await _take(control, lease)
    assert taken is not None
    state = await read_state(control, taken)
    assert (state.bound, state.rows_total, state.rows_total_is_exact) == (BOUND, 20, False)
    assert (state.rows_done, state.late_rows, state.figures.active_seconds) == (7, 2, 7.5)
    assert state.started_xid == new.started_xid
