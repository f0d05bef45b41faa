"""Where rotations are called from: views, notebooks, scripts with connections of their own."""

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from rotator.api import Target, rotate, rotate_sync
from rotator.exceptions import OptionError, TargetError
from rotator.fields import connections as project_connections
from rotator.signals import range_rotated
from tests.integration.rotation_tables import Database
from tests.shop import models

pytestmark = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

API_KEY = "shop.Order.api_key"
FROM_ROW = Target(API_KEY, generator="tests.shop.generators.named_after")
ROWS = 30
PATIENCE_SECONDS = 60


@pytest.fixture
def orders(database: Database) -> Database:
    models.Order.objects.bulk_create(models.Order(api_key=f"leaked {i}") for i in range(ROWS))
    return database


@pytest.fixture
def listener() -> Iterator[list[int]]:
    """A synchronous receiver, which Django calls in the thread for synchronous code."""
    heard: list[int] = []

    def hear(rows: int, **_: Any) -> None:  # noqa: ANN401 - whatever a signal carries
        heard.append(rows)

    range_rotated.connect(hear, sender=models.Order)
    yield heard
    range_rotated.disconnect(hear, sender=models.Order)


def leaked() -> int:
    return models.Order.objects.filter(api_key__startswith="leaked").count()


# --- A loop above ----------------------------------------------------------------------------------


def rotate_view(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(rotate_sync(FROM_ROW, batch=7).rows))


async def async_view(_request: HttpRequest) -> HttpResponse:
    with pytest.raises(OptionError, match=r"Use `await rotate\(\)`"):
        rotate_sync(FROM_ROW)
    return HttpResponse(str((await rotate(FROM_ROW, batch=7)).rows))


urlpatterns = [path("sync/", rotate_view), path("async/", async_view)]


@pytest.mark.parametrize("address", ["/sync/", "/async/"])
@override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[], ALLOWED_HOSTS=["*"])
async def test_a_view_under_asgi(orders: Database, listener: list[int], address: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        response = await AsyncClient().get(address)
    assert response.content == str(ROWS).encode()
    assert sum(listener) == ROWS
    assert orders.rotation("status") == "completed"


def test_a_coroutine_above_that_a_sync_function_waits_for(orders: Database, listener: list[int]) -> None:
    """As a sync view under WSGI that calls asynchronous code, which calls synchronous code again."""

    async def between() -> int:
        return (await sync_to_async(rotate_sync)(FROM_ROW, batch=7)).rows

    with ThreadPoolExecutor(1) as executor:
        rows = executor.submit(_closing, async_to_sync(between)).result(timeout=PATIENCE_SECONDS)
    assert rows == sum(listener) == ROWS
    assert orders.rotation("status") == "completed"


def _closing(call: Any) -> Any:  # noqa: ANN401 - whatever it is
    try:
        return call()
    finally:
        connections.close_all()


async def test_a_command_in_a_running_loop_is_refused(orders: Database) -> None:
    """As in a Jupyter notebook."""
    with pytest.raises(CommandError, match=r"Use `await rotate\(\)`"):
        call_command("async_rotate", API_KEY, generator=FROM_ROW.generator)
    with pytest.raises(OptionError, match=r"Use `await rotate\(\)`"):
        rotate_sync(FROM_ROW)
    assert orders.execute("SELECT id FROM rotator_rotation") == []


# --- The caller's connections ----------------------------------------------------------------------


class _Undoing(Exception):  # noqa: N818 - it is no error
    """Ends a transaction as a test does."""


@pytest.mark.parametrize(
    "call",
    [
        lambda: async_to_sync(rotate)(FROM_ROW),
        lambda: rotate_sync(FROM_ROW),
        lambda: call_command("async_rotate", API_KEY, generator=FROM_ROW.generator),
        lambda: call_command("async_rotate", API_KEY, generator=FROM_ROW.generator, dry_run=True),
        lambda: call_command("find_secrets"),
    ],
)
def test_a_refusal_leaves_the_callers_transaction_alone(orders: Database, call: Any) -> None:  # noqa: ANN401
    with transaction.atomic():
        models.Order.objects.create(api_key="the caller's work")
        with pytest.raises((OptionError, CommandError), match="inside a transaction"):
            call()
        assert models.Order.objects.filter(api_key="the caller's work").exists()
    assert models.Order.objects.count() == ROWS + 1
    assert orders.execute("SELECT id FROM rotator_rotation") == []


@pytest.mark.usefixtures("orders")
def test_a_transaction_that_django_did_not_begin_is_one_too() -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO shop_code (code) VALUES ('the caller''s work')")
        with pytest.raises(OptionError, match="inside a transaction"):
            rotate_sync(FROM_ROW)
        cursor.execute("COMMIT")
    assert models.Code.objects.filter(code="the caller's work").exists()


@pytest.mark.django_db(
    transaction=True,
    databases=["default", "other"],
    available_apps=["rotator", "tickets", "tests.shop"],
)
def test_a_transaction_on_another_database_continues(orders: Database) -> None:
    with transaction.atomic(using="other"):
        models.Code.objects.using("other").create(code="the caller's work")
        call_command("async_rotate", API_KEY, generator=FROM_ROW.generator, no_vacuum=True)
        rotate_sync(FROM_ROW, vacuum=False, restart=True)
    assert models.Code.objects.using("other").filter(code="the caller's work").exists()
    assert len(orders.execute("SELECT id FROM rotator_rotation")) == 2


@pytest.mark.parametrize("target", [FROM_ROW, Target(API_KEY), Target("shop.OrderView.api_key")])
@pytest.mark.usefixtures("orders")
def test_a_session_of_the_caller_is_kept(target: Target) -> None:
    """With its settings and temporary tables, whether the rotation is refused or runs."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('rotator.test', 'kept', false)")

    def command() -> None:
        options = {"generator": target.generator, "no_vacuum": True, "restart": True, "progress": "none"}
        call_command("async_rotate", target.fields, **options)

    for call in (
        lambda: rotate_sync(target, vacuum=False, restart=True),
        lambda: async_to_sync(rotate)(target, vacuum=False, restart=True),
        command,
    ):
        try:
            call()
        except (TargetError, CommandError):
            assert target is not FROM_ROW
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('rotator.test', true)")
            assert cursor.fetchone() == ("kept",)


@pytest.mark.usefixtures("orders")
def test_what_was_closed_is_closed_again() -> None:
    connection.close()
    rotate_sync(FROM_ROW, vacuum=False)
    assert connection.connection is None


# --- The environment -------------------------------------------------------------------------------


@pytest.mark.usefixtures("orders")
def test_without_uvloop_asyncios_own_loop_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loops = []

    async def main() -> None:
        loops.append(type(asyncio.get_running_loop()).__module__)

    project_connections.run_in_new_loop(main)
    assert loops[0].startswith("asyncio.")
    assert rotate_sync(FROM_ROW).rows == ROWS


@pytest.mark.usefixtures("orders")
def test_debugging_does_not_keep_queries() -> None:
    with override_settings(DEBUG=True):
        assert settings.DEBUG
        connection.queries_log.clear()
        assert rotate_sync(FROM_ROW, batch=2).rows == ROWS
        assert not [query for query in connection.queries if "shop_order" in query["sql"]]
