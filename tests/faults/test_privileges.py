"""A role with no more rights than the operating guide tells people to grant."""

import signal
from collections.abc import Iterator

import pytest

from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed
from tests.faults.roles import documented_grants

ROLE = "rotating"
ROWS = 5000


@pytest.fixture
def url(database: Database) -> Iterator[str]:
    """A DATABASE_URL of a role that has been granted what the guide says, and nothing else."""
    with new_role(database, ROLE, *documented_grants(ROLE)) as url:
        yield url


def test_the_documented_grants_are_enough_to_rotate_and_to_take_over(
    database: Database, rotations: Rotations, url: str
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(url, "--batch=20")
    wait_until(lambda: database.checkpoints() > 10, "some checkpoints")
    running.send(signal.SIGKILL)
    running.wait()
    # A frozen one keeps its locks, so that its backends have to be ended.
    running = rotations.rotate(url, "--batch=20")
    done = database.checkpoints()
    wait_until(lambda: database.checkpoints() > done + 10, "more checkpoints")
    running.send(signal.SIGSTOP)
    speed_up(database)

    assert_completed(rotations.rotated(url, "--take-over"))
    audit.assert_rotated_once()
    assert_completed(rotations.rotated(url, "--restart"))


def test_sessions_of_another_role_that_this_one_cannot_end_are_named(
    database: Database, rotations: Rotations, url: str
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    frozen = rotations.rotate(database.url(), "--batch=20")
    wait_until(lambda: database.checkpoints() > 10, "some checkpoints")
    frozen.send(signal.SIGSTOP)
    speed_up(database)

    finished = rotations.rotated(url, "--take-over")

    assert finished.status == 1
    assert "Traceback" not in finished.err
    assert "that this role cannot terminate, hold its advisory lock" in finished.err
    frozen.send(signal.SIGKILL)
    assert_completed(rotations.rotated(url, "--take-over"))
    audit.assert_rotated_once()


def test_without_the_right_to_update_the_column(database: Database, rotations: Rotations, url: str) -> None:
    audit = make_tickets(database, ROWS)
    database.query(f"REVOKE UPDATE (token) ON tickets_ticket FROM {ROLE}")

    finished = rotations.rotated(url)

    assert finished.status == 1
    assert "Traceback" not in finished.err
    assert finished.complaint == (
        "This role lacks a privilege that the rotation needs. Run: "
        f'GRANT UPDATE ("token") ON "public"."tickets_ticket" TO {ROLE};'
    )
    assert audit.written() == 0

    database.query(f"GRANT UPDATE (token) ON tickets_ticket TO {ROLE}")
    assert_completed(rotations.rotated(url))
    audit.assert_rotated_once()


def test_the_right_to_read_some_columns_is_refused_before_the_first_row(
    database: Database, rotations: Rotations, url: str
) -> None:
    """The last scan reads ``xmin``, which needs the right to read the table."""
    audit = make_tickets(database, ROWS)
    database.query(f"REVOKE SELECT ON tickets_ticket FROM {ROLE}")
    database.query(f"GRANT SELECT (id, token) ON tickets_ticket TO {ROLE}")

    finished = rotations.rotated(url)

    assert finished.status == 1
    assert finished.complaint.endswith(f'Run: GRANT SELECT ON "public"."tickets_ticket" TO {ROLE};')
    assert audit.written() == 0


@pytest.mark.parametrize(
    ("revoked", "grant"),
    [
        (
            "UPDATE (token) ON tickets_ticket",
            'GRANT UPDATE ("token") ON "public"."tickets_ticket" TO rotating;',
        ),
        ("INSERT ON rotator_completedrange", "GRANT INSERT ON rotator_completedrange TO rotating;"),
        ("SELECT, UPDATE ON rotator_rotation", "GRANT SELECT, UPDATE ON rotator_rotation TO rotating;"),
        ("SELECT ON django_migrations", "GRANT SELECT ON django_migrations TO rotating;"),
    ],
)
def test_a_dry_run_without_a_privilege_says_what_to_grant(
    database: Database, rotations: Rotations, url: str, revoked: str, grant: str
) -> None:
    make_tickets(database, 100)
    database.query(f"REVOKE {revoked} FROM {ROLE}")

    refused = rotations.rotated(url, "--dry-run")

    assert refused.status == 1
    sentence = "This role lacks a privilege that the rotation needs. Run: "
    assert refused.complaint == sentence + grant
    database.query(refused.complaint.removeprefix(sentence))
    assert rotations.rotated(url, "--dry-run").status == 0


def test_row_level_security_that_hides_rows_is_refused(
    database: Database, rotations: Rotations, url: str
) -> None:
    audit = make_tickets(database, ROWS)
    database.query("ALTER TABLE tickets_ticket ENABLE ROW LEVEL SECURITY")
    database.query("CREATE POLICY half ON tickets_ticket USING (id % 2 = 0)")

    finished = rotations.rotated(url)

    assert finished.status == 1
    assert finished.complaint.startswith("Cannot rotate public.tickets_ticket: row-level security hides rows")
    assert audit.written() == 0
    # Whom no policy concerns may go on.
    assert_completed(rotations.rotated(database.url()))
    audit.assert_rotated_once()
