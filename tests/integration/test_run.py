"""Whole runs, as the command starts them: begun, stopped, resumed, disturbed, completed."""

import signal
import uuid
from collections import Counter
from functools import partial
from typing import Any

import psycopg
import pytest
from django.db import connection as django_connection
from django.db import transaction

from rotator.api import prepare
from rotator.events import (
    DrainStarted,
    Event,
    LateCommitsAwaited,
    LateRowsRotated,
    OutageEnded,
    OutageStarted,
    OwnerWatched,
    RangeCompleted,
    RangeDeferred,
    ReceiverFailed,
    RotationStarted,
    RowRejected,
    StopReason,
)
from rotator.exceptions import OptionError, OwnedElsewhereError, RotationFinishedError, ServerLostError
from rotator.models import CompletedRange, Rotation
from rotator.options import RunOptions, Selection
from rotator.postgres import rotations
from rotator.postgres.fence import Lease
from rotator.postgres.owner import this_process
from rotator.runner import acquire, heartbeat, retry, session
from rotator.signals import range_rotated
from tests.integration.outcomes import (
    EventRecorder,
    after_range,
    assert_completed,
    make_rotation,
)
from tests.integration.outcomes import rotate_tickets as rotate_without_probes
from tests.integration.rotation_tables import (
    COMMITTING,
    END_THE_ROTATOR,
    TARGET,
    Database,
    assert_new_uuid4s,
    once_each,
)
from tests.pairs import quick

pytestmark = COMMITTING

# As the command rotates.
rotate_tickets = partial(rotate_without_probes, pace="balanced")


# --- From the start to the end ---------------------------------------------------------------------


@pytest.mark.parametrize("workers_and_batch", quick((1, 1), (20, 10), slow=[(1, 1000), (4, 7)]), ids=str)
def test_every_row_is_rotated_once(database: Database, workers_and_batch: tuple[int, int]) -> None:
    concurrency, batch = workers_and_batch
    for first, last in ((-3, 40), (100, 119), (1000, 1000)):
        database.make_tickets(first, last)
    database.count_updates()
    before, recorder = database.values(), EventRecorder()

    outcome = rotate_tickets(recorder, concurrency=concurrency, batch=batch)

    assert_completed(outcome, rows=65)
    assert database.updates() == Counter(before.keys())
    assert_new_uuid4s(before, database.values())
    assert recorder.rows == 65
    assert outcome.rows_total == outcome.rows_this_run == 65
    assert recorder.events[-1] == outcome


@pytest.mark.parametrize("rows", [0, 1])
def test_a_table_of_next_to_nothing_is_completed(database: Database, rows: int) -> None:
    database.make_tickets(1, rows)
    before = database.values()
    assert_completed(rotate_tickets(), rows=rows)
    assert database.changed(before) == set(before)
    assert CompletedRange.objects.count() == rows


def test_rows_above_the_bound_are_left_alone(database: Database) -> None:
    database.make_tickets(1, 30)
    database.count_updates()
    recorder = EventRecorder(after_range(1, lambda: database.make_tickets(31, 40)))
    assert_completed(rotate_tickets(recorder), rows=30)
    assert database.updates() == once_each((1, 30))


def test_a_completed_rotation_is_followed_by_a_new_one(database: Database) -> None:
    database.make_tickets(1, 30)
    database.count_updates()
    first, second = rotate_tickets(), rotate_tickets(restart=True)
    assert_completed(second, rows=30)
    assert first.rotation != second.rotation
    assert not second.resumed
    assert database.updates() == once_each((1, 30), (1, 30))


@pytest.mark.usefixtures("database")
def test_a_rotation_inside_somebody_s_transaction_is_refused() -> None:
    with transaction.atomic(), pytest.raises(OptionError, match="outside atomic"):
        rotate_tickets()
    assert not Rotation.objects.exists()
    assert not django_connection.in_atomic_block


