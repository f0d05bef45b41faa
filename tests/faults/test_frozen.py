"""An owner that is frozen and taken over, and one that only looks gone."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.acceptance.harness import COMMAND, MANAGE, Running, wait_until
from tests.faults.database import Audit, Database, make_tickets, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed

ROUNDS = int(os.environ.get("ROTATOR_TEST_ROUNDS", "2"))
# Enough that none of them is left without work.
ROWS = 15_000 * ROUNDS
THAWED_SECONDS = 0.7


def _wait_in_statements(database: Database) -> None:
    slow_down(database, 0.2)


def _wait_in_commits(database: Database) -> None:
    """Let almost all of the time pass while a COMMIT is being answered."""
    database.query(
        "CREATE FUNCTION wait_in_commit() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.03); RETURN NULL; END $$"
    )
    database.query(
        "CREATE CONSTRAINT TRIGGER wait_in_commit AFTER INSERT ON rotator_completedrange"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_in_commit()"
    )


# Frozen within a transaction, its backends have to be ended, and it notices that. Frozen while it commits, it
# keeps all its connections and goes on to the next range as if nothing had been: the fence stops that, and
# behind it the constraints on checkpoints, since that range begins where the next owner has begun.
@pytest.mark.parametrize(
    ("let_it_wait", "concurrency"),
    [(_wait_in_statements, 4), pytest.param(_wait_in_commits, 1, marks=pytest.mark.slow)],
    ids=["update", "commit"],
)
def test_a_frozen_owner_writes_nothing_once_it_is_overtaken(
    database: Database, rotations: Rotations, let_it_wait: Callable[[Database], None], concurrency: int
) -> None:
    chance = random.Random(5)  # noqa: S311 - to be repeated, not to be secret
    audit = make_tickets(database, ROWS)
    let_it_wait(database)
    owner = _start(database, rotations, 0, concurrency)
    _wait_for_writes(audit, 0)
    for number in range(1, ROUNDS + 1):
        time.sleep(chance.random() / 10)
        owner.send(signal.SIGSTOP)
        following = _start(database, rotations, number, concurrency)
        _wait_for_writes(audit, number)
        written = audit.written(by=f"rotator owner {number - 1}")
        with _without_heartbeats(database):
            owner.send(signal.SIGCONT)
            time.sleep(THAWED_SECONDS)
        finished = owner.wait()

        assert finished.status == 1
        assert "Traceback" not in finished.err
        assert finished.out.splitlines()[1] == (
            "Another process has taken this rotation over; this one stopped and has written nothing since."
        )
        assert audit.written(by=f"rotator owner {number - 1}") == written
        assert database.status() == "running"
        assert database.number("SELECT generation FROM rotator_rotation") == number + 1
        owner = following
    speed_up(database)
    database.query("DROP FUNCTION IF EXISTS wait_in_commit CASCADE")

    assert_completed(owner.wait())
    audit.assert_rotated_once()


@contextmanager
def _without_heartbeats(database: Database) -> Iterator[None]:
    """Block sessions that read the rotation's row to check who owns it."""
    with database.connect() as other, other.transaction():
        other.execute("SELECT FROM rotator_rotation FOR NO KEY UPDATE")
        yield


def _start(database: Database, rotations: Rotations, number: int, concurrency: int) -> Running:
    return rotations.rotate(
        database.url(application_name=f"owner {number}"),
        # Other ranges than those that the one before has planned.
        f"--batch={100 + 7 * number}",
        f"--concurrency={concurrency}",
        *(["--take-over"] if number else []),
    )


def _wait_for_writes(audit: Audit, number: int) -> None:
    wait_until(lambda: audit.written(by=f"rotator owner {number}") > 500, f"owner {number} writes")


# As /proc is for the users of some hosts: no process of another user is in it.
_HIDDEN = (
    "unshare --mount sh -c 'mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid=65534 --regid=65534"
    ' --clear-groups "$0" "$@"\''
)


@pytest.mark.slow
def test_an_owner_that_proc_hides_is_not_taken_over(database: Database, rotations: Rotations) -> None:
    probe = ["/bin/sh", "-c", f"{_HIDDEN} {sys.executable} -c pass"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("This user cannot mount another /proc.")
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    owner = rotations.rotate(database.url(), "--batch=20", "--concurrency=1")
    wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
    program = " ".join([*MANAGE, COMMAND])
    second = rotations.start_on(database.url(), "/bin/sh", "-c", f"{_HIDDEN} {program}").wait()

    assert second.status == 1
    assert "is being worked on by" in second.err.splitlines()[-1]
    assert "Traceback" not in second.err
    assert owner.is_alive
    speed_up(database)
    assert_completed(owner.wait())
    audit.assert_rotated_once()
