"""What ``manage.py rotations`` says of rotations that stopped, fell silent, or are being worked on."""

import json
import re

import pytest

from rotator.models import Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import MANAGE, Commands, Finished, query, wait_for_checkpoints, wait_until
from tests.acceptance.terminal import Terminal, seen

ROWS = 10_000
ROTATIONS = (*MANAGE, "rotations")


def _listed(commands: Commands, *options: str) -> Finished:
    return commands.start(*options, program=ROTATIONS).wait()


def _killed(commands: Commands) -> str:
    """Leave a rotation whose process was killed, and return its id."""
    audited_tickets(ROWS)
    slow_down(0.1)
    running = commands.start("--batch", "50")
    wait_for_checkpoints(20)
    running.kill()
    return str(Rotation.objects.get().pk)


def test_a_heartbeat_that_stopped_is_not_a_running_rotation(commands: Commands) -> None:
    number = _killed(commands)
    query("UPDATE rotator_rotation SET updated_at = clock_timestamp() - interval '22 s'")

    for finished in (_listed(commands), _listed(commands, number)):
        assert re.search(r"no heartbeat for [2-9][0-9] s", finished.out)
        assert "running" not in finished.out
        assert re.search(r"of 10,000 \(last known\)", finished.out)
    facts = json.loads(_listed(commands, number, "--json").out)
    assert facts["status"] == "running"
    assert 22 <= facts["heartbeat_seconds_ago"] < 99


def test_following_a_dead_owner_ends_with_a_sentence(commands: Commands) -> None:
    number = _killed(commands)

    followed = commands.start(number, "--follow", program=ROTATIONS).wait()

    assert followed.status == 1
    assert followed.err.startswith(f"CommandError: The owner of rotation {number}, ")
    command = "python manage.py async_rotate tickets.Ticket.token --database default --batch 50"
    assert followed.err.endswith(f" Resume with: {command}\n")
    assert len(followed.err.splitlines()) == 1


def test_a_stop_is_a_reason_and_no_error(commands: Commands) -> None:
    audited_tickets(1000)
    assert commands.run("--stop-after", "500").status == 0
    number = str(Rotation.objects.get().pk)

    shown = _listed(commands, number).out
    assert re.search(r"^  reason +stopped by --stop-after$", shown, re.MULTILINE)
    assert "error" not in shown
    facts = json.loads(_listed(commands, number, "--json").out)
    assert (facts["reason"], facts["error"]) == ("stopped by --stop-after", "")
    followed = _listed(commands, number, "--follow")
    assert (followed.status, followed.err) == (
        1,
        f"CommandError: Rotation {number} is unfinished: stopped by --stop-after\n",
    )


@pytest.mark.parametrize(
    "columns", [40, *(pytest.param(columns, marks=pytest.mark.slow) for columns in (100, 1))]
)
def test_following_shows_rate_and_eta(commands: Commands, columns: int) -> None:
    audited_tickets(ROWS)
    slow_down(0.15)
    running = commands.start("--batch", "20")
    wait_for_checkpoints(20)
    number = str(Rotation.objects.get().pk)
    terminal = Terminal(columns, [*ROTATIONS, number, "--follow"])
    piped = commands.start(number, "--follow", program=ROTATIONS)
    try:
        wait_until(lambda: re.search(r"rows \(\d+%\), [0-9,.]+ rows/s, ETA \d+ s", piped.out), "the ETA")
        speed_up()
        assert running.wait().status == terminal.wait() == piped.wait().status == 0
        assert piped.out.splitlines()[-1] == "completed: 10,000 of 10,000 rows (100%)"
    finally:
        terminal.end()
    if columns >= 20:
        lines = seen(terminal.said, columns)
        assert len([line for line in lines if line]) == 1
        assert "100%" in lines[0]
        assert "|█" in lines[0]
