"""The reports of ``manage.py check`` on a project."""

import pytest
from pytest_django import Settings

from rotator.apps import check_databases, check_setting


@pytest.mark.parametrize("setting", [{}, {"DEFAULT_TARGET": "tickets.Ticket.token"}])
def test_a_valid_project_has_no_report(settings: Settings, setting: object) -> None:
    settings.ROTATOR = setting
    assert check_setting() + check_databases() == []


@pytest.mark.parametrize(
    ("setting", "number", "said"),
    [
        ("tickets.Ticket.token", "E001", "is not a dictionary"),
        ({"TARGET": "tickets.Ticket.token"}, "E001", "has an unknown key TARGET"),
        ({"DEFAULT_TARGET": ["tickets.Ticket.token"]}, "E001", "is not a string"),
        ({"DEFAULT_TARGET": "tickets.Ticket"}, "E002", "Write it as app.Model.field"),
        ({"DEFAULT_TARGET": "tickets.Ticket.colour"}, "E002", "has no field 'colour'"),
        ({"DEFAULT_TARGET": "tickets.Ticket.token shop.Order.api_key"}, "E002", "in different tables"),
    ],
)
def test_each_error_has_an_id(settings: Settings, setting: object, number: str, said: str) -> None:
    settings.ROTATOR = setting
    (message,) = check_setting()
    assert message.id == f"rotator.{number}"
    assert said in message.msg