# --- Stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", quick(10, 25, slow=[1, 9, 99]))
def test_a_run_ends_after_exactly_as_many_rows_as_it_was_told(database: Database, rows: int) -> None:
    database.make_tickets(1, 100)
    database.count_updates()

    first = rotate_tickets(stop_after_rows=rows)

    assert (first.status, first.exit_status) == ("interrupted", 0)
    assert first.rows == first.rows_this_run == sum(database.updates().values()) == rows
    assert Rotation.objects.get().status == "interrupted"

    second = rotate_tickets()

    assert_completed(second, rows=100)
    assert second.resumed
    assert second.rows_this_run == 100 - rows
    assert second.rotation == first.rotation
    assert database.updates() == once_each((1, 100))


@pytest.mark.parametrize("rows", [100, 5000])
def test_a_run_that_reaches_the_end_before_its_limit_completes(database: Database, rows: int) -> None:
    database.make_tickets(1, 100)
    assert_completed(rotate_tickets(stop_after_rows=rows), rows=100)


def test_every_run_may_have_another_batch_and_concurrency(database: Database) -> None:
    database.make_tickets(1, 100)
    database.count_updates()
    for concurrency, batch in ((1, 7), (5, 3), (2, 40)):
        assert rotate_tickets(concurrency=concurrency, batch=batch, stop_after_rows=20).rows_this_run == 20
    assert_completed(rotate_tickets(concurrency=4, batch=11), rows=100)
    assert database.updates() == once_each((1, 100))


@pytest.mark.parametrize("deleted", quick("= 100", "> 0", slow=["> 60", "BETWEEN 10 AND 90"]))
def test_rows_that_are_deleted_between_two_runs_are_not_waited_for(database: Database, deleted: str) -> None:
    database.make_tickets(1, 100)
    database.count_updates()
    rotate_tickets(stop_after_rows=50)
    database.execute(f"DELETE FROM tickets_ticket WHERE id {deleted}")
    outcome = rotate_tickets()
    assert (outcome.status, outcome.exit_status) == ("completed", 0)
    updates = database.updates()
    assert set(updates.values()) == {1}
    assert set(database.values()) <= set(updates)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_ranges_in_flight_commit(database: Database, sent: signal.Signals, status: int) -> None:
    database.make_tickets(1, 200)
    database.count_updates()
    handler = signal.getsignal(sent)
    recorder = EventRecorder(after_range(3, lambda: signal.raise_signal(sent)))

    outcome = rotate_tickets(recorder)

    assert (outcome.status, outcome.exit_status) == ("interrupted", status)
    assert recorder.of(DrainStarted) == 1
    assert 30 <= outcome.rows == sum(database.updates().values()) < 200
    assert Rotation.objects.get().rows_done == outcome.rows
    assert signal.getsignal(sent) is handler
    assert_completed(rotate_tickets(), rows=200)
    assert database.updates() == once_each((1, 200))


def test_a_second_signal_rolls_back_what_is_in_flight(database: Database) -> None:
    database.make_tickets(1, 200)
    database.count_updates()

    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    outcome = rotate_tickets(EventRecorder(after_range(3, press_twice)))

    assert (outcome.status, outcome.exit_status) == ("interrupted", 130)
    assert Rotation.objects.get().status == "interrupted"
    assert outcome.rows == sum(database.updates().values()) < 200
    assert_completed(rotate_tickets(), rows=200)
    assert database.updates() == once_each((1, 200))


def test_a_time_limit_ends_a_run_that_waits_for_somebody(database: Database) -> None:
    database.make_tickets(1, 30)
    neighbour = database.connect()
    neighbour.execute("BEGIN")
    neighbour.execute("SELECT FROM tickets_ticket WHERE id = 5 FOR UPDATE")
    outcome = rotate_tickets(stop_after_seconds=0.5)
    assert (outcome.status, outcome.exit_status) == ("interrupted", 0)
    neighbour.execute("COMMIT")
    assert_completed(rotate_tickets(), rows=30)


# --- Owners ----------------------------------------------------------------------------------------


