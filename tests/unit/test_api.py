"""What callers in Python give by mistake is refused in one sentence, before anything is read."""

import asyncio
import uuid
from typing import Any

import pytest

from rotator.api import Target, rotate, rotate_sync
from rotator.exceptions import OptionError, RotatorError, TargetError
from rotator.options import RotateOptions

LABEL = "tickets.Ticket.token"


@pytest.mark.parametrize("target", [LABEL, "nonsense", None, [LABEL], Target])
def test_a_target_of_another_type_is_refused(target: Any) -> None:  # noqa: ANN401 - wrong on purpose
    for call in (rotate_sync, lambda given: asyncio.run(rotate(given))):
        with pytest.raises(TargetError, match=r"^The target must be a Target, not \w+: use Target\(.*\)\.$"):
            call(target)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fields": None}, "fields must be a list of strings, not NoneType."),
        ({"fields": [1]}, "Each item of fields must be a string, not int."),
        ({"database": 1}, "database must be a string, not int."),
        ({"filters": "id=1"}, "filters must be a list of strings, not str."),
        ({"filters": [{"id": 1}]}, "Each item of filters must be a string, not dict."),
        ({"excludes": 1}, "excludes must be a list of strings, not int."),
        ({"generator": uuid.uuid4}, "generator must be a string, not function."),
        ({"include_null": "no"}, "include_null must be True or False, not str."),
        ({"include_blank": 1}, "include_blank must be True or False, not int."),
        ({"ignore_derived": "checksum"}, "ignore_derived must be a list of strings, not str."),
        ({"leaked": ["a"]}, "leaked must be a string, not list."),
        ({"leaked_column": 1}, "leaked_column must be a string, not int."),
    ],
)
def test_an_attribute_of_another_type_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        rotate_sync(Target(**{"fields": LABEL, **given}))
    assert str(caught.value) == message


WRONG: dict[str, tuple[object, ...]] = {
    "concurrency": ("4", 4.0, True, None),
    "batch": ("2000", 2e3, False),
    "pace": (1, None),
    "restart": ("no", 1, None),
    "take_over": ("no",),
    "vacuum": ("no", 0),
    "reindex": ("",),
    "prove": (1,),
    "guard": (True, None),
    "lock_timeout": ([], True, None),
    "outage_budget": ({}, None),
    "max_lag": ([],),
    "lag_of": ("replica", 1, [1]),
    "max_unarchived_wal": (10**9,),
    "max_slot_wal": (1.5,),
}


def test_every_option_has_wrong_types_here() -> None:
    assert WRONG.keys() == RotateOptions.__annotations__.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_an_option_of_another_type_is_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {"max_lag": "1s"} if name == "lag_of" else {}
    if name == "max_lag":
        options["lag_of"] = ["replica"]
    options[name] = value
    with pytest.raises(OptionError) as caught:
        rotate_sync(Target(LABEL), **options)
    flag = f"--{name.replace('_', '-')}"
    assert str(caught.value).removeprefix("Each item of ").startswith((f"{name} must ", f"{flag} must "))


def test_an_unknown_option_and_a_wrong_observer_are_refused() -> None:
    options: dict[str, Any] = {"workers": 4}
    with pytest.raises(OptionError, match="There is no option workers"):
        rotate_sync(Target(LABEL), **options)
    observer: Any = "print"
    with pytest.raises(RotatorError, match="observer must be callable, not str"):
        rotate_sync(Target(LABEL), observer=observer)
