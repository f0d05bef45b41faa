"""The pace of whole runs next to other sessions."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NoReturn

import psycopg
import pytest
from psycopg import sql

from rotator.events import Event, PaceChanged, RangeCompleted, Throttled, ThrottleEnded
from rotator.exceptions import ServerRefusedError
from rotator.postgres.fence import LOCK_CLASS
from rotator.postgres.maintenance import vacuum
from rotator.runner import maintenance as runner_maintenance
from rotator.runner import pacing
from rotator.runner.gate import Gate
from rotator.runner.pacing import Pacing
from tests.integration.outcomes import EventRecorder, assert_completed, at_start, rotate_tickets
from tests.integration.rotation_tables import COMMITTING, PATIENCE_SECONDS, SCHEMA, Database, once_each

pytestmark = COMMITTING

ROWS = 3000
# Ten times what it takes on an idle machine.
LOCK_SECONDS = 5.0


@contextmanager
def _in_background(*works: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Call each function again and again, in a thread of its own, until the block ends or it fails."""
    over = threading.Event()
    errors = list[BaseException]()

    def work(call: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                call()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=[call]) for call in works]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


@contextmanager
def _busy_application(database: Database) -> Iterator[None]:
    """An application with a few hundred commits a second, which waits for no row."""
    connections = [database.connect() for _ in range(4)]

    def commit(connection: psycopg.Connection) -> None:
        # The server does not count a transaction that reads no table.
        connection.execute("SELECT FROM tickets_ticket WHERE id = 0")
        time.sleep(0.005)

    with _in_background(*(lambda own=own: commit(own) for own in connections)):
        yield


@pytest.fixture
def slow_rows(database: Database) -> None:
    """Rows that take a while without costing the CPU anything."""
    database.make_tickets(1, ROWS)
    database.count_updates()
    database.before_update("PERFORM pg_sleep(0.002); RETURN NEW;")


@pytest.mark.usefixtures("slow_rows")
def test_other_sessions_at_work_get_fewer_workers_and_shorter_ranges(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly = list[bool]()

    async def noted(*arguments: Any, is_slow: bool, **options: Any) -> str:  # noqa: ANN401 - handed on
        slowly.append(is_slow)
        return await vacuum(*arguments, is_slow=is_slow, **options)

    monkeypatch.setattr(runner_maintenance, "vacuum", noted)
    recorder = EventRecorder()
    with _busy_application(database):
        outcome = rotate_tickets(recorder, concurrency=4, batch=100, pace="balanced")

    assert_completed(outcome, rows=ROWS)
    assert slowly[-1]
    assert database.updates() == once_each((1, ROWS))
    changes = [event for event in recorder.events if isinstance(event, PaceChanged) and event.is_new]
    first = changes[0]
    assert (first.pace, first.workers, first.concurrency) == ("balanced", 1, 4)
    assert (first.is_limited, first.reason) == (True, "other sessions at work")
    after = recorder.events[recorder.events.index(first) :]
    # The four in flight, and one for the first measurement.
    rows = [event.rows for event in after if isinstance(event, RangeCompleted)][8:]
    assert rows
    # 2 ms a row, and 25 ms a range. On a busy machine, single ranges are larger.
    assert median(rows) < 30
    shown = [event.reason for event in after if isinstance(event, PaceChanged)]
    assert any(reason.startswith("commit p90 ") for reason in shown)
    assert outcome.limited_seconds > 0
    assert outcome.pace == "balanced"


@pytest.mark.usefixtures("slow_rows")
def test_a_quiet_server_is_not_limited(database: Database) -> None:
    recorder = EventRecorder()
    outcome = rotate_tickets(recorder, concurrency=8, batch=50, vacuum=False, pace="balanced")
    assert_completed(outcome, rows=ROWS)
    assert recorder.of(PaceChanged) == 0
    assert database.updates() == once_each((1, ROWS))


async def test_a_run_begins_with_one_worker_until_the_server_is_known_to_be_quiet(database: Database) -> None:
    gate = Gate(concurrency=4, rows=2000, notify=lambda _event: None)
    async with Pacing(database.server, gate, "balanced", lambda _event: None).running():
        assert gate.workers == 1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while gate.workers < 4:  # noqa: ASYNC110 - another task changes it
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("slow_rows")
def test_the_full_pace_limits_nothing(database: Database) -> None:
    recorder = EventRecorder()
    with _busy_application(database):
        outcome = rotate_tickets(recorder, concurrency=8, batch=100, vacuum=False, pace="full")
    assert_completed(outcome, rows=ROWS)
    assert recorder.of(PaceChanged) == 0
    # On a busy machine, a range can be too slow, and is split.
    assert median(event.rows for event in recorder.events if isinstance(event, RangeCompleted)) == 100


@pytest.mark.usefixtures("slow_rows")
def test_a_migration_gets_its_lock_soon(database: Database) -> None:
    migrating = database.connect(application_name="migration")
    waits = list[float]()

    def lock() -> None:
        began = time.monotonic()
        with migrating.transaction():
            migrating.execute("LOCK TABLE tickets_ticket IN ACCESS EXCLUSIVE MODE")
            waits.append(time.monotonic() - began)
        time.sleep(0.2)

    with _in_background(lock):
        outcome = rotate_tickets(concurrency=4, batch=100, pace="balanced")
    assert_completed(outcome, rows=ROWS)
    assert len(waits) > 5
    assert max(waits) < LOCK_SECONDS
    assert database.updates() == once_each((1, ROWS))


def _time(session: psycopg.Connection, statement: Callable[[], str], seconds: list[float]) -> None:
    began = time.monotonic()
    session.execute(statement().encode())
    seconds.append(time.monotonic() - began)


@pytest.mark.slow
def test_a_writer_waits_for_a_range_for_at_most_100_ms(database: Database) -> None:
    rows = 50_000
    database.make_tickets(1, rows)
    untouched = sql.Identifier(SCHEMA, "untouched").as_string()
    database.execute(f"CREATE TABLE {untouched} AS SELECT n AS id FROM generate_series(1, 10) AS n")
    chance = random.Random(1)  # noqa: S311 - it must be reproducible
    waits, delays = list[float](), list[float]()

    def write() -> str:
        return f"UPDATE tickets_ticket SET title = 'written' WHERE id = {chance.randrange(1, rows + 1)}"

    works = [partial(_time, database.connect(), write, waits) for _ in range(2)]
    # No range has locks there, so this is the longest time that a busy machine alone delays a session.
    works.append(
        partial(_time, database.connect(), lambda: f"UPDATE {untouched} SET id = id WHERE id = 1", delays)
    )
    with _in_background(*works) as errors:
        while len(waits) < 10_000 and not errors:
            outcome = rotate_tickets(concurrency=4, batch=2000, restart=True, pace="balanced")
            assert outcome.status == "completed"
    # It can delay the writer, and the session that the writer waits for.
    assert max(waits) < 0.1 + 2 * max(delays)


def test_a_session_that_waits_for_a_range_holds_the_next_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "LOOK_SECONDS", 0.02)
    database.make_tickets(1, 2000)
    database.before_update("PERFORM pg_sleep(0.002); RETURN NEW;")
    ours, waiter = database.connect(), database.connect()
    ours.execute("BEGIN")
    ours.execute("SELECT pg_advisory_xact_lock_shared(%s::integer, 1)", (LOCK_CLASS,))
    ours.execute("UPDATE tickets_ticket SET title = 'ours' WHERE id = 2000")
    waiting = threading.Thread(
        target=waiter.execute, args=["UPDATE tickets_ticket SET title = 'else' WHERE id = 2000"]
    )
    recorder = EventRecorder(at_start(waiting.start))

    def let_go(event: Event) -> None:
        recorder(event)
        if isinstance(event, Throttled) and ours.info.transaction_status:
            ours.execute("COMMIT")

    outcome = rotate_tickets(let_go, concurrency=2, batch=20, pace="balanced")
    waiting.join()
    assert_completed(outcome, rows=2000)
    throttled = next(event for event in recorder.events if isinstance(event, Throttled))
    assert throttled.source == "lock wait"
    assert throttled.reason.startswith("lock wait of other sessions ")
    assert throttled.reason.endswith(" ms > 50 ms")
    assert recorder.of(ThrottleEnded) >= 1
    assert outcome.throttled_seconds["lock wait"] > 0