def test_a_living_owner_is_left_alone(database: Database) -> None:
    database.make_tickets(1, 30)
    rotation, before = make_rotation(), database.values()

    def beat(event: Event) -> None:
        if isinstance(event, OwnerWatched):
            database.execute("UPDATE rotator_rotation SET updated_at = clock_timestamp()")

    with pytest.raises(OwnedElsewhereError, match=r"by ann on elsewhere\.example \(pid 4711\) since"):
        rotate_tickets(EventRecorder(beat))
    assert database.changed(before) == set()
    rotation.refresh_from_db()
    assert (rotation.status, rotation.generation) == ("running", 1)


def test_an_owner_that_is_silent_is_taken_over(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acquire, "SILENT_SECONDS", 0.3)
    database.make_tickets(1, 30)
    rotation, recorder = make_rotation(), EventRecorder()
    outcome = rotate_tickets(recorder)
    assert_completed(outcome, rows=30)
    assert recorder.of(OwnerWatched) == 1
    assert (outcome.rotation, outcome.resumed) == (rotation.pk, True)
    rotation.refresh_from_db()
    assert (rotation.generation, rotation.owner_pid) == (2, this_process().pid)


@pytest.mark.parametrize(
    ("owner", "options"),
    [
        # This host's boot and namespace, and a process that cannot have started so early.
        (
            {
                "owner_host": this_process().host,
                "owner_process": f"{this_process().process.rpartition(' ')[0]} 1",
            },
            {},
        ),
        ({"status": "interrupted"}, {}),
        ({"status": "failed", "error": "broken"}, {}),
        ({}, {"take_over": True}),
    ],
    ids=["gone from this host", "interrupted", "failed", "--take-over"],
)
def test_an_owner_that_need_not_be_watched_is_taken_over_at_once(
    database: Database, owner: dict[str, object], options: dict[str, object]
) -> None:
    database.make_tickets(1, 30)
    rotation, recorder = make_rotation(**owner), EventRecorder()
    outcome = rotate_tickets(recorder, **options)
    assert_completed(outcome, rows=30)
    assert outcome.rotation == rotation.pk
    assert recorder.of(OwnerWatched) == 0


def test_a_restart_abandons_what_was_unfinished(database: Database) -> None:
    database.make_tickets(1, 30)
    database.count_updates()
    first = rotate_tickets(stop_after_rows=10)
    second = rotate_tickets(restart=True)
    assert_completed(second, rows=30)
    assert second.rotation != first.rotation
    assert Rotation.objects.get(pk=first.rotation).status == "abandoned"
    assert database.updates() == once_each((1, 10), (1, 30))


def test_a_run_that_is_taken_over_writes_nothing_more_and_leaves_the_row_alone(database: Database) -> None:
    database.make_tickets(1, 200)
    database.count_updates()
    taken = (
        "UPDATE rotator_rotation SET generation = generation + 1, owner_host = 'elsewhere.example',"
        " updated_at = clock_timestamp() RETURNING updated_at"
    )
    seen = list[object]()

    def take() -> None:
        seen.extend(*database.execute(taken))
        seen.append(sum(database.updates().values()))

    outcome = rotate_tickets(EventRecorder(after_range(3, take)), concurrency=1)

    assert (outcome.status, outcome.exit_status) == ("interrupted", 1)
    assert "taken this rotation over" in outcome.error
    rotation = Rotation.objects.get()
    assert (rotation.status, rotation.owner_host) == ("running", "elsewhere.example")
    assert [rotation.updated_at, sum(database.updates().values())] == seen


# --- Left to others --------------------------------------------------------------------------------


def test_a_queued_rotation_keeps_its_account(database: Database) -> None:
    database.make_tickets(1, 50)
    database.count_updates()
    rotate_tickets(stop_after_rows=20)
    Rotation.objects.update(active_seconds=100)
    number = prepare([TARGET], "default", RunOptions(batch=7)).begin(EventRecorder())
    left = Rotation.objects.get()
    assert (left.pk, left.status, left.stop_reason, left.generation) == (number, "queued", "", 2)
    assert (left.rows_done, left.active_seconds, left.options["batch"]) == (20, 100, 7)
    outcome = rotate_tickets(rotation=number)
    assert_completed(outcome, rows=50)
    assert outcome.seconds_total > 100
    assert database.updates() == once_each((1, 50))


