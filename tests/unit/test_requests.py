"""The requests that ``manage.py rotations`` reads from its command line."""

import pytest
from django.core.management import CommandError, call_command

from rotator.events import ActionKind
from rotator.exceptions import OptionError
from rotator.management.control import read_request


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("pause",), "pause needs the ID of a rotation: rotations ID pause."),
        (("x",), "'x' is not the ID of a rotation."),
        (("set", "--all"), "--all is for one of these: rotations pause --all, rotations resume --all."),
        (("1", "set"), "set needs one or more of pace, concurrency, batch, e.g. set concurrency=2."),
        (
            ("1", "set", "workers=2"),
            "'workers=2' is not NAME=VALUE with one of the names pace, concurrency, batch.",
        ),
        (("1", "set", "batch=0"), "--batch must be from 1 to 2,147,483,647, not 0."),
        (("1", "pause", "now"), "pause takes no value: leave out now."),
        (("1", "stop"), "'stop' is not a request. The requests are pause, resume, cancel, set."),
        (
            ("1", "--revision=1"),
            "--revision needs an ID and a request, e.g. rotations ID pause --revision 3.",
        ),
    ],
)
def test_what_cannot_be_requested_is_said_in_one_sentence(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(CommandError) as raised:
        call_command("rotations", *words)
    assert str(raised.value) == complaint


def test_a_setting_is_a_change_of_the_control_row() -> None:
    request = read_request(["set", "concurrency=2", "batch=default", "pace=gentle"])
    assert request.kind is ActionKind.CHANGED
    assert request.values == {"concurrency": 2, "batch": None, "pace": "gentle"}
    assert str(request) == "has concurrency=2 batch=default pace=gentle"


@pytest.mark.parametrize("word", ["batch=x", "concurrency=-1", "concurrency=", "batch"])
def test_a_setting_without_a_valid_value_is_refused(word: str) -> None:
    with pytest.raises(OptionError):
        read_request(["set", word])