@pytest.mark.usefixtures("slow_rows")
def test_probes_that_the_server_refuses_stop_nothing_and_are_reported(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> NoReturn:
        raise ServerRefusedError("This role may not do that.")

    monkeypatch.setattr(pacing, "probe", refuse)
    monkeypatch.setattr(pacing, "RETRY_SECONDS", 0.1)
    recorder = EventRecorder()
    with _busy_application(database):
        outcome = rotate_tickets(recorder, concurrency=4, batch=100, vacuum=False, pace="balanced")
    assert_completed(outcome, rows=ROWS)
    reasons = [event.reason for event in recorder.events if isinstance(event, PaceChanged)]
    assert reasons[:2] == ["other sessions at work", "no measurements: This role may not do that"]
    # It keeps what it began with next to other sessions.
    assert {event.workers for event in recorder.events if isinstance(event, PaceChanged)} == {1}


async def test_a_lost_connection_of_the_probes_is_opened_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(pacing, "RETRY_SECONDS", 0.02)
    events = list[Event]()
    gate = Gate(concurrency=4, rows=2000, notify=events.append)
    with _busy_application(database):
        async with Pacing(database.server, gate, "gentle", events.append).running():
            await _until_limited(events, "gentle")
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'rotator' AND datname = current_database()"
            )
            events.clear()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not _is_measuring(events):  # noqa: ASYNC110 - another task changes it
                    await asyncio.sleep(0.02)
            assert gate.workers == 1
    assert gate.is_open


async def test_a_change_of_the_pace_applies_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "LOOK_SECONDS", 0.02)
    events = list[Event]()
    gate = Gate(concurrency=4, rows=2000, notify=events.append)
    with _busy_application(database):
        keeping = Pacing(database.server, gate, "balanced", events.append)
        async with keeping.running():
            await _until_limited(events, "balanced")
            keeping.set_pace("full")
            assert (gate.workers, keeping.pace) == (4, "full")
            keeping.set_pace("gentle")
            await _until_limited(events, "gentle")
    changes = [event for event in events if isinstance(event, PaceChanged) and event.is_new]
    assert [(change.pace, change.workers) for change in changes][:3] == [
        ("balanced", 1),
        ("full", 4),
        ("gentle", 4),
    ]


def _is_measuring(events: list[Event]) -> bool:
    return any("commit p90" in event.reason for event in events if isinstance(event, PaceChanged))


async def _until_limited(events: list[Event], pace: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not any(  # noqa: ASYNC110 - another task changes it
            event.is_limited and event.pace == pace for event in events if isinstance(event, PaceChanged)
        ):
            await asyncio.sleep(0.01)