def test_one_that_is_over_is_not_begun_anew(database: Database) -> None:
    database.make_tickets(1, 10)
    number = rotate_tickets().rotation
    for wanted in (number, number + 1):
        with pytest.raises(
            RotationFinishedError, match=f"no unfinished rotation {wanted} of tickets.Ticket.token"
        ):
            rotate_tickets(rotation=wanted)
    assert Rotation.objects.count() == 1


# --- A table that is locked ------------------------------------------------------------------------


def test_ddl_on_the_table_is_waited_for_without_an_outage(database: Database) -> None:
    database.make_tickets(1, 50)
    database.count_updates()
    other = database.connect()

    def lock(event: Event) -> None:
        if isinstance(event, RotationStarted):
            other.execute("BEGIN")
            other.execute("LOCK TABLE tickets_ticket")
        elif isinstance(event, RangeDeferred) and not event.rows and other.info.transaction_status:
            other.execute("COMMIT")

    recorder = EventRecorder(lock)
    assert_completed(rotate_tickets(recorder, batch=5), rows=50)
    assert recorder.of(OutageStarted) == 0
    assert database.updates() == once_each((1, 50))


# --- Rows that cannot be written -------------------------------------------------------------------


def test_rows_at_fault_are_named_and_all_others_rotated(database: Database) -> None:
    database.make_tickets(1, 100)
    database.count_updates()
    trigger = database.before_update(
        "IF OLD.id IN (7, 8, 100) THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;"
    )

    first = rotate_tickets()

    assert (first.status, first.exit_status) == ("failed", 1)
    assert sorted(first.rejected_keys) == [
        (f"[{number}]", "raise_exception (P0001)") for number in (100, 7, 8)
    ]
    assert Rotation.objects.get().status == "failed"
    assert database.updates() == once_each((1, 6), (9, 99))

    database.execute(f"DROP TRIGGER {trigger} ON tickets_ticket")
    second = rotate_tickets()

    assert_completed(second, rows=100)
    assert second.rotation == first.rotation
    assert database.updates() == once_each((1, 100))


def test_suppressed_updates_complete_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    database.make_tickets(1, 20)
    database.before_update("IF OLD.id = 5 THEN RETURN NULL; END IF; RETURN NEW;")
    monkeypatch.setattr(retry, "backoff_seconds", lambda *_attempt, **_limits: 0.0)
    outcome = rotate_tickets()
    assert outcome.status == "failed"
    assert [key for key, _ in outcome.rejected_keys] == ["[5]"]


def test_rows_that_somebody_holds_are_rotated_when_they_are_free(database: Database) -> None:
    database.make_tickets(1, 50)
    database.count_updates()
    neighbour = database.connect()
    neighbour.execute("BEGIN")
    neighbour.execute("SELECT FROM tickets_ticket WHERE id = 25 FOR UPDATE")

    def let_go(event: Event) -> None:
        if isinstance(event, RangeDeferred) and recorder.of(RangeDeferred) == 3:
            neighbour.execute("COMMIT")

    recorder = EventRecorder(let_go)
    outcome = rotate_tickets(recorder)
    assert_completed(outcome, rows=50)
    assert recorder.of(RangeDeferred) >= 3
    assert recorder.of(OutageStarted) == 0
    assert database.updates() == once_each((1, 50))


# --- Late commits ----------------------------------------------------------------------------------


@pytest.fixture
def older(database: Database) -> psycopg.Connection:
    """A transaction that inserts rows within and above the bound before any rotation, and is not over."""
    database.make_tickets(1, 14)
    database.make_tickets(16, 50)
    database.count_updates()
    opened = database.connect(application_name="shop")
    opened.execute("BEGIN")
    opened.execute(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " SELECT id, 'late', now(), gen_random_uuid() FROM unnest('{15,99}'::int[]) AS id"
    )
    return opened


