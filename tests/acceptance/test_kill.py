"""SIGKILL, which no process can handle: no row is lost, and none is rotated twice."""

import random
import signal
import time

import psycopg

from rotator.models import Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import Commands, checkpoints, url_of, wait_for_the_backends_to_go, wait_until

ROWS = 10_000
KILLS = 4


def test_killed_again_and_again_every_row_is_written_once(commands: Commands) -> None:
    chance = random.Random(1)  # noqa: S311 - to be repeated, not to be secret
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    killed_with_rows = 0
    for _ in range(KILLS):
        done = checkpoints()
        running = commands.start(
            "--batch", str(chance.randint(20, 150)), "--concurrency", str(chance.randint(1, 8))
        )
        wait_until(lambda: checkpoints() > done, "another checkpoint")  # noqa: B023 - over before the next
        time.sleep(chance.random() / 5)
        running.send(signal.SIGKILL)
        assert running.wait().status == -signal.SIGKILL
        wait_for_the_backends_to_go()
        killed_with_rows = audit.assert_checkpoints_and_tokens_agree()
    assert 0 < killed_with_rows < ROWS
    assert Rotation.objects.get().status == "running"
    speed_up()

    finished = commands.run()

    assert finished.status == 0, finished.err
    # No process watches the heartbeat of one that has ended on the same host.
    assert "watching" not in finished.err
    assert f"resumes: {killed_with_rows:,} of {ROWS:,} rows were done" in finished.err
    audit.assert_rotated()


def test_killed_at_once_before_the_backends_have_noticed(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    for concurrency in ("8", "3"):
        running = commands.start("--batch", "100", "--concurrency", concurrency)
        before = checkpoints()
        wait_until(lambda: checkpoints() > before, "another checkpoint")  # noqa: B023 - over before the next
        running.send(signal.SIGKILL)
        running.wait()
    speed_up()

    assert commands.run("--batch", "700").status == 0
    audit.assert_rotated()


def test_killed_before_the_bound_is_known(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    with psycopg.connect(url_of()) as older:
        older.execute("UPDATE tickets_ticket SET title = 'held' WHERE id = 1")
        running = commands.start()
        wait_until(
            lambda: "waiting for 1 transaction" in running.err, "the run waits before it reads the bound"
        )
        running.send(signal.SIGKILL)
        running.wait()
        older.rollback()
    assert (Rotation.objects.get().bound, checkpoints()) == (None, 0)

    finished = commands.run()

    assert finished.status == 0, finished.err
    audit.assert_rotated()
