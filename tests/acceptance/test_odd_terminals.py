"""Terminals and streams as cron, systemd and CI give them: none of them ends a rotation."""

import signal
import time

import pytest

from rotator.models import Rotation
from tests.acceptance.audit import audited_tickets, slow_down
from tests.acceptance.harness import COMMAND, MANAGE, Commands, wait_for_checkpoints
from tests.acceptance.terminal import CTRL_C, rotating_in_a_terminal, seen
from tests.pairs import all_pairs

ROWS = 5000


def _assert_completed_in(columns: int, **variables: str) -> str:
    audit = audited_tickets(ROWS)
    options = ("--noinput", "--batch=50", "--restart")
    with rotating_in_a_terminal(*options, columns=columns, **variables) as terminal:
        assert terminal.wait() == 0, terminal.said
    assert "Traceback" not in terminal.said
    assert "Completed: " in terminal.said
    audit.assert_rotated()
    return terminal.said


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    ("columns", "variables"),
    [
        (0, {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}),
        (1001, {"TERM": "", "COLUMNS": "abc"}),
        *(pytest.param(columns, {}, marks=pytest.mark.slow) for columns in (1, 20)),
    ],
)
def test_any_width_and_environment(columns: int, variables: dict[str, str]) -> None:
    _assert_completed_in(columns, **variables)


@pytest.mark.usefixtures("commands")
def test_at_60_columns_no_word_is_broken() -> None:
    drawn = _assert_completed_in(60).partition("Completed: ")[0]
    lines = seen(drawn, 60)
    words = {word for line in lines for word in line.split()}
    for word in ("archived", "durability", "synchronous_commit", "tickets.Ticket.token", "checkpoints"):
        assert not {word[:end] for end in range(3, len(word))} & (words - {"checkpoint"}), lines


REDIRECTIONS = {
    "standard output and error closed": ">&- 2>&-",
    "standard error closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "standard error full": "2>/dev/full",
    "standard output full": ">/dev/full",
    "both full": ">/dev/full 2>/dev/full",
}


@pytest.mark.parametrize(("streams", "progress"), all_pairs(REDIRECTIONS, ["lines", "json", "bar"]))
def test_streams_that_are_closed_or_full(commands: Commands, streams: str, progress: str) -> None:
    audit = audited_tickets(1000)
    shell = f'exec "$@" {REDIRECTIONS[streams]}'
    program = ("/bin/sh", "-c", shell, "sh", *MANAGE, COMMAND, f"--progress={progress}", "--batch=50")
    finished = commands.start(program=program).wait()

    assert finished.status == 0, finished.err
    assert "Traceback" not in finished.err
    audit.assert_rotated()


@pytest.mark.parametrize("pause", [0.0, 0.2, pytest.param(0.05, marks=pytest.mark.slow)])
def test_ctrl_c_twice_ends_with_the_summary(commands: Commands, pause: float) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    running = commands.start("--batch", "20")
    wait_for_checkpoints(20)
    running.send(signal.SIGINT)
    time.sleep(pause)
    running.send(signal.SIGINT)
    finished = running.wait()

    assert finished.status == 130
    assert finished.summary[0].startswith("Interrupted: ")
    assert finished.summary[-1].startswith("Resume with: ")
    assert "Traceback" not in finished.err
    assert Rotation.objects.get().status == "interrupted"
    audit.assert_checkpoints_and_tokens_agree()


@pytest.mark.usefixtures("commands")
def test_ctrl_c_many_times_on_a_terminal_ends_with_the_summary() -> None:
    audited_tickets(ROWS)
    slow_down(0.1)
    with rotating_in_a_terminal("--noinput", "--batch", "20") as terminal:
        wait_for_checkpoints(10)
        for _ in range(5):
            terminal.type(CTRL_C)
            time.sleep(0.04)
        assert terminal.wait() == 130
    assert terminal.said.count("Interrupted: ") == 1
    assert "Resume with: " in terminal.said


def test_a_dry_run_to_a_full_disk_prints_no_traceback(commands: Commands) -> None:
    audited_tickets(100)
    program = ("/bin/sh", "-c", 'exec "$@" >/dev/full', "sh", *MANAGE, COMMAND, "--dry-run")
    finished = commands.start(program=program).wait()
    assert "Traceback" not in finished.err
