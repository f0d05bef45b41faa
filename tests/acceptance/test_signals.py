"""What Ctrl-C, a service manager and a dropped connection send, to a run that is in the middle of it."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from rotator.models import Rotation
from rotator.runner.controller import MIN_ROWS
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import (
    COMMAND,
    MANAGE,
    Commands,
    backends,
    checkpoints,
    url_of,
    wait_for_checkpoints,
    wait_until,
)

ROWS = 10_000
CHECKPOINTS = 20
# Far less than what the process was doing would take, and enough on a busy machine.
PROMPT_SECONDS = 30.0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_drains_and_the_advised_command_resumes(
    commands: Commands, sent: signal.Signals, status: int
) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    running = commands.start("--batch", "50")
    wait_for_checkpoints(CHECKPOINTS)
    running.send(sent)
    finished = running.wait()

    assert finished.status == status
    rows = audit.assert_checkpoints_and_tokens_agree()
    assert CHECKPOINTS * MIN_ROWS <= rows < ROWS
    rotation = Rotation.objects.get()
    assert (rotation.status, rotation.rows_done) == ("interrupted", rows)
    assert finished.summary[0] == (
        f"Interrupted: rotation {rotation.pk} of tickets.Ticket.token is unfinished; "
        f"{rows:,} of {ROWS:,} rows have a new value."
    )
    assert finished.summary[1] == f"Stopped by {sent.name}."
    assert finished.resume_command[1:] == ["manage.py", COMMAND, "--batch", "50"]
    shown = commands.start(str(rotation.pk), program=(*MANAGE, "rotations")).wait().out
    assert re.search(rf"^  reason +stopped by {sent.name}$", shown, re.MULTILINE)
    assert "error" not in shown

    speed_up()
    resumed = commands.go_on(finished, "--batch", "3000", "--concurrency", "2")

    assert resumed.status == 0, resumed.err
    audit.assert_rotated()
    assert Rotation.objects.count() == 1


@pytest.mark.slow
def test_a_second_signal_rolls_back_what_is_in_flight(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    assert commands.run("--stop-after", "5000").status == 0
    # Slices of a range of 15,000 rows take half a minute, and less than each and all of them may.
    slow_down(3)
    running = commands.start("--batch", "15000", "--lock-timeout", "2s")
    wait_until(
        lambda: backends("query LIKE '%UPDATE%' AND state = 'active'") >= 2, "two ranges are being written"
    )
    running.send(signal.SIGINT)
    wait_until(lambda: "SIGINT: draining" in running.err, "the run drains")
    asked_at = time.monotonic()
    running.send(signal.SIGINT)
    finished = running.wait()

    assert time.monotonic() - asked_at < PROMPT_SECONDS
    assert finished.status == 130
    assert "Traceback" not in finished.err
    assert audit.assert_checkpoints_and_tokens_agree() == 5000
    assert Rotation.objects.get().status == "interrupted"
    assert finished.resume_command[1:] == ["manage.py", COMMAND, "--batch", "15000", "--lock-timeout", "2s"]

    speed_up()
    assert commands.go_on(finished).status == 0
    audit.assert_rotated()


@contextmanager
def _locked(ticket: int) -> Iterator[None]:
    with psycopg.connect(url_of()) as other:
        other.execute("SELECT FROM tickets_ticket WHERE id = %s FOR UPDATE", (ticket,))
        yield
        other.rollback()


def test_a_signal_does_not_wait_for_a_row_that_somebody_else_holds(commands: Commands) -> None:
    audit = audited_tickets(5000)
    with _locked(2001):
        running = commands.start("--batch", "500")
        wait_for_checkpoints(9)
        wait_until(lambda: backends("wait_event_type = 'Lock'"), "the last range waits for the row")
        asked_at = time.monotonic()
        running.send(signal.SIGTERM)
        finished = running.wait()

    assert time.monotonic() - asked_at < PROMPT_SECONDS
    assert finished.status == 143
    assert audit.assert_checkpoints_and_tokens_agree() == 4500
    assert commands.go_on(finished).status == 0
    audit.assert_rotated()


def test_a_signal_while_the_bound_awaits_older_writers_is_prompt(commands: Commands) -> None:
    audit = audited_tickets(1000)
    with psycopg.connect(url_of()) as older:
        older.execute("UPDATE tickets_ticket SET title = 'held' WHERE id = 1")
        running = commands.start()
        wait_until(lambda: "waiting for 1 transaction" in running.err, "the run waits for it")
        asked_at = time.monotonic()
        running.send(signal.SIGINT)
        finished = running.wait()
        older.rollback()

    assert time.monotonic() - asked_at < PROMPT_SECONDS
    assert finished.status == 130
    assert "Traceback" not in finished.err
    assert audit.assert_checkpoints_and_tokens_agree() == 0
    assert Rotation.objects.get().status == "interrupted"
    assert commands.run().status == 0
    assert audit.changed() == 1000


def test_under_nohup_a_hang_up_changes_nothing(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    running = commands.start("--batch", "50", program=("nohup", *MANAGE, COMMAND))
    wait_for_checkpoints(5)
    running.send(signal.SIGHUP)
    assert checkpoints() < ROWS / 50
    speed_up()
    finished = running.wait()

    assert finished.status == 0
    assert finished.summary[0].startswith("Completed: ")
    audit.assert_rotated()


def test_ctrl_c_ends_the_following_and_not_the_rotation(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.2)
    running = commands.start("--batch", "20")
    wait_for_checkpoints(5)
    following = commands.start(str(Rotation.objects.get().pk), "--follow", program=(*MANAGE, "rotations"))
    wait_until(lambda: following.out.startswith("running: "), "it says how far it is")
    following.send(signal.SIGINT)
    finished = following.wait()
    assert (finished.status, finished.err.strip()) == (130, "")
    assert running.is_alive
    speed_up()
    assert running.wait().status == 0
    audit.assert_rotated()
