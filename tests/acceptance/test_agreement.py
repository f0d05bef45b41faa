"""What is asked, or refused, before a rotation begins: the first write, and the same rotation once more."""

import re

import pytest

from rotator.api import Target, rotate, rotate_sync
from rotator.exceptions import OptionError
from rotator.models import CompletedRange, Rotation
from tests.acceptance.audit import Audit, audited_tickets
from tests.acceptance.harness import COMMAND, MANAGE, Commands
from tests.acceptance.terminal import CTRL_C, CTRL_D, Terminal, rotating_in_a_terminal
from tests.pairs import all_pairs

ROWS = 1000
QUESTION = "Rotate 1,000 rows of tickets.Ticket.token now? [y/N] "
REFUSED = (
    r"Rotation {} of tickets.Ticket.token completed at [-0-9]+ [:0-9]+ UTC. "
    r"To rotate the same rows again, use --restart \(restart=True in Python\)."
)


@pytest.fixture
def audit(commands: Commands) -> Audit:  # noqa: ARG001
    return audited_tickets(ROWS)


def _rotated_once(commands: Commands, *options: str) -> int:
    assert commands.run(*options).status == 0
    number = Rotation.objects.get().pk
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize(
    "options", ["--noinput --no-preflight --take-over --batch 10", pytest.param("", marks=pytest.mark.slow)]
)
def test_the_same_command_after_completion_is_refused(commands: Commands, audit: Audit, options: str) -> None:
    number = _rotated_once(commands)

    finished = commands.run(*options.split())

    assert finished.status == 1
    assert re.fullmatch(REFUSED.format(number), finished.complaint)
    assert Rotation.objects.count() == 1
    audit.assert_rotated()


def test_other_rows_or_values_are_another_rotation(commands: Commands, audit: Audit) -> None:
    _rotated_once(commands)
    other = ("--filter", "title__startswith=Ticket 1", "--generator", "uuid.uuid4")

    assert commands.run(*other).status == 0
    assert commands.run(*other).status == 1
    # The latest rotation was another one, and the first one is still completed.
    assert commands.run().status == 1
    assert Rotation.objects.filter(status="completed").count() == 2
    assert audit.changed() == ROWS


def test_restart_rotates_once_more_and_is_resumed_without_it(commands: Commands, audit: Audit) -> None:
    _rotated_once(commands)

    assert commands.run("--restart", "--stop-after", "500", "--batch", "100").status == 0
    assert commands.run().status == 0
    assert list(Rotation.objects.order_by("pk").values_list("status", flat=True)) == ["completed"] * 2
    assert audit.changed() == ROWS


def test_the_api_raises_unless_restart_is_true(commands: Commands, audit: Audit) -> None:
    number = _rotated_once(commands)
    target = Target("tickets.Ticket.token")

    with pytest.raises(OptionError, match=REFUSED.format(number)):
        rotate_sync(target)

    assert rotate_sync(target, restart=True).rows == ROWS
    assert audit.changed() == ROWS


async def test_the_awaited_api_raises_too(commands: Commands, audit: Audit) -> None:  # noqa: ARG001
    target = Target("tickets.Ticket.token")
    assert (await rotate(target)).rows == ROWS

    with pytest.raises(OptionError, match="completed at "):
        await rotate(target)


def _type_when_asked(terminal: Terminal, question: str, keys: str) -> None:
    terminal.wait_for(question)
    terminal.type(keys)


def test_on_a_terminal_the_same_command_asks(commands: Commands, audit: Audit) -> None:
    number = _rotated_once(commands)
    again = re.compile(rf"Rotation {number} completed [0-9.]+ s ago\. Rotate all rows again\? \[y/N\] ")

    with rotating_in_a_terminal("--no-color") as terminal:
        terminal.wait_for("Rotate all rows again? [y/N] ")
        assert terminal.answer("\n") == 1
    assert again.search(terminal.said)
    assert terminal.said.splitlines()[-1] == "CommandError: Nothing was changed."
    assert Rotation.objects.count() == 1

    with rotating_in_a_terminal("--no-color") as terminal:
        _type_when_asked(terminal, "Rotate all rows again? [y/N] ", "y\n")
        _type_when_asked(terminal, QUESTION, "y\n")
        assert terminal.wait() == 0
    assert Rotation.objects.filter(status="completed").count() == 2
    assert audit.changed() == ROWS


def test_noinput_does_not_answer_the_question_of_a_repetition(commands: Commands, audit: Audit) -> None:
    _rotated_once(commands)
    with rotating_in_a_terminal("--noinput", "--no-color") as terminal:
        assert terminal.wait() == 1
    assert "use --restart" in terminal.said
    with rotating_in_a_terminal("--noinput", "--restart") as terminal:
        assert terminal.wait() == 0
    assert "[y/N]" not in terminal.said
    assert audit.changed() == ROWS


ANSWERS = {
    "nothing": ("\n", 1, "Nothing was changed."),
    "no": ("no\n", 1, "Nothing was changed."),
    "Ctrl-D": (CTRL_D, 1, "Nothing was changed."),
    "Ctrl-C": (CTRL_C, 130, "Stopped before anything was changed."),
}


@pytest.mark.parametrize(("answer", "options"), all_pairs(ANSWERS, ["--no-color", "--no-preflight"]))
def test_the_first_write_asks(audit: Audit, answer: str, options: str) -> None:
    keys, status, sentence = ANSWERS[answer]
    with rotating_in_a_terminal("--no-color", options) as terminal:
        terminal.wait_for(QUESTION)
        assert terminal.answer(keys) == status
    lines = terminal.said.splitlines()
    assert lines[-1] == f"CommandError: {sentence}"
    assert ("Before the first write" in terminal.said) == ("--no-preflight" not in options)
    (place,) = (line for line in lines if line.endswith(", table public.tickets_ticket, 1,000 rows"))
    assert re.match(r"\w+@[^@]+:\d+/\w+, ", place)
    assert Rotation.objects.count() == CompletedRange.objects.count() == 0
    audit.assert_untouched()


def test_a_yes_begins_and_a_resume_never_asks(audit: Audit) -> None:
    with rotating_in_a_terminal("--stop-after=500", "--batch=100") as terminal:
        _type_when_asked(terminal, QUESTION, "y\n")
        assert terminal.wait() == 0
    assert terminal.said.count("Before the first write") == 1
    findings = Rotation.objects.get().findings
    assert findings is not None
    assert findings["table"]["rows"] == ROWS
    with rotating_in_a_terminal() as terminal:
        assert terminal.wait() == 0
    assert "[y/N]" not in terminal.said
    audit.assert_rotated()


def test_json_lines_are_not_mixed_with_the_question(audit: Audit) -> None:
    with rotating_in_a_terminal("--progress=json") as terminal:
        _type_when_asked(terminal, QUESTION, "y\n")
        assert terminal.wait() == 0
    assert '{"event": "preflight"' in terminal.said
    audit.assert_rotated()


def test_without_a_terminal_nothing_is_asked(commands: Commands, audit: Audit) -> None:
    finished = commands.start(program=(*MANAGE, COMMAND)).wait()
    assert finished.status == 0
    assert "[y/N]" not in finished.out + finished.err
    assert "  server       " in finished.err
    audit.assert_rotated()
