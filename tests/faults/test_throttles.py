"""Throttles on a real server: a replica that lags, an archiver that is stuck, a slot without a consumer.

The runs work in the test's own event loop. The table of faults: each signal is too high, stale or NULL, or
the role may not read it. Each of them holds the rotation with its reason, and loses nothing.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from core.own_server import OwnReplica
from rotator.events import Event, HorizonHeld, RotationStopped, Throttled, ThrottleEnded
from rotator.exceptions import OptionError
from rotator.options import RunOptions
from rotator.postgres.connection import Server, connected
from rotator.postgres.throttles import (
    Replica,
    check_archiving,
    check_slots,
    read_slot_wal,
    read_unarchived_wal,
    reading,
)
from rotator.runner.context import RunTarget
from rotator.runner.runner import Run
from rotator.runner.throttles import ThrottleSources
from tests.acceptance.harness import wait_until
from tests.faults.database import (
    Audit,
    Database,
    make_tickets,
    new_role,
    slow_down,
    speed_up,
    wait_for_replay,
)
from tests.integration.rotation_tables import UUIDS

ROWS = 3000
SEGMENT_BYTES = 16 * 2**20
PATIENCE_SECONDS = 60.0
ROLE = "visitor"
OPTIONS = RunOptions(batch=20, concurrency=2, vacuum=False, listens_to_signals=False)


def server_of(url: str) -> Server:
    return Server(parameters=conninfo_to_dict(url))


def on_replica(replica: OwnReplica, database: Database) -> Server:
    return server_of(replica.url(database.name))


async def until(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.05)


@dataclass
class Watched:
    """A run that works while the test looks at it, and its audit."""

    database: Database
    audit: Audit
    events: list[Event] = field(default_factory=list)
    stopped: RotationStopped | None = None

    @property
    def holds(self) -> list[str]:
        """The reasons of all holds so far."""
        return [event.reason for event in self.events if isinstance(event, Throttled)]

    async def until_held(self, pattern: str) -> str:
        """Wait for a hold with such a reason; no range is completed then, and the heartbeat goes on."""
        await until(
            lambda: any(re.fullmatch(pattern, reason) for reason in self.holds), f"{pattern} in {self.holds}"
        )
        seen = self.database.checkpoints(), self._row()

        def is_held() -> bool:
            """Whether there is another heartbeat, with the reason, and no checkpoint since the last one."""
            nonlocal seen
            (done, (_, beat)), (reason, now) = seen, self._row()
            if now == beat:
                return False
            seen = self.database.checkpoints(), (reason, now)
            return bool(reason) and seen[0] == done

        # The ranges in flight are completed first.
        await until(is_held, "a heartbeat with the reason and without a checkpoint")
        return seen[1][0]

    async def until_released(self) -> None:
        await until(lambda: isinstance(self.last, ThrottleEnded), "the end of the throttle")

    @property
    def last(self) -> Event | None:
        """The last event of a throttle."""
        found = [event for event in self.events if isinstance(event, Throttled | ThrottleEnded)]
        return found[-1] if found else None

    def _row(self) -> tuple[str, datetime]:
        ((reason, beat),) = self.database.query("SELECT throttle_reason, updated_at FROM rotator_rotation")
        return reason, beat


@asynccontextmanager
async def rotating(
    database: Database,
    options: RunOptions = OPTIONS,
    throttles: ThrottleSources | None = None,
    *,
    statement_seconds: float = 0.2,
) -> AsyncIterator[Watched]:
    """Rotate slowly while the block runs, then fast, and check that each row was written once."""
    watched = Watched(database, make_tickets(database, ROWS))
    slow_down(database, statement_seconds)
    target = RunTarget(
        label="tickets.Ticket.token",
        database="default",
        model="tickets.Ticket",
        path=("tickets_ticket",),
        key=("id",),
        columns=("token",),
        source=UUIDS,
        throttles=throttles or ThrottleSources(),
    )
    run = Run(server_of(database.url()), target, options, watched.events.append)
    rotation = asyncio.create_task(run.rotate())
    try:
        await until(lambda: rotation.done() or database.checkpoints() > 5, "some checkpoints")
        if rotation.done():
            rotation.result()
        yield watched
        speed_up(database)
        watched.stopped = await asyncio.wait_for(rotation, PATIENCE_SECONDS)
    finally:
        rotation.cancel()
    assert watched.stopped.status == "completed"
    watched.audit.assert_rotated_once()


def write_wal(database: Database, segments: int) -> None:
    for _ in range(segments):
        database.query("CREATE TABLE filler (); DROP TABLE filler; SELECT pg_switch_wal()")


# --- A replica --------------------------------------------------------------------------------------


async def test_a_replica_that_does_not_replay_and_then_is_gone_holds_the_rotation(
    database: Database, replica: OwnReplica
) -> None:
    options = replace(OPTIONS, max_lag_seconds=1.0, lag_of=("standby",))
    sources = ThrottleSources(replicas={"standby": on_replica(replica, database)})
    async with rotating(database, options, sources) as run:
        assert not run.holds
        with replica.connect() as standby:
            standby.execute("SELECT pg_wal_replay_pause()")
        stored = await run.until_held(r"replica lag of standby [1-9]\.\d s > 1\.0 s; ends below 0\.8 s")
        assert stored.startswith("replica lag of standby ")
        replica.stop()
        try:
            await run.until_held(r"replica lag of standby unknown: The .*server.*; ends when it can be read")
        finally:
            # It replays again after a restart.
            replica.start()
        await run.until_released()
    assert run.stopped is not None
    (throttled,) = run.stopped.throttled_seconds
    assert throttled == "replica lag of standby"
    ((seconds, reason, since),) = database.query(
        "SELECT throttled_seconds, throttle_reason, throttled_since FROM rotator_rotation"
    )
    assert seconds == pytest.approx(run.stopped.throttled_seconds[throttled], abs=0.5)
    assert (reason, since) == ("", None)


async def test_a_rotation_that_is_not_on_the_replica_is_unknown(
    database: Database, replica: OwnReplica
) -> None:
    now = [0.0]
    standby = Replica("standby", on_replica(replica, database), clock=lambda: now[0])
    standby.note_beat(datetime.now(UTC))
    now[0] = 2.0
    assert (await standby.read_lag(99)).value == 2.0
    now[0] = 4.0
    assert (await standby.read_lag(99)).problem == "the heartbeat of this process is late"
    standby.note_beat(datetime.now(UTC))
    assert (await standby.read_lag(99)).problem == "the row of the rotation is not there"
    await standby.close()


async def test_what_is_no_replica_with_a_heartbeat_is_refused(
    database: Database, replica: OwnReplica
) -> None:
    async def complaint(server: Server) -> str:
        standby = Replica("standby", server, clock=time.monotonic)
        async with connected(server_of(database.url())) as primary:
            with pytest.raises(OptionError) as raised:
                await standby.check(primary)
        return str(raised.value)

    assert await complaint(server_of(database.url())) == (
        "--lag-of standby is the server that the rotation writes to. Name a replica of it."
    )
    assert "cannot be read there: The server cannot be reached: " in await complaint(
        replace(server_of(database.url()), parameters={"host": "127.0.0.1", "port": "1"})
    )
    with new_role(database, ROLE):
        await asyncio.to_thread(wait_for_replay, database, replica)
        assert await complaint(server_of(replica.url(database.name, user=ROLE))) == (
            "--lag-of standby: the heartbeat in rotator_rotation cannot be read there: "
            "insufficient_privilege (42501): permission denied for table rotator_rotation."
        )


# --- The archiver and slots -------------------------------------------------------------------------


@pytest.fixture
def archiving(database: Database) -> Iterator[Callable[[str], None]]:
    """Change the command that archives WAL; it works again in the end."""

    def use(command: str) -> None:
        database.query(sql.SQL("ALTER SYSTEM SET archive_command = {}").format(command).as_string())
        database.query("SELECT pg_reload_conf()")

    ((segment,),) = database.query("SELECT pg_walfile_name(pg_current_wal_lsn())")
    write_wal(database, 1)
    is_archived = "SELECT 1 FROM pg_stat_archiver WHERE last_archived_wal >= %s"
    wait_until(lambda: database.query(is_archived, [segment]), "the segment is archived")
    yield use
    database.query("ALTER SYSTEM RESET archive_command")
    database.query("SELECT pg_reload_conf()")


async def test_a_stuck_archive_command_holds_the_rotation(
    database: Database, archiving: Callable[[str], None]
) -> None:
    options = replace(OPTIONS, max_unarchived_wal_bytes=2 * SEGMENT_BYTES)
    async with rotating(database, options) as run:
        archiving("false")
        write_wal(database, 4)
        await run.until_held(r"WAL to archive (48|64|80) MB > 32 MB; ends below 26 MB")
        archiving("true")
        await run.until_released()


async def test_an_abandoned_slot_holds_the_rotation(database: Database) -> None:
    name = f"abandoned_{database.name}"
    async with rotating(database, replace(OPTIONS, max_slot_wal_bytes=SEGMENT_BYTES)) as run:
        database.query("SELECT pg_create_physical_replication_slot(%s, true)", [name])
        try:
            write_wal(database, 3)
            await run.until_held(rf"WAL kept by slot {name} \(not active\) \d+ MB > 16 MB; ends below 13 MB")
        finally:
            database.query("SELECT pg_drop_replication_slot(%s)", [name])
        await run.until_released()


@pytest.mark.usefixtures("archiving")
async def test_slots_and_archives_that_cannot_be_read_are_refused_and_unknown(database: Database) -> None:
    database.query("REVOKE SELECT ON pg_stat_archiver, pg_replication_slots FROM PUBLIC")
    denied = "insufficient_privilege (42501): permission denied for view "
    with new_role(database, ROLE) as url:
        async with connected(server_of(url)) as control:
            with pytest.raises(OptionError, match=r"^--max-unarchived-wal: the WAL to archive is unknown: "):
                await check_archiving(control)
            with pytest.raises(OptionError, match=r"^--max-slot-wal: the WAL that slots keep is unknown: "):
                await check_slots(control)
            found = await reading(lambda: read_unarchived_wal(control))
            assert found.problem == f"{denied}pg_stat_archiver"
            assert (await reading(lambda: read_slot_wal(control))).problem == f"{denied}pg_replication_slots"
    database.query("SELECT pg_create_physical_replication_slot(%s)", [f"unused_{database.name}"])
    try:
        async with connected(server_of(database.url())) as control:
            assert (await reading(lambda: read_unarchived_wal(control))).problem == ""
            # A slot without a position keeps nothing.
            assert await reading(lambda: read_slot_wal(control)) == await read_slot_wal(control)
            assert (await read_slot_wal(control)).value == 0
            database.query("SELECT pg_stat_reset_shared('archiver')")
            found = await reading(lambda: read_unarchived_wal(control))
            assert found.problem == "pg_stat_archiver shows no archived segment"
            with pytest.raises(OptionError, match=r"shows no archived segment. Leave the option out, or "):
                await check_archiving(control)
    finally:
        database.query("SELECT pg_drop_replication_slot(%s)", [f"unused_{database.name}"])


# --- Callables --------------------------------------------------------------------------------------


async def test_a_callable_holds_the_rotation_while_it_returns_a_reason_or_raises(database: Database) -> None:
    answers: list[str | Exception | None] = [None]

    def call() -> str | None:
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    async with rotating(database, throttles=ThrottleSources(calls={"shop.errors": call})) as run:
        answers[0] = "errors 3 % > 1 %"
        await run.until_held(r"shop\.errors: errors 3 % > 1 %; ends when it returns None")
        answers[0] = ValueError("s3cret")
        await run.until_held(r"shop\.errors unknown: it raised ValueError; ends when it can be read")
        answers[0] = None
        await run.until_released()
    assert "s3cret" not in str(run.events)


async def test_a_callable_that_raises_before_the_start_is_refused(database: Database) -> None:
    def call() -> None:
        raise ValueError("s3cret")

    with pytest.raises(OptionError) as raised:
        async with rotating(database, throttles=ThrottleSources(calls={"shop.errors": call})):
            pass
    assert str(raised.value) == (
        'ROTATOR["THROTTLES"]: shop.errors was called, and it raised ValueError. Fix it, or remove it.'
    )
    assert database.number("SELECT count(*) FROM rotator_rotation") == 0


# --- The xmin horizon -------------------------------------------------------------------------------


@pytest.mark.slow
async def test_what_holds_the_xmin_horizon_is_named_within_ten_seconds(
    database: Database, replica: OwnReplica
) -> None:
    with replica.connect() as standby:
        standby.execute("ALTER SYSTEM SET hot_standby_feedback = on")
        standby.execute("SELECT pg_reload_conf()")
    reading_there = replica.connect(database.name)
    here = database.connect()
    try:
        for session in (here, reading_there):
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            session.execute("SELECT")
        with database.connect() as preparing:
            preparing.execute("BEGIN")
            preparing.execute("CREATE TABLE of_a_prepared_transaction ()")
            preparing.execute("PREPARE TRANSACTION 'forgotten'")
        async with rotating(database, statement_seconds=0.3) as run:
            began = time.monotonic()
            await until(lambda: len(named(run.events)) == 3, "all three holders", seconds=10)
            assert time.monotonic() - began < 10
        phrases = named(run.events)
        assert any(phrase.startswith(f"pid {here.info.backend_pid}, tests, idle in") for phrase in phrases)
        assert "prepared transaction forgotten" in phrases
        assert any(re.fullmatch(r"replica .*\(hot_standby_feedback\)", phrase) for phrase in phrases)
    finally:
        database.query("ROLLBACK PREPARED 'forgotten'")
        here.close()
        reading_there.close()
        with replica.connect() as standby:
            standby.execute("ALTER SYSTEM SET hot_standby_feedback = off")
            standby.execute("SELECT pg_reload_conf()")


def named(events: list[Event]) -> tuple[str, ...]:
    """Return the holders of the latest report."""
    found = [event for event in events if isinstance(event, HorizonHeld)]
    return found[-1].holders if found else ()
