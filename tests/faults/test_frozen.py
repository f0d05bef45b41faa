"""An owner that is frozen in the middle of its work, taken over from, and thawed."""

import random
import signal
import time

from tests.acceptance.harness import Running, wait_until
from tests.faults.database import Audit, Database, make_tickets, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed

ROWS = 15_000
ROUNDS = 3


def test_a_frozen_owner_writes_nothing_once_it_is_overtaken(database: Database, rotations: Rotations) -> None:
    chance = random.Random(5)  # noqa: S311 - to be repeated, not to be secret
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.03)
    owner = _start(database, rotations, 0)
    _wait_for_writes(audit, 0)
    for number in range(1, ROUNDS + 1):
        time.sleep(chance.random() / 10)
        owner.send(signal.SIGSTOP)
        following = _start(database, rotations, number)
        _wait_for_writes(audit, number)
        written = audit.written(by=f"owner {number - 1}")
        owner.send(signal.SIGCONT)
        finished = owner.wait()

        assert finished.status == 1
        assert "Traceback" not in finished.err
        assert finished.out.splitlines()[1] == (
            "Another process has taken this rotation over; this one stopped and has written nothing since."
        )
        assert audit.written(by=f"owner {number - 1}") == written
        assert database.status() == "running"
        assert database.number("SELECT generation FROM rotator_rotation") == number + 1
        owner = following
    speed_up(database)

    assert_completed(owner.wait())
    audit.assert_rotated_once()


def _start(database: Database, rotations: Rotations, number: int) -> Running:
    return rotations.rotate(
        database.url(application_name=f"owner {number}"), "--batch=50", *(["--take-over"] if number else [])
    )


def _wait_for_writes(audit: Audit, number: int) -> None:
    wait_until(lambda: audit.written(by=f"owner {number}") > 500, f"owner {number} writes")
