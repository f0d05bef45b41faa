"""A server that crashes, goes away, is full, is busy or refuses to write."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from core.embedded.account import Account
from core.own_server import OwnReplica, OwnServer
from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed

ROWS = 8000
CRASHES = 3
SETTLED_SECONDS = 0.1
# Preallocated WAL is at least 80 MB, and a row takes half a kilobyte.
ROWS_THAT_FILL_THE_WAL = 250_000
ROWS_THAT_FILL_THE_DISK = 20_000
ROOM_FOR_WAL_KILOBYTES = 4096
PLENTY_KILOBYTES = 4 << 20
_CP = "/bin/cp"
_MOUNT = "/bin/mount"
_UMOUNT = "/bin/umount"


def test_crashes_that_lose_acknowledged_commits(
    server: OwnServer, database: Database, rotations: Rotations
) -> None:
    # Nothing but the heartbeat's commit, once a second, takes the ranges' to the disk.
    with server.configured(wal_writer_delay="10s", wal_writer_flush_after="100MB"):
        audit = make_tickets(database, ROWS)
        slow_down(database, 0.1)
        running = rotations.rotate(database.url(), "--batch=50")
        lost = 0
        for _ in range(CRASHES):
            done = database.checkpoints()
            wait_until(
                lambda: database.checkpoints() > done + 20,  # noqa: B023 - over before the next
                "more checkpoints",
            )
            # Frozen, it commits nothing between the count and the crash.
            running.send(signal.SIGSTOP)
            time.sleep(SETTLED_SECONDS)
            acknowledged = database.checkpoints()
            server.restart("immediate")
            lost += acknowledged - database.checkpoints()
            running.send(signal.SIGCONT)
        speed_up(database)
        finished = running.wait()

        assert lost > 0, "no crash has lost anything, and the test shows nothing"
        assert_completed(finished)
        assert finished.err.count("the server is reachable again after ") == CRASHES
        audit.assert_rotated_once()


def test_away_for_a_moment(
    server: OwnServer, database: Database, rotations: Rotations, tmp_path: Path
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(), "--batch=50", f"--report={tmp_path / 'report'}")
    wait_until(lambda: database.checkpoints() > 20, "some checkpoints")
    server.stop()
    wait_until(lambda: "outage: " in running.err, "it is noticed")
    server.start()
    speed_up(database)
    finished = running.wait()

    assert_completed(finished)
    assert "the server is reachable again after " in finished.err
    assert "  unreachable  " in finished.out
    assert json.loads((tmp_path / "report").read_text())["outage_seconds"] > 0
    audit.assert_rotated_once()


def test_away_for_longer_than_the_budget(
    server: OwnServer, database: Database, rotations: Rotations, tmp_path: Path
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(
        database.url(), "--batch=50", "--outage-budget=2s", f"--report={tmp_path / 'report'}"
    )
    wait_until(lambda: database.checkpoints() > 20, "some checkpoints")
    away_at = time.monotonic()
    server.stop()
    finished = running.wait()
    waited = time.monotonic() - away_at
    server.start()

    # Without the option, it would wait for minutes.
    assert 2 <= waited < 60
    assert finished.status == 1
    assert "Traceback" not in finished.err
    assert finished.out.splitlines()[0].startswith("Interrupted: ")
    assert finished.out.splitlines()[1].startswith("The server cannot be reached: ")
    report = json.loads((tmp_path / "report").read_text())
    assert report["status"] == "interrupted"
    assert report["error"] == finished.out.splitlines()[1]
    audit.assert_each_row_written_at_most_once()
    assert 0 < audit.changed() < ROWS

    speed_up(database)
    assert_completed(rotations.rotated(database.url()))
    audit.assert_rotated_once()


@contextmanager
def _taken(server: OwnServer, *, but: int) -> Iterator[None]:
    """Let others have all connections but so many."""
    with ExitStack() as others:
        taken = []
        while True:
            try:
                taken.append(server.connect())
            except psycopg.OperationalError:
                break
        for connection in taken[:but]:
            connection.close()
        for connection in taken[but:]:
            others.enter_context(connection)
        yield


@pytest.mark.parametrize(
    ("but", "sentence"),
    [
        (0, "too many clients already"),
        (5, "Cannot open 8 connections for --concurrency 4: the server allows "),
    ],
)
def test_too_few_connections_are_left(
    server: OwnServer, database: Database, rotations: Rotations, but: int, sentence: str
) -> None:
    with server.configured(max_connections="12"):
        audit = make_tickets(database, 1000)
        with _taken(server, but=but):
            finished = rotations.rotated(database.url())

        assert finished.status == 1
        assert sentence in finished.complaint
        assert audit.written() == 0


def test_a_role_that_may_not_have_so_many_connections(database: Database, rotations: Rotations) -> None:
    audit = make_tickets(database, 1000)
    grant = "GRANT ALL ON ALL TABLES IN SCHEMA public TO ordinary"
    with new_role(database, "ordinary", grant, "ALTER ROLE ordinary CONNECTION LIMIT 4") as url:
        started_at = time.monotonic()
        finished = rotations.rotated(url, "--outage-budget=2s")
        took = time.monotonic() - started_at

        assert finished.status == 1
        assert "Traceback" not in finished.err
        assert finished.err.splitlines()[-1] == (
            "CommandError: Cannot open 4 more connections: the server accepts no more. Close some, or raise "
            "the limit of the server, the database or the role."
        )
        assert took < 60
        assert audit.written() == 0

        running = rotations.rotate(url)
        time.sleep(2)
        assert running.is_alive
        assert audit.written() == 0
        database.query("ALTER ROLE ordinary CONNECTION LIMIT 20")
        assert_completed(running.wait())
        audit.assert_rotated_once()


def test_a_synchronous_standby_that_is_not_there(
    server: OwnServer, database: Database, rotations: Rotations
) -> None:
    audit = make_tickets(database, ROWS)
    with server.configured(synchronous_standby_names="away"):
        refused = rotations.rotated(database.url())

        assert refused.status == 1
        assert refused.complaint == (
            "Each commit waits for a synchronous standby that does not confirm it "
            "(synchronous_standby_names is 'away'). Start the standby, or change that setting."
        )
        assert database.number("SELECT count(*) FROM rotator_rotation") == 0

    assert_completed(rotations.rotated(database.url()))
    audit.assert_rotated_once()


def test_a_synchronous_standby_that_goes_away(
    server: OwnServer, database: Database, rotations: Rotations
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(), "--batch=50", "--outage-budget=5s")
    wait_until(lambda: database.checkpoints() > 20, "some checkpoints")
    with server.configured(synchronous_standby_names="away"):
        finished = running.wait()

    assert finished.status == 1
    assert finished.out.splitlines()[1].startswith("Each commit waits for a synchronous standby")
    speed_up(database)
    assert_completed(rotations.rotated(database.url()))
    audit.assert_rotated_once()


def test_a_standby(database: Database, replica: OwnReplica, rotations: Rotations) -> None:
    finished = rotations.rotated(replica.url(database.name))

    assert finished.status == 1
    assert finished.complaint == (
        "Cannot rotate: the server is read-only. Connect to the primary, then run the same command again."
    )


@pytest.mark.parametrize("kind", ["connection", "database"])
def test_a_primary_whose_sessions_are_read_only(database: Database, rotations: Rotations, kind: str) -> None:
    audit = make_tickets(database, 1000)
    setting, url = "default_transaction_read_only", database.url()
    if kind == "connection":
        url = database.url(options=f"-c {setting}=on")
    else:
        database.query(f"ALTER DATABASE {database.name} SET {setting} = on")

    finished = rotations.rotated(url)

    assert finished.status == 1
    assert finished.complaint == (
        "Cannot rotate: the session is read-only, because default_transaction_read_only is on for the "
        "connection, the database or the server. Turn it off, then run the same command again."
    )
    assert audit.written() == 0
    assert database.number("SELECT count(*) FROM rotator_rotation") == 0


def test_a_server_that_is_read_only_for_a_while_is_an_outage(
    database: Database, rotations: Rotations
) -> None:
    audit = make_tickets(database, 5000)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(), "--batch=50")
    wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
    database.query("SET default_transaction_read_only = off")
    database.query("ALTER SYSTEM SET default_transaction_read_only = on")
    database.query("SELECT pg_reload_conf()")
    try:
        wait_until(lambda: "the server is read-only" in running.err, "it is noticed")
    finally:
        database.query("ALTER SYSTEM RESET default_transaction_read_only")
        database.query("SELECT pg_reload_conf()")
    speed_up(database)

    assert_completed(running.wait())
    audit.assert_rotated_once()


@contextmanager
def _mounted(folder: Path, account: Account, *, kilobytes: int) -> Iterator[None]:
    """Let an empty folder be a file system of its own with little room."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system of its own")
    options = f"size={kilobytes}k,mode=0700,uid={account.uid},gid={account.gid}"
    mounted = subprocess.run(
        [_MOUNT, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this root may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run([_UMOUNT, folder], check=False)


@pytest.fixture
def small_disk(server: OwnServer) -> Iterator[Path]:
    """A folder with room for a table of so many tickets and a half."""
    folder = server.folder / "small"
    folder.mkdir()
    with ExitStack() as stack:
        stack.callback(folder.rmdir)
        stack.enter_context(_mounted(folder, server.account, kilobytes=2200))
        with server.connect() as admin:
            admin.execute(f"CREATE TABLESPACE small LOCATION '{folder}'".encode())
        yield folder
        with server.connect() as admin:
            admin.execute("DROP TABLESPACE small")


@contextmanager
def _small_wal_disk(server: OwnServer) -> Iterator[Path]:
    """Let the server's WAL be on a disk with hardly any room left; it ends stopped, all as before."""
    wal, aside, folder = (server.folder / name for name in ("data/pg_wal", "data/wal_aside", "wal"))
    folder.mkdir()
    with ExitStack() as stack:
        stack.callback(folder.rmdir)
        # Before the server is stopped: without the right to mount, it stays as it was.
        stack.enter_context(_mounted(folder, server.account, kilobytes=PLENTY_KILOBYTES))
        server.stop()
        wal.rename(aside)
        try:
            _copy(aside, folder / "pg_wal")
            used = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) // 1024
            _resize(folder, kilobytes=used + ROOM_FOR_WAL_KILOBYTES)
            wal.symlink_to(folder / "pg_wal")
            server.start()
            yield folder
            server.stop()
            wal.unlink()
            _copy(folder / "pg_wal", wal)
        finally:
            if not wal.exists():
                aside.rename(wal)
            shutil.rmtree(aside, ignore_errors=True)


def _resize(folder: Path, *, kilobytes: int) -> None:
    subprocess.run([_MOUNT, "-o", f"remount,size={kilobytes}k", folder], check=True)


def _copy(source: Path, target: Path) -> None:
    subprocess.run([_CP, "--archive", source, target], check=True)


@pytest.mark.slow
def test_no_room_for_wal(server: OwnServer, database: Database, rotations: Rotations, tmp_path: Path) -> None:
    # Without the second it would come back at once, having made room for itself.
    with server.configured(max_wal_size="4GB", restart_after_crash="off"):
        audit = make_tickets(database, ROWS_THAT_FILL_THE_WAL)
        database.query("CHECKPOINT")
        with _small_wal_disk(server) as folder:
            finished = rotations.rotated(
                database.url(), "--outage-budget=3s", f"--report={tmp_path / 'report'}"
            )
            _resize(folder, kilobytes=PLENTY_KILOBYTES)
            server.start()

            assert "No space left on device" in server.log()
            assert finished.status == 1
            assert "Traceback" not in finished.err
            assert "outage: " in finished.err
            assert finished.out.splitlines()[1].startswith("The ")
            assert json.loads((tmp_path / "report").read_text())["status"] == "interrupted"
            audit.assert_each_row_written_at_most_once()
            assert 0 < audit.changed() < ROWS_THAT_FILL_THE_WAL
            assert_completed(rotations.rotated(database.url()))
            audit.assert_rotated_once()
        server.start()


@pytest.mark.slow
@pytest.mark.usefixtures("small_disk")
def test_a_full_disk(database: Database, rotations: Rotations, tmp_path: Path) -> None:
    audit = make_tickets(database, ROWS_THAT_FILL_THE_DISK)
    database.query("ALTER TABLE tickets_ticket SET TABLESPACE small")

    finished = rotations.rotated(database.url(), "--batch=200", f"--report={tmp_path / 'report'}")
    written = audit.written()
    audit.assert_each_row_written_at_most_once()
    database.query("ALTER TABLE tickets_ticket SET TABLESPACE pg_default")

    assert finished.status == 1
    assert "Traceback" not in finished.err
    sentence = "Cannot rotate: the server's disk is full. Free some space, then run the same command again."
    assert finished.out.splitlines()[1] == sentence
    assert json.loads((tmp_path / "report").read_text())["error"] == sentence
    assert 0 < written < ROWS_THAT_FILL_THE_DISK
    assert database.status() == "failed"

    assert_completed(rotations.rotated(database.url()))
    audit.assert_rotated_once()


def test_an_outage_ticks_and_shows_the_budget_that_is_left(
    server: OwnServer, database: Database, rotations: Rotations
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    options = ("--batch=50", "--outage-budget=120s")
    running = rotations.rotate(database.url(), *options, "--progress=json")
    wait_until(lambda: database.checkpoints() > 20, "some checkpoints")
    server.stop()
    wait_until(lambda: running.out.count('"state": "outage"') >= 3, "the outage ticks")
    server.start()
    speed_up(database)
    finished = running.wait()

    events = [json.loads(line) for line in finished.out.splitlines()]
    outage = [event for event in events if event.get("state") == "outage"]
    left = [event["outage_left_seconds"] for event in outage]
    assert left == sorted(left, reverse=True)
    assert 60 < left[-1] < left[0] < 120
    assert {event["eta_seconds"] for event in outage} == {None}
    assert events[-1]["status"] == "completed"
    audit.assert_rotated_once()
