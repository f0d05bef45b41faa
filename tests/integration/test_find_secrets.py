"""What ``manage.py find_secrets`` reports: reasons, commands, refusals and earlier rotations."""

import json
import secrets
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction
from django.test import override_settings

from tests.integration.rotation_tables import Database
from tests.shop import models

pytestmark = [
    pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"]),
    pytest.mark.usefixtures("no_pauses"),
]

ROWS = 40


def find(*options: str) -> str:
    out = StringIO()
    call_command("find_secrets", *options, stdout=out)
    return out.getvalue()


def columns() -> dict[str, dict[str, Any]]:
    return {column["column"]: column for column in json.loads(find("--json"))["columns"]}


def test_a_column_has_its_reasons_rows_and_command() -> None:
    models.Client.objects.create()
    found = columns()
    assert found["shop.Client.secret"] == {
        "column": "shop.Client.secret",
        "table": "public.shop_client",
        "kind": "secret",
        "reasons": ["its name is secret", "its default is tests.shop.generators.token()"],
        "rows": 1,
        "rows_is_exact": True,
        "command": "manage.py async_rotate shop.Client.secret",
        "refusal": "",
        "advice": "",
        "last_rotation": None,
    }
    assert "tickets.Ticket.token" in found
    assert not {"shop.Client.tag", "shop.Order.status", "shop.ByInteger.note", "tickets.Ticket.title"} & set(
        found
    )


@pytest.mark.usefixtures("database")
def test_the_command_that_it_names_rotates_the_column() -> None:
    models.Order.objects.bulk_create(models.Order(api_key=f"{i}leaked") for i in range(ROWS))
    _, command, *arguments = columns()["shop.Order.api_key"]["command"].split()

    call_command(command, *arguments, stdout=StringIO(), stderr=StringIO())

    assert not models.Order.objects.filter(api_key__endswith="leaked").exists()
    last = columns()["shop.Order.api_key"]["last_rotation"]
    assert last["is_filtered"] is False
    assert f"by rotation {last['rotation']}" in find()


@pytest.mark.usefixtures("database")
def test_a_rotation_of_some_rows_is_not_one_of_all() -> None:
    models.Order.objects.create(api_key="leaked", status="void")
    rotated = ("shop.Order.webhook_secret", "--filter", "status=void")
    call_command("async_rotate", *rotated, stdout=StringIO(), stderr=StringIO())
    assert columns()["shop.Order.webhook_secret"]["last_rotation"]["is_filtered"] is True
    assert ", only a part of the rows" in find()


def test_a_column_that_cannot_be_rotated_has_the_reason(database: Database) -> None:
    database.execute("CREATE VIEW shop_orderview AS SELECT id, api_key FROM shop_order")
    try:
        found = columns()
    finally:
        database.execute("DROP VIEW shop_orderview")
    for label, refusal in (
        ("shop.Searchable.secret", "Searchable.search is a SearchField, which derives its value"),
        ("shop.OrderView.api_key", "it is a view"),
        ("shop.Code.code", "new values would break these references"),
    ):
        assert refusal in found[label]["refusal"]
        assert found[label]["command"] == ""


@pytest.fixture
def notes() -> list[str]:
    """Random values in a column whose name and type do not reveal them."""
    values = [secrets.token_hex(16) for _ in range(ROWS)]
    models.ByInteger.objects.bulk_create(models.ByInteger(id=i, note=value) for i, value in enumerate(values))
    return values


def test_random_values_are_found_and_not_shown(notes: list[str]) -> None:
    (reason,) = columns()["shop.ByInteger.note"]["reasons"]
    assert reason == f"{ROWS} of {ROWS} sampled values are different and look random"
    shown = find()
    assert reason in shown
    assert not any(value in shown for value in notes)


def test_the_project_s_defaults_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> str:
        return models.Order.objects.create(api_key=secrets.token_hex()).api_key

    monkeypatch.setattr(models.Client._meta.get_field("secret"), "default", write)
    assert columns()["shop.Client.secret"]["refusal"] == (
        "Its default writes to the database, and find_secrets only reads."
    )
    assert not models.Order.objects.exists()


def test_a_column_that_cannot_be_read_is_named(database: Database) -> None:
    locker = database.connect()
    locker.execute("BEGIN")
    locker.execute("LOCK TABLE shop_client")
    try:
        found = json.loads(find("--json"))
    finally:
        locker.execute("ROLLBACK")
    reason = "lock_not_available (55P03): canceling statement due to lock timeout"
    assert f"shop.Client.secret could not be sampled: {reason}" in found["problems"]
    assert any(column["column"] == "shop.Client.secret" for column in found["columns"])


def test_the_table_of_a_cache_holds_copies(database: Database) -> None:
    database.execute("CREATE TABLE shop_cache (cache_key text PRIMARY KEY, value text, expires timestamptz)")
    cache = {"BACKEND": "django.core.cache.backends.db.DatabaseCache", "LOCATION": "shop_cache"}
    try:
        with override_settings(CACHES={"default": cache}):
            column = columns()["cache 'default'"]
    finally:
        database.execute("DROP TABLE shop_cache")
    assert (column["kind"], column["table"]) == ("copy", "public.shop_cache")
    assert "caches['default'].clear()" in column["advice"]


def test_a_transaction_is_refused() -> None:
    with transaction.atomic(), pytest.raises(CommandError, match="outside atomic"):
        find()