def test_who_wrote_before_the_start_is_waited_for_before_the_bound_is_frozen(
    database: Database, older: psycopg.Connection
) -> None:

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited):
            assert [holder.split(", ")[2] for holder in event.holders] == ["application shop"]
            older.execute("COMMIT")

    recorder = EventRecorder(commit)
    assert_completed(rotate_tickets(recorder), rows=51)
    assert recorder.of(LateCommitsAwaited) == 1
    assert database.updates() == once_each((1, 50), (99, 99))
    assert Rotation.objects.get().late_rows == 0


def test_what_is_committed_after_the_last_range_is_rotated_before_completion(
    database: Database, older: psycopg.Connection
) -> None:
    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and recorder.rows == 49:
            older.execute("COMMIT")

    recorder = EventRecorder(commit)
    outcome = rotate_tickets(recorder)

    assert_completed(outcome, rows=51)
    assert outcome.late_rows == Rotation.objects.get().late_rows == 2
    assert sum(event.rows for event in recorder.events if isinstance(event, LateRowsRotated)) == 2
    assert database.updates() == once_each((1, 50), (99, 99))


def test_more_late_rows_than_a_batch_are_all_rotated(database: Database) -> None:
    database.count_updates()
    older = database.connect()
    older.execute("BEGIN")
    older.execute(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " SELECT id, 'late', now(), gen_random_uuid() FROM generate_series(1, 300) AS id"
    )

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and recorder.of(RotationStarted):
            older.execute("COMMIT")

    recorder = EventRecorder(commit)
    assert_completed(rotate_tickets(recorder), rows=300)
    assert database.updates() == once_each((1, 300))


def test_a_late_row_at_fault_completes_nothing(database: Database, older: psycopg.Connection) -> None:
    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and recorder.rows == 49:
            older.execute("COMMIT")
            database.before_update("IF OLD.id = 99 THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;")

    recorder = EventRecorder(commit)
    outcome = rotate_tickets(recorder)

    assert (outcome.status, outcome.exit_status, outcome.rows) == ("failed", 1, 50)
    assert outcome.rejected_keys == (("[99]", "raise_exception (P0001)"),)
    assert Rotation.objects.get().status == "failed"
    assert database.updates() == once_each((1, 50))


