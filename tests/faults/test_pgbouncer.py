"""A rotation through PgBouncer in transaction mode, where no two transactions need share a connection."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from core.own_server import OwnServer
from core.ports import unused_port
from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed
from tests.faults.roles import ROLE_SETTINGS, documented_grants

ROWS = int(os.environ.get("ROTATOR_TEST_ROWS", "20000"))


def _program() -> str | None:
    return shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))


@pytest.fixture
def bouncer_port(server: OwnServer) -> Iterator[int]:
    program = _program()
    if program is None:
        pytest.skip("PgBouncer is not installed")
    folder = server.folder / "bouncer"
    folder.mkdir()
    port = unused_port()
    users = folder / "users.txt"
    users.write_text(f'"postgres" "{server.password}"\n')
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n"
        "[pgbouncer]\npool_mode = transaction\ndefault_pool_size = 5\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {users}\n"
        f"logfile = {folder / 'log'}\npidfile = {folder / 'pid'}\n"
    )
    for path in (users, configuration):
        path.chmod(0o644)
    server.account.own(folder)
    started = server.account.run([program, "--daemon", configuration])
    assert started.returncode == 0, started.stdout
    pid_file = folder / "pid"
    # It is empty for a moment.
    wait_until(lambda: pid_file.exists() and pid_file.read_text().strip(), "PgBouncer has started")
    pid = int(pid_file.read_text())
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not _is_alive(pid), "PgBouncer has ended")
        shutil.rmtree(folder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A connection that no client waits for.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and ") Z " in stat.read_text())


def test_killed_and_resumed_through_pgbouncer(
    database: Database, rotations: Rotations, bouncer_port: int
) -> None:
    audit = make_tickets(database, ROWS)
    url = database.url(port=bouncer_port)
    slow_down(database, 0.05)
    running = rotations.rotate(url, "--batch=100")
    wait_until(lambda: database.checkpoints() >= 40, "some checkpoints")
    running.send(signal.SIGKILL)
    running.wait()
    assert audit.changed() < ROWS
    speed_up(database)

    finished = rotations.rotated(url, "--concurrency=8")

    assert_completed(finished)
    assert " resumes: " in finished.err
    audit.assert_rotated_once()


def test_settings_of_the_role_do_not_reach_a_rotation_through_pgbouncer(
    database: Database, rotations: Rotations, bouncer_port: int
) -> None:
    audit = make_tickets(database, 5000)
    # Longer than any statement of the application, and than a VACUUM.
    slow_down(database, 0.1)
    # A transaction is idle until it has settings of its own.
    settings = [setting for setting in ROLE_SETTINGS if not setting.startswith("idle_in_transaction")]
    settings.append("transaction_timeout = '90ms'")
    for setting in (*settings, "statement_timeout = '60ms'", "default_transaction_read_only = on"):
        database.query(f"ALTER ROLE postgres IN DATABASE {database.name} SET {setting}")
    database.query(f"ALTER ROLE postgres IN DATABASE {database.name} SET vacuum_cost_delay = '100ms'")
    database.query(f"ALTER ROLE postgres IN DATABASE {database.name} SET vacuum_cost_limit = 1")

    finished = rotations.rotated(database.url(port=bouncer_port), "--batch=1000")

    assert_completed(finished)
    assert "the role's statement_timeout (60ms) cancelled VACUUM" in finished.err
    audit.assert_rotated_once()
    with psycopg.connect(database.url(port=bouncer_port, application_name="tests")) as other:
        # It can be a session that the rotation had.
        assert other.execute("SHOW statement_timeout").fetchone() == ("60ms",)


def test_a_role_is_assumed_in_each_transaction_through_pgbouncer(
    database: Database, rotations: Rotations, bouncer_port: int
) -> None:
    audit = make_tickets(database, 5000)
    with new_role(database, "assumed", *documented_grants("assumed")):
        finished = rotations.rotated(database.url(port=bouncer_port, assume_role="assumed"), "--batch=500")

        # Whether other sessions keep the role cannot be told: Django itself sets it for the session.
        assert_completed(finished)
    audit.assert_rotated_once()


@pytest.mark.slow
def test_who_holds_a_lock_is_named_through_pgbouncer(
    database: Database, rotations: Rotations, bouncer_port: int
) -> None:
    audit = make_tickets(database, 5000)
    with psycopg.connect(database.url(application_name="psql")) as holder:
        holder.execute("SELECT FROM tickets_ticket WHERE id = 1 FOR UPDATE")
        running = rotations.rotate(database.url(port=bouncer_port), "--batch=500", "--concurrency=2")
        named = f"hold: pid {holder.info.backend_pid}, psql, idle in transaction for "
        wait_until(lambda: named in running.err, "the holder is named")
        holder.rollback()
    assert_completed(running.wait())
    audit.assert_rotated_once()
