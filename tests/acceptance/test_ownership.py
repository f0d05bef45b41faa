"""Two processes, one rotation: one of them writes, whatever state the other one is in."""

import re
import signal
import socket
import time
from datetime import UTC, datetime

import pytest

from rotator.models import Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import Commands, Finished, Running, wait_for_checkpoints, wait_until

ROWS = 20_000
# What the owner's heartbeat is watched for, what its backends' locks are waited for, and a slow machine.
WATCHED_SECONDS = 10.0
TAKEN_OVER_SECONDS = 30.0


def _started_slowly(commands: Commands, *options: str) -> Running:
    """Start a run that would take a minute."""
    slow_down(0.2)
    running = commands.start("--batch", "100", "--concurrency", "1", *options)
    wait_for_checkpoints(3)
    return running


def _assert_superseded(finished: Finished) -> None:
    """It ended by itself, and neither claims to know how the rotation stands nor to be needed for it."""
    rotation = Rotation.objects.get()
    assert finished.status == 1
    assert re.fullmatch(
        r"Superseded: this run gave [0-9,]+ rows of tickets.Ticket.token a new value\. "
        rf"Another process owns rotation {rotation.pk} now\.",
        finished.summary[0],
    )
    assert finished.summary[1] == (
        "Another process has taken this rotation over; this one stopped and has written nothing since."
    )
    assert "Resume with:" not in finished.out
    assert "Traceback" not in finished.err


def test_of_two_that_start_at_the_same_time_one_works(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    # It is not completed before the other one has seen its heartbeat change.
    slow_down(0.2)
    both = [commands.start("--batch", "50") for _ in range(2)]
    wait_until(lambda: not all(running.is_alive for running in both), "one of them gives way")
    speed_up()
    (loser,) = [running for running in both if not running.is_alive]
    (winner,) = [running for running in both if running is not loser]
    refused, completed = loser.wait(), winner.wait()

    rotation = Rotation.objects.get()
    assert (refused.status, completed.status) == (1, 0)
    assert not refused.out
    *_, sentence = refused.err.splitlines()
    assert sentence.startswith(
        f"CommandError: Rotation {rotation.pk} of tickets.Ticket.token is being worked on by "
    )
    for fact in (socket.gethostname(), f"(pid {winner.pid})", "--take-over"):
        assert fact in sentence
    assert "Traceback" not in refused.err
    audit.assert_rotated()


def test_a_rotation_that_is_finished_while_it_is_watched_is_not_begun_anew(commands: Commands) -> None:
    audit = audited_tickets(100)
    rotation = Rotation.objects.create(
        target="tickets.Ticket.token",
        table_name="public.tickets_ticket",
        database="default",
        started_xid=1,
        version="0",
        owner_user="somebody",
        owner_host="elsewhere",
        owner_pid=42,
    )
    late = commands.start()
    wait_until(lambda: "watching its heartbeat" in late.err, "the owner is watched")
    Rotation.objects.update(status="completed", finished_at=datetime.now(UTC))
    finished = late.wait()

    assert finished.status == 1
    assert not finished.out
    assert finished.err.splitlines()[-1] == (
        f"CommandError: Rotation {rotation.pk} of tickets.Ticket.token was finished by somebody on elsewhere "
        "(pid 42) just now. To rotate the same rows again, use --restart."
    )
    assert Rotation.objects.count() == 1
    audit.assert_untouched()


@pytest.mark.slow
def test_an_owner_that_is_taken_over_ends_by_itself(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    first = _started_slowly(commands)
    second = commands.start("--take-over", "--batch", "500")
    superseded = first.wait()
    speed_up()
    completed = second.wait()

    _assert_superseded(superseded)
    assert completed.status == 0, completed.err
    assert Rotation.objects.get().generation == 2
    audit.assert_rotated()


@pytest.mark.slow
def test_a_frozen_owner_is_taken_over_and_writes_no_more(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    first = _started_slowly(commands)
    first.send(signal.SIGSTOP)
    second = commands.start("--batch", "1000", "--stop-after", "10000")
    wait_until(lambda: "watching its heartbeat" in second.err, "the owner is watched")
    watched_at = time.monotonic()
    wait_until(
        lambda: Rotation.objects.filter(owner_pid=second.pid, generation=2).exists(),
        "the frozen owner is taken over",
        seconds=TAKEN_OVER_SECONDS + 5,
    )
    taken_over_after = time.monotonic() - watched_at
    speed_up()
    first.send(signal.SIGCONT)
    assert second.wait().status == 0
    superseded = first.wait()

    assert WATCHED_SECONDS - 1 < taken_over_after < TAKEN_OVER_SECONDS
    _assert_superseded(superseded)
    audit.assert_checkpoints_and_tokens_agree()
    assert commands.run().status == 0
    audit.assert_rotated()


@pytest.mark.slow
def test_a_frozen_owner_that_wakes_up_after_completion_has_nothing_to_say(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    first = _started_slowly(commands, "--concurrency", "4")
    first.send(signal.SIGSTOP)
    second = commands.start("--take-over", "--batch", "1000", "--concurrency", "8")
    wait_until(lambda: Rotation.objects.get().generation == 2, "the frozen owner is taken over")
    speed_up()
    assert second.wait().status == 0
    audit.assert_rotated()
    first.send(signal.SIGCONT)
    superseded = first.wait()

    _assert_superseded(superseded)
    assert Rotation.objects.get().status == "completed"
    audit.assert_rotated()