def test_a_run_stopped_while_it_waits_for_transactions_can_be_resumed(
    database: Database, older: psycopg.Connection
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and recorder.rows == 49:
            signal.raise_signal(signal.SIGINT)

    recorder = EventRecorder(stop)
    first = rotate_tickets(recorder)
    assert (first.status, first.rows, first.exit_status) == ("interrupted", 49, 130)
    older.execute("COMMIT")
    second = rotate_tickets()
    assert_completed(second, rows=51)
    assert second.late_rows == 2
    assert database.updates() == once_each((1, 50), (99, 99))


# --- Outages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", quick({1}, {2, 7, 12}, slow=[{5}]))
def test_lost_connections_are_survived(database: Database, at: set[int]) -> None:
    database.make_tickets(1, 300)
    database.count_updates()
    before = database.values()

    def end(event: Event) -> None:
        if isinstance(event, RangeCompleted) and recorder.of(RangeCompleted) in at:
            database.execute(END_THE_ROTATOR)

    recorder = EventRecorder(end)
    outcome = rotate_tickets(recorder)

    assert_completed(outcome, rows=300)
    assert recorder.of(OutageStarted) == recorder.of(OutageEnded) == len(at)
    assert recorder.of(RotationStarted) == 1
    assert database.updates() == once_each((1, 300))
    assert_new_uuid4s(before, database.values())
    assert Rotation.objects.get().generation == 1 + len(at)


def test_a_limit_counts_the_rows_before_an_outage_too(database: Database) -> None:
    database.make_tickets(1, 300)
    database.count_updates()

    def end() -> None:
        database.execute(END_THE_ROTATOR)

    outcome = rotate_tickets(EventRecorder(after_range(5, end)), stop_after_rows=150)
    assert (outcome.status, outcome.exit_status) == ("interrupted", 0)
    assert outcome.rows_this_run == outcome.rows == sum(database.updates().values()) == 150
    assert_completed(rotate_tickets(), rows=300)
    assert database.updates() == once_each((1, 300))


def test_a_row_at_fault_is_named_once_whatever_outages_there_were(database: Database) -> None:
    database.make_tickets(1, 2000)
    # The first row of a range is tried alone, while other ranges are left.
    database.before_update("IF OLD.id = 251 THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;")

    def end(event: Event) -> None:
        if isinstance(event, RowRejected) and recorder.of(RowRejected) == 1:
            database.execute(END_THE_ROTATOR)

    recorder = EventRecorder(end)
    outcome = rotate_tickets(recorder)
    assert outcome.status == "failed"
    assert recorder.of(OutageEnded) == 1
    assert outcome.rejected_keys == (("[251]", "raise_exception (P0001)"),)


def test_a_row_that_was_at_fault_before_an_outage_and_is_not_after_it_fails_nothing(
    database: Database,
) -> None:
    database.make_tickets(1, 500)
    trigger = database.before_update("IF OLD.id = 251 THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;")

    def fix_cause(event: Event) -> None:
        if isinstance(event, RowRejected):
            database.execute(END_THE_ROTATOR)
        if isinstance(event, OutageStarted):
            database.execute(f"DROP TRIGGER {trigger} ON tickets_ticket")

    assert_completed(rotate_tickets(EventRecorder(fix_cause)), rows=500)


def test_a_server_that_stays_away_ends_the_run_once_its_budget_is_used_up(database: Database) -> None:
    database.make_tickets(1, 100)
    database.count_updates()
    name = django_connection.get_connection_params()["dbname"]

    def close(event: Event) -> None:
        if isinstance(event, RangeCompleted) and recorder.of(RangeCompleted) == 2:
            maintenance.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            database.execute(END_THE_ROTATOR)

    recorder = EventRecorder(close)
    maintenance = database.connect(dbname="postgres")
    try:
        outcome = rotate_tickets(recorder, outage_budget_seconds=0.5)
    finally:
        maintenance.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert (outcome.status, outcome.exit_status) == ("interrupted", 1)
    assert "cannot be reached" in outcome.error
    # The database could not be told.
    assert Rotation.objects.get().status == "running"
    second = rotate_tickets(take_over=True)
    assert_completed(second, rows=100)
    assert database.updates() == once_each((1, 100))


def test_a_server_that_comes_back_read_only_ends_the_run_with_an_account(database: Database) -> None:
    database.make_tickets(1, 100)
    name = django_connection.get_connection_params()["dbname"]

    def switch(event: Event) -> None:
        if isinstance(event, RangeCompleted) and recorder.of(RangeCompleted) == 2:
            database.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            database.execute(END_THE_ROTATOR)

    recorder = EventRecorder(switch)
    try:
        outcome = rotate_tickets(recorder, outage_budget_seconds=1.0)
    finally:
        database.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert (outcome.status, outcome.exit_status) == ("interrupted", 1)
    assert "read-only" in outcome.error


# --- The heartbeat during the work -----------------------------------------------------------------


def test_a_table_that_takes_too_long_to_count_is_rotated_all_the_same(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_tickets(1, 30_000)
    # The heartbeat wants the connection while the count that is given up still holds it.
    monkeypatch.setattr(session, "COUNT_SECONDS", 0.001)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0)
    outcome = rotate_tickets(stop_after_rows=1)
    assert (outcome.stop_reason, outcome.exit_status) == (StopReason.STOP_AFTER, 0)
    assert not outcome.rows_total_is_exact


def test_the_heartbeat_does_not_take_completion_for_a_takeover(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_tickets(1, 200)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0)
    for _ in range(5):
        assert_completed(rotate_tickets(restart=True), rows=200)


# --- Replies that are lost -------------------------------------------------------------------------


def test_a_completion_whose_reply_is_lost_is_a_completion(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_tickets(1, 200)
    complete = rotations.complete

    async def complete_and_lose(*args: Any, **options: Any) -> int | None:  # noqa: ANN401 - as they come
        await complete(*args, **options)
        raise ServerLostError("The connection was lost.")

    monkeypatch.setattr(rotations, "complete", complete_and_lose)
    recorder = EventRecorder()
    assert_completed(rotate_tickets(recorder), rows=200)
    assert recorder.of(OutageEnded) == 1


def test_a_taking_over_whose_reply_is_lost_is_no_other_process(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_tickets(1, 200)
    database.count_updates()
    take_over_from_self = rotations.take_over_from_self
    lost: list[Lease] = []

    async def take_over_and_lose(*args: Any, **options: Any) -> Lease | None:  # noqa: ANN401 - as they come
        lease = await take_over_from_self(*args, **options)
        if lease is not None and not lost:
            lost.append(lease)
            raise ServerLostError("The connection was lost.")
        return lease

    monkeypatch.setattr(rotations, "take_over_from_self", take_over_and_lose)
    assert_completed(
        rotate_tickets(EventRecorder(after_range(3, lambda: database.execute(END_THE_ROTATOR)))), rows=200
    )
    assert lost
    assert database.updates() == once_each((1, 200))


# --- What must not end a run, or leave it as running -------------------------------------------------


def test_an_exception_of_an_observer_leaves_the_rotation_failed_with_its_type(database: Database) -> None:
    database.make_tickets(1, 100)

    def fail(_event: Event) -> None:
        raise KeyError("leaked")

    with pytest.raises(KeyError):
        rotate_tickets(
            EventRecorder(lambda event: fail(event) if isinstance(event, RangeCompleted) else None)
        )
    rotation = Rotation.objects.get()
    assert rotation.status == "failed"
    assert rotation.error == "The program failed with KeyError: look at its traceback."
    assert_completed(rotate_tickets(), rows=100)


def _end_this_connection() -> None:
    with django_connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def test_a_receiver_that_loses_djangos_connection_is_called_again(database: Database) -> None:
    database.make_tickets(1, 100)
    heard, calls = list[int](), Counter[str]()

    def hear(rows: int, **_: object) -> None:
        calls["calls"] += 1
        if calls["calls"] == 3:
            _end_this_connection()
        with django_connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        heard.append(rows)

    recorder = EventRecorder()
    range_rotated.connect(hear)
    try:
        assert_completed(rotate_tickets(recorder), rows=100)
    finally:
        range_rotated.disconnect(hear)
    assert sum(heard) == 100
    assert not recorder.of(ReceiverFailed)
    assert not recorder.of(OutageStarted)


def test_a_receiver_that_fails_is_reported_once(database: Database) -> None:
    database.make_tickets(1, 100)

    def hear(**_: object) -> None:
        raise ValueError("leaked")

    recorder = EventRecorder()
    range_rotated.connect(hear)
    try:
        assert_completed(rotate_tickets(recorder), rows=100)
    finally:
        range_rotated.disconnect(hear)
    (failed,) = [event for event in recorder.events if isinstance(event, ReceiverFailed)]
    assert (failed.receiver.rpartition(".")[2], failed.error) == ("hear", "ValueError")


lost_once = list[bool]()


def make_and_lose_the_connection_once() -> uuid.UUID:
    if len(lost_once) == 1:
        lost_once.append(True)
        _end_this_connection()
    with django_connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return uuid.uuid4()


def test_a_generator_that_loses_djangos_connection_is_an_outage(database: Database) -> None:
    database.make_tickets(1, 100)
    lost_once.clear()
    recorder = EventRecorder(after_range(2, lambda: lost_once.append(True)))
    selection = Selection(generator=f"{__name__}.{make_and_lose_the_connection_once.__name__}")
    outcome = prepare([TARGET], "default", RunOptions(batch=10, concurrency=3), selection).rotate(recorder)
    assert_completed(outcome, rows=100)
    assert recorder.of(OutageStarted) == recorder.of(OutageEnded) == 1
