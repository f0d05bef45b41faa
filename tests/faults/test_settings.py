"""Roles and databases whose settings are meant for the application's sessions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.harness import COMMAND, MANAGE, wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed
from tests.faults.roles import ROLE_SETTINGS

ROLE = "limited"


@pytest.fixture
def url(database: Database) -> Iterator[str]:
    """A DATABASE_URL of a role without any settings so far."""
    with new_role(database, ROLE, f"ALTER ROLE {ROLE} SUPERUSER") as url:
        yield url


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((ROLE_SETTINGS[0],), id="transaction_timeout", marks=pytest.mark.slow),
        pytest.param((ROLE_SETTINGS[2],), id="idle_session_timeout", marks=pytest.mark.slow),
        pytest.param(("statement_timeout = '60ms'",), id="statement_timeout", marks=pytest.mark.slow),
        pytest.param(ROLE_SETTINGS, id="all"),
    ],
)
def test_settings_of_the_role_do_not_reach_a_rotation(
    database: Database, rotations: Rotations, url: str, settings: tuple[str, ...]
) -> None:
    audit = make_tickets(database, 2000)
    slow_down(database, 0.2)
    # Longer than the timeouts, so that VACUUM is too.
    for of_role in (*settings, "vacuum_cost_delay = '100ms'", "vacuum_cost_limit = 30"):
        database.query(f"ALTER ROLE {ROLE} SET {of_role}")

    # With the default of 100 ms, the server can cancel a statement of a busy machine.
    finished = rotations.rotated(url, "--lock-timeout=2s")

    assert_completed(finished)
    assert "  retries      0\n" in finished.out
    assert "not vacuumed" not in finished.err
    audit.assert_rotated_once()


def test_a_role_that_is_read_only_by_default_can_rotate(
    database: Database, rotations: Rotations, url: str
) -> None:
    audit = make_tickets(database, 2000)
    database.query(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on")

    assert_completed(rotations.rotated(url))
    audit.assert_rotated_once()


def test_an_engine_with_an_option_and_a_password_that_is_replaced_during_the_run(
    database: Database, rotations: Rotations, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = make_tickets(database, 5000)
    slow_down(database, 0.1)
    vault = tmp_path / "vault"
    vault.write_text(database.server.password)
    monkeypatch.setenv("TEST_VAULT", str(vault))
    running = rotations.rotate(url, "--settings=tests.faults.vault.settings", "--batch=50")
    wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
    # The new password is given out first. Then the sessions of the old one are ended.
    vault.write_text("replaced")
    database.query(f"ALTER ROLE {ROLE} PASSWORD 'replaced'")
    ended = database.query(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
    speed_up(database)

    finished = running.wait()

    assert ended
    assert_completed(finished)
    assert "password" not in finished.err
    audit.assert_rotated_once()


@pytest.mark.parametrize("style", ["iso_8601", "sql_standard", "postgres_verbose"])
def test_sessions_with_another_style_of_intervals(
    database: Database, rotations: Rotations, url: str, style: str
) -> None:
    audit = make_tickets(database, 200)
    database.query(f"ALTER ROLE {ROLE} SET IntervalStyle = {style}")

    assert_completed(rotations.rotated(url))
    listed = rotations.start_on(url, *MANAGE, "rotations").wait()

    assert listed.status == 0, listed.err
    assert "completed" in listed.out
    audit.assert_rotated_once()


def test_sessions_whose_times_django_cannot_read(database: Database, rotations: Rotations, url: str) -> None:
    audit = make_tickets(database, 200)
    database.query(f"ALTER ROLE {ROLE} SET DateStyle = German")

    assert_completed(rotations.rotated(url, "--prove"))
    audit.assert_rotated_once()
    number = database.number("SELECT id FROM rotator_rotation")
    for command in (
        ("rotations",),
        ("verify_rotation", f"{number}"),
        ("find_secrets",),
        ("find_secrets", f"--copies-of={number}"),
        # It reads the times of the rows.
        (COMMAND, "--restart", "--generator=tests.shop.generators.uuid_for_row"),
    ):
        refused = rotations.start_on(url, *MANAGE, *command).wait()
        assert refused.status == 1
        assert refused.complaint == (
            "Django cannot read the times of the database 'default', whose sessions have DateStyle = German, "
            "DMY and IntervalStyle = postgres. Set DateStyle = ISO and IntervalStyle = postgres for the "
            "role, the database or the connection."
        )


def test_a_statement_timeout_that_is_too_short_for_djangos_own_session(
    database: Database, rotations: Rotations, url: str
) -> None:
    audit = make_tickets(database, 200)
    database.query(f"ALTER ROLE {ROLE} SET statement_timeout = '200ms'")

    with database.connect() as other:
        # Each read of these tables waits for longer than the timeout.
        other.execute("BEGIN")
        other.execute("LOCK TABLE django_migrations, rotator_rotation")
        for command in (COMMAND, "rotations"):
            refused = rotations.start_on(url, *MANAGE, command).wait()
            assert refused.status == 1
            assert refused.complaint == (
                "The server canceled a statement of Django's own session on the database 'default': "
                "canceling statement due to statement timeout. Raise the statement_timeout of the role, the "
                "database or the connection."
            )
        other.execute("ROLLBACK")
    assert audit.written() == 0
