"""The bar, the question and Ctrl-C, in a real terminal."""

import pytest

from rotator.models import CompletedRange, Rotation
from tests.acceptance.audit import audited_tickets, slow_down
from tests.acceptance.harness import Commands, wait_for_checkpoints, wait_until
from tests.acceptance.terminal import (
    CTRL_C,
    CTRL_D,
    HIDE_CURSOR,
    SHOW_CURSOR,
    Terminal,
    rotating_in_a_terminal,
    seen,
)

pytestmark = pytest.mark.usefixtures("commands")

ROWS = 5000


def _assert_restored(said: str) -> None:
    assert said.count(HIDE_CURSOR) == said.count(SHOW_CURSOR)
    assert said.rfind(HIDE_CURSOR) <= said.rfind(SHOW_CURSOR)


@pytest.mark.parametrize("columns", [pytest.param(120, marks=pytest.mark.slow), 40])
def test_the_bar_fits_and_ends_with_all_of_it(columns: int) -> None:
    audit = audited_tickets(ROWS)
    # The bar is drawn five times a second.
    slow_down(0.05)
    with rotating_in_a_terminal("--noinput", "--batch", "50", columns=columns) as terminal:
        status = terminal.wait()

    # The summary's lines are the terminal's to wrap.
    drawn, completed, summary = terminal.said.partition("Completed: ")
    assert (status, completed) == (0, "Completed: "), terminal.said
    *_, bar, _ = seen(drawn, columns)
    assert "█" in bar
    assert "100%" in bar
    assert drawn.count("\r") > 3
    assert "\x1b" not in summary
    _assert_restored(terminal.said)
    audit.assert_rotated()


def test_ctrl_c_drains_and_the_bar_says_so() -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    with rotating_in_a_terminal("--noinput", "--batch", "20") as terminal:
        wait_for_checkpoints(10)
        terminal.type(CTRL_C)
        status = terminal.wait()

    assert status == 130
    rows = audit.assert_checkpoints_and_tokens_agree()
    assert 200 <= rows < ROWS
    drawn, interrupted, summary = terminal.said.partition("Interrupted: ")
    assert interrupted
    *_, bar, _ = seen(drawn.replace("^C", ""), 120)
    assert f"{rows:,} of {ROWS:,} rows" in bar
    assert f"{rows:,} of {ROWS:,} rows have a new value." in summary
    assert summary.splitlines()[-1].startswith("Resume with: ")
    _assert_restored(terminal.said)


def test_a_window_that_is_closed_drains_as_a_signal_does() -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    with rotating_in_a_terminal("--noinput", "--batch", "20") as terminal:
        wait_for_checkpoints(10)
        terminal.close()
        status = terminal.wait()

    assert status == 129
    assert 200 <= audit.assert_checkpoints_and_tokens_agree() < ROWS
    assert Rotation.objects.get().status == "interrupted"


def _wait_for_the_question(terminal: Terminal) -> None:
    rotation = Rotation.objects.get()
    terminal.wait_for(
        f"Rotation {rotation.pk} of tickets.Ticket.token is unfinished, with 500 of 1,000 rows done. "
        "Abandon it and rotate all rows again? [y/N] "
    )


def test_restart_asks_and_leaves_all_as_it_was(commands: Commands) -> None:
    audit = audited_tickets(1000)
    commands.run("--stop-after", "500")
    before = Rotation.objects.values().get()
    unchanged = (
        1,
        "CommandError: Nothing was changed. Without --restart, the same command resumes the rotation.",
    )
    stopped = (130, "CommandError: Stopped before anything was changed.")

    for answer, expected in (
        ("n\n", unchanged),
        ("\n", unchanged),
        (CTRL_D, unchanged),
        (CTRL_C, stopped),
    ):
        with rotating_in_a_terminal("--restart", "--no-color") as terminal:
            _wait_for_the_question(terminal)
            status = terminal.answer(answer)
        assert (status, terminal.said.splitlines()[-1]) == expected

    assert Rotation.objects.values().get() == before
    assert audit.assert_checkpoints_and_tokens_agree() == audit.changed() == 500


def test_restart_asks_and_begins_a_new_rotation(commands: Commands) -> None:
    audit = audited_tickets(1000)
    commands.run("--stop-after", "500")
    with rotating_in_a_terminal("--restart") as terminal:
        _wait_for_the_question(terminal)
        terminal.type("y\n")
        terminal.wait_for("Rotate 1,000 rows of tickets.Ticket.token now? [y/N] ")
        terminal.type("y\n")
        assert terminal.wait() == 0

    assert list(Rotation.objects.order_by("pk").values_list("status", flat=True)) == [
        "abandoned",
        "completed",
    ]
    assert CompletedRange.objects.filter(rotation__status="completed").count() == 1
    assert audit.changed() == 1000


def test_noinput_asks_nothing(commands: Commands) -> None:
    audited_tickets(100)
    commands.run("--stop-after", "50")
    with rotating_in_a_terminal("--restart", "--noinput") as terminal:
        assert terminal.wait() == 0

    assert "[y/N]" not in terminal.said


def test_a_second_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    with rotating_in_a_terminal("--noinput", "--batch", "20") as terminal:
        wait_for_checkpoints(10)
        terminal.type(CTRL_C + CTRL_C + CTRL_C)
        status = terminal.wait()

    assert status == 130
    assert "Traceback" not in terminal.said
    _assert_restored(terminal.said)
    audit.assert_checkpoints_and_tokens_agree()
    wait_until(lambda: Rotation.objects.get().status == "interrupted", "the rotation is left as interrupted")
