"""SIGKILL, which no process can handle: no row is lost, and none is rotated twice."""

import random
import signal
import time

from rotator.models import CompletedRange, Rotation
from tests.acceptance.audit import audited_tickets
from tests.acceptance.harness import Commands, checkpoints, wait_for_the_backends_to_go, wait_until

ROWS = 20_000
KILLS = 4


def test_killed_again_and_again_every_row_is_written_once(commands: Commands) -> None:
    chance = random.Random(1)  # noqa: S311 - to be repeated, not to be secret
    audit = audited_tickets(ROWS)
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

    finished = commands.run()

    assert finished.status == 0, finished.err
    # No process watches the heartbeat of one that has ended on the same host.
    assert "watching" not in finished.err
    assert f"resumes: {killed_with_rows:,} of {ROWS:,} rows were done" in finished.err
    audit.assert_rotated()


def test_killed_at_once_before_the_backends_have_noticed(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    for concurrency in ("8", "3"):
        running = commands.start("--batch", "100", "--concurrency", concurrency)
        before = checkpoints()
        wait_until(lambda: checkpoints() > before, "another checkpoint")  # noqa: B023 - over before the next
        running.send(signal.SIGKILL)
        running.wait()

    assert commands.run("--batch", "700").status == 0
    audit.assert_rotated()


def test_killed_before_the_bound_is_known(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    running = commands.start()
    wait_until(Rotation.objects.exists, "the rotation is begun")
    running.send(signal.SIGKILL)
    running.wait()
    wait_for_the_backends_to_go()
    done = CompletedRange.objects.count()

    finished = commands.run()

    assert finished.status == 0, finished.err
    assert done <= 1
    audit.assert_rotated()
