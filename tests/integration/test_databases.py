"""Projects with several databases, and several ways to one of them."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.db.backends.dummy.base import DatabaseWrapper
from django.test import override_settings

from rotator.api import Target, prepare, rotate_sync
from rotator.apps import check_databases
from rotator.exceptions import OptionError
from rotator.management.rotation import read_rotations
from rotator.models import CompletedRange, Rotation
from rotator.options import RunOptions, Selection
from tests.shop import models

pytestmark = pytest.mark.django_db(
    transaction=True,
    databases=["default", "other", "direct"],
    available_apps=["rotator", "tickets", "tests.shop"],
)

API_KEY = "shop.Order.api_key"
NAMED = Selection(generator="tests.shop.generators.named_after")
ROWS = 30


class ReadFromDefault:
    """A router that knows nothing of rotations."""

    def db_for_read(self, model: Any, **_: Any) -> str:  # noqa: ANN401, ARG002 - Django's signature
        return "default"


class OrdersElsewhere:
    """A router of a project that keeps its orders apart."""

    def db_for_write(self, model: Any, **_: Any) -> str | None:  # noqa: ANN401 - Django's signature
        return "other" if model is models.Order else None


def make_orders(database: str) -> None:
    models.Order.objects.using(database).bulk_create(
        models.Order(api_key=f"leaked {i} in {database}") for i in range(ROWS)
    )


def leaked(database: str) -> int:
    return models.Order.objects.using(database).filter(api_key__startswith="leaked").count()


@override_settings(DATABASE_ROUTERS=["tests.integration.test_databases.ReadFromDefault"])
def test_a_rotation_lives_in_the_database_of_its_target() -> None:
    for database in ("default", "other"):
        make_orders(database)
    prepared = prepare([API_KEY], "other", RunOptions(batch=7, concurrency=2), NAMED)
    assert prepared.rotate(lambda _event: None).exit_status == 0
    assert (leaked("default"), leaked("other")) == (ROWS, 0)
    # Made from the row that is in that database, whatever a router says.
    for order in models.Order.objects.using("other"):
        assert order.api_key.startswith(f"{order.pk}-")
    assert (Rotation.objects.using("default").count(), Rotation.objects.using("other").count()) == (0, 1)
    assert CompletedRange.objects.using("other").count() == 5


@override_settings(DATABASE_ROUTERS=["tests.integration.test_databases.OrdersElsewhere"])
@pytest.mark.parametrize("caller", ["command", "api"])
def test_the_default_database_is_the_one_that_the_router_writes_to(caller: str) -> None:
    for database in ("default", "other"):
        make_orders(database)
    if caller == "command":
        call_command("async_rotate", API_KEY, generator=NAMED.generator, stderr=StringIO(), stdout=StringIO())
    else:
        rotate_sync(Target(API_KEY, generator=NAMED.generator))
    assert (leaked("default"), leaked("other")) == (ROWS, 0)
    assert Rotation.objects.using("other").get().database == "other"
    # Another one can still be named.
    call_command("async_rotate", API_KEY, database="default", generator=NAMED.generator, stderr=StringIO())
    assert leaked("default") == 0


@override_settings(DATABASE_ROUTERS=["tests.integration.test_databases.OrdersElsewhere"])
def test_leaked_values_are_searched_in_the_database_that_the_router_writes_to(tmp_path: Path) -> None:
    make_orders("other")
    leaked = tmp_path / "leaked.txt"
    leaked.write_text("leaked 3 in other\n")
    out = StringIO()
    with pytest.raises(SystemExit):
        call_command("verify_rotation", API_KEY, leaked=str(leaked), stdout=out, stderr=StringIO())
    assert "1 of 1 leaked value" in out.getvalue()
    # Another one can still be named.
    call_command("verify_rotation", API_KEY, leaked=str(leaked), database="default", stdout=StringIO())


def test_rotations_of_an_alias_without_an_engine_are_refused() -> None:
    """Projects that route every model leave the database ``default`` empty."""
    connections["empty"] = DatabaseWrapper({}, "empty")
    try:
        with pytest.raises(CommandError, match=r"the database 'empty': settings\.DATABASES .*\. Check that"):
            read_rotations("empty")
    finally:
        del connections["empty"]


def test_the_commands_take_the_database() -> None:
    make_orders("other")
    out, err = StringIO(), StringIO()
    options: dict[str, Any] = {"database": "other", "stdout": out, "stderr": err}
    call_command("async_rotate", API_KEY, generator=NAMED.generator, batch=7, **options)
    assert leaked("other") == 0
    assert "Before the first write to shop.Order.api_key in the database 'other':" in err.getvalue()
    call_command("rotations", **options)
    assert f"{ROWS} of {ROWS}" in out.getvalue()
    out.truncate(0)
    call_command("rotations", stdout=out)
    assert "There are no rotations in this database." in out.getvalue()


def test_a_rotation_begun_by_one_alias_is_resumed_by_another() -> None:
    make_orders("default")
    begun = prepare([API_KEY], "default", RunOptions(batch=7, stop_after_rows=14), NAMED)
    assert begun.rotate(lambda _event: None).rows == 14
    stopped = prepare([API_KEY], "direct", RunOptions(batch=7), NAMED).rotate(lambda _event: None)
    assert (stopped.status, stopped.resumed, stopped.rows, stopped.rows_this_run) == (
        "completed",
        True,
        ROWS,
        ROWS - 14,
    )
    assert Rotation.objects.get().database == "direct"


def test_a_database_that_there_is_not() -> None:
    with pytest.raises(OptionError, match="no database 'nope': the project has default, other, direct"):
        prepare([API_KEY], "nope", RunOptions(), NAMED)


@override_settings(ROTATOR=["shop.Order.api_key"])
def test_a_setting_that_is_none_stops_the_command_with_a_sentence() -> None:
    with pytest.raises(CommandError, match=r"The setting ROTATOR is not a dictionary\."):
        call_command("async_rotate")


def test_a_project_without_postgresql_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for connection in connections.all():
        monkeypatch.setattr(connection, "vendor", "sqlite")
    (message,) = check_databases()
    assert message.id == "rotator.W001"
