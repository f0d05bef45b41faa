"""Rotations of only those rows whose values are in a list of leaked values."""

import asyncio
import base64
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from rotator.api import Target, prepare, rotate_sync
from rotator.events import Event, LateRowsRotated, LeakedValuesFound, OutageStarted, RotationStopped
from rotator.exceptions import OptionError
from rotator.models import Rotation
from rotator.options import RunOptions, Selection
from rotator.postgres import leaked
from rotator.postgres.connection import OwnConnection, connected
from rotator.postgres.leaked import LeakedValues
from rotator.progress.summary import summary
from tests.integration.outcomes import ORDERS
from tests.integration.rotation_tables import END_THE_ROTATOR, Database
from tests.shop import models

pytestmark = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

API_KEY = "shop.Order.api_key"
GENERATOR = "tests.shop.generators.token"
ROWS = 60


@pytest.fixture
def orders(database: Database) -> Database:
    models.Order.objects.bulk_create(
        models.Order(api_key=f"key {i}", status="void" if i % 2 else "active") for i in range(ROWS)
    )
    return database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A list of every third key, and of two values that no row has."""
    path = tmp_path / "leaked.txt"
    path.write_text("".join(f"key {i}\n" for i in range(0, ROWS, 3)) + "unknown\nKEY 2\n")
    return path


def ignore(_event: Event) -> None:
    pass


def run(
    path: Path,
    label: str = API_KEY,
    *,
    observer: Callable[[Event], None] = ignore,
    options: RunOptions | None = None,
    **selection: Any,  # noqa: ANN401 - attributes of Selection
) -> RotationStopped:
    chosen = Selection(**{"generator": GENERATOR, "leaked": str(path), **selection})
    small = replace(options or RunOptions(batch=7), concurrency=2, vacuum=False, pace="full")
    prepared = prepare([label], "default", small, chosen)
    return prepared.with_leaked_values().rotate(observer)


def _execute_at(kind: type[Event], statements: list[str], orders: Database) -> Callable[[Event], None]:
    """Return an observer that executes the statements at the first event of a kind."""

    def observe(event: Event) -> None:
        if isinstance(event, kind):
            for statement in statements:
                orders.execute(statement)
            statements.clear()

    return observe


def kept() -> set[int]:
    """Return the numbers of the orders that have their old keys."""
    keys = models.Order.objects.values_list("api_key", flat=True)
    return {int(key.removeprefix("key ")) for key in keys if key.startswith("key ")}


NOT_LEAKED = {i for i in range(ROWS) if i % 3}


def test_only_rows_with_leaked_values_are_rotated(orders: Database, path: Path) -> None:
    stopped = run(path)

    assert (stopped.status, stopped.rows, stopped.rows_total) == ("completed", ROWS // 3, ROWS // 3)
    assert kept() == NOT_LEAKED
    assert stopped.leaked == LeakedValuesFound(
        values=22, found=20, found_lines=("1-20",), other_lines=("21-22",)
    )
    rotation = Rotation.objects.get()
    assert (rotation.status, rotation.rows_done) == ("completed", ROWS // 3)
    assert rotation.selection["leaked"] == str(path)
    assert not orders.execute("SELECT FROM pg_class WHERE relname LIKE 'rotator_leaked%'")


def test_a_trigger_that_stores_equal_values_ends_the_run(orders: Database, tmp_path: Path) -> None:
    orders.execute("UPDATE shop_order SET webhook_secret = 'hook ' || id")
    path = tmp_path / "hooks"
    path.write_text("".join(f"hook {i}\n" for (i,) in orders.execute("SELECT id FROM shop_order LIMIT 9")))
    orders.before_update("NEW.webhook_secret := 'one for all'; RETURN NEW;", ORDERS)
    stopped = run(path, "shop.Order.webhook_secret")
    assert (stopped.status, stopped.rows) == ("failed", 0)
    assert "have the same value after the update" in stopped.error


@pytest.mark.parametrize("array_values", [leaked.ARRAY_VALUES, 0])
@pytest.mark.usefixtures("orders")
def test_a_large_table_is_read_in_parts(
    path: Path, monkeypatch: pytest.MonkeyPatch, array_values: int
) -> None:
    models.Order.objects.bulk_create(models.Order(api_key=f"key {i}") for i in range(ROWS, 10 * ROWS))
    with path.open("a") as file:
        file.write(f"key {10 * ROWS - 1}\n")
    monkeypatch.setattr(leaked, "CHUNK_BLOCKS", 1)
    monkeypatch.setattr(leaked, "ARRAY_VALUES", array_values)

    stopped = run(path)

    assert (stopped.status, stopped.rows) == ("completed", ROWS // 3 + 1)
    assert kept() == NOT_LEAKED | set(range(ROWS, 10 * ROWS - 1))


@pytest.mark.usefixtures("orders")
def test_the_same_list_and_all_rows_can_be_rotated_next(path: Path) -> None:
    run(path)
    again = run(path)
    assert (again.status, again.rows) == ("completed", 0)
    assert again.leaked is not None
    assert (again.leaked.found, again.leaked.other_lines) == (0, ("1-22",))
    everything = rotate_sync(Target(API_KEY, generator=GENERATOR))
    assert (everything.status, everything.rows) == ("completed", ROWS)
    assert not kept()


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("batch", [4, 500])
def test_a_stopped_rotation_is_resumed_with_the_same_list(path: Path, batch: int) -> None:
    first = run(path, options=RunOptions(batch=batch, stop_after_rows=10))
    assert (first.status, first.rows_this_run) == ("interrupted", 10)
    with pytest.raises(OptionError, match=r"was begun with .* --leaked"):
        rotate_sync(Target(API_KEY, generator=GENERATOR))

    second = run(path)

    assert (second.status, second.rows, second.rows_this_run) == ("completed", 20, 10)
    assert "; earlier runs rotated rows, too\n" in summary(second)
    assert "earlier runs" not in summary(first)
    assert kept() == NOT_LEAKED
    assert len(set(models.Order.objects.values_list("api_key", flat=True))) == ROWS


def test_leaked_values_that_move_during_the_rotation_are_found(orders: Database, path: Path) -> None:
    statements = [
        # A row is written, another one gets a leaked value, and a third one returns.
        "UPDATE shop_order SET is_paid = true WHERE api_key = 'key 6'",
        "UPDATE shop_order SET api_key = 'key 0' WHERE api_key = 'key 1'",
        (
            "INSERT INTO shop_order (api_key, created_at, status, is_paid, webhook_secret)"
            " VALUES ('key 3', now(), '', false, '')"
        ),
    ]

    stopped = run(path, observer=_execute_at(LateRowsRotated, statements, orders))
    assert stopped.status == "completed"
    assert kept() == NOT_LEAKED - {1}


def test_leaked_values_are_found_after_the_table_was_rewritten(orders: Database, path: Path) -> None:
    statements = ["DELETE FROM shop_order WHERE api_key = 'key 1'", "VACUUM FULL shop_order"]

    stopped = run(path, observer=_execute_at(LeakedValuesFound, statements, orders))
    assert stopped.status == "completed"
    assert kept() == NOT_LEAKED - {1}


def test_the_list_is_sent_again_after_an_outage(orders: Database, path: Path) -> None:
    outages = list[str]()

    def end(event: Event) -> None:
        if isinstance(event, LateRowsRotated) and not outages:
            orders.execute(END_THE_ROTATOR)
        if isinstance(event, OutageStarted):
            outages.append(event.reason)

    stopped = run(path, observer=end)
    assert (stopped.status, stopped.rows, len(outages)) == ("completed", ROWS // 3, 1)
    assert kept() == NOT_LEAKED
    assert stopped.leaked is not None
    assert stopped.leaked.found_lines == ("1-20",)


def test_filters_and_blanks_apply_too(orders: Database, path: Path) -> None:
    orders.execute("UPDATE shop_order SET api_key = '' WHERE api_key = 'key 2'")
    with path.open("a") as file:
        file.write("\n\n")
    stopped = run(path, filters=("status=active",))
    assert (stopped.status, stopped.rows) == ("completed", 10)
    assert kept() == NOT_LEAKED - {2} | set(range(3, ROWS, 6))


def test_rows_of_partitions_get_values_that_are_made_from_them(days: Database, tmp_path: Path) -> None:
    path = tmp_path / "leaked"
    path.write_text("leaked 2026-01-01 3\nleaked 2026-03-01 4\nleaked 2026-03-01 5\nleaked 2026-03-01 6\n")
    stopped = run(path, "shop.Partitioned.secret", generator="tests.shop.generators.token_for_row")
    assert (stopped.status, stopped.rows) == ("completed", 4)
    ((left,),) = days.execute("SELECT count(*) FROM shop_partitioned WHERE secret LIKE 'leaked %'")
    assert left == 36


@pytest.mark.parametrize(
    ("field", "write"),
    [
        ("as_uuid", lambda value: value.hex.upper()),
        ("as_bytes", lambda value: f"\\x{value.hex()}"),
        ("as_bytes", lambda value: value.hex()),
        ("as_bytes", lambda value: base64.b64encode(value).decode()),
        ("as_custom", str),
        ("as_hex", str),
        ("as_big_integer", str),
    ],
)
@pytest.mark.usefixtures("database")
def test_values_of_each_type(tmp_path: Path, field: str, write: Callable[[Any], str]) -> None:
    models.ByInteger.objects.bulk_create(models.ByInteger(id=i) for i in range(9))
    before = dict(models.ByInteger.objects.values_list("pk", field))
    path = tmp_path / "leaked"
    path.write_text("".join(f"{write(before[i])}\n" for i in (2, 5)))
    found = verify(f"shop.ByInteger.{field}", "--leaked", str(path))
    assert found == ("2 of 2 leaked values found in rows (line 1-2).\n", 1)
    stopped = run(path, f"shop.ByInteger.{field}", generator="")
    after = dict(models.ByInteger.objects.values_list("pk", field))
    assert stopped.status == "completed"
    assert {i for i in before if before[i] != after[i]} == {2, 5}


@pytest.mark.parametrize("array_values", [leaked.ARRAY_VALUES, 0])
@pytest.mark.usefixtures("database")
def test_several_fields_are_rotated_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array_values: int
) -> None:
    monkeypatch.setattr(leaked, "ARRAY_VALUES", array_values)
    models.Checked.objects.bulk_create(models.Checked(token=f"t {i}", checksum=f"c {i}") for i in range(5))
    path = tmp_path / "leaked"
    path.write_text("t 1\nc 3\n")
    target = Target(
        ["shop.Checked.token", "shop.Checked.checksum"],
        generator="tests.shop.generators.token_and_checksum",
        leaked=str(path),
    )
    assert rotate_sync(target).rows == 2
    assert set(models.Checked.objects.values_list("token", flat=True)) >= {"t 0", "t 2", "t 4"}
    assert not models.Checked.objects.filter(token__in=["t 1", "t 3"]).exists()


async def test_a_pooler_is_refused(database: Database) -> None:
    async with connected(database.server) as connection:
        assert isinstance(connection, OwnConnection)
        connection.local_settings = {"statement_timeout": "0"}
        with pytest.raises(OptionError, match="not through a pooler"):
            await leaked.load(connection, LeakedValues())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prove",), "--prove is about all of them"),
        (("--celery",), "Use it without --celery"),
        (("--leaked-column", "key"), "has no column 'key'"),
    ],
)
@pytest.mark.usefixtures("orders")
def test_options_that_do_not_fit_are_refused(path: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        call_command("async_rotate", API_KEY, "--generator", GENERATOR, "--leaked", str(path), *options)
    assert not Rotation.objects.exists()


def verify(*options: str) -> tuple[str, int]:
    out, status = StringIO(), 0
    try:
        call_command("verify_rotation", *options, stdout=out, stderr=StringIO())
    except SystemExit as error:
        status = int(error.code or 0)
    return out.getvalue(), status


@pytest.mark.usefixtures("orders")
def test_the_valid_values_are_counted(path: Path) -> None:
    run(path, filters=("status=active",))
    number = str(Rotation.objects.get().pk)
    found, status = verify(number, "--leaked", str(path))
    assert status == 1
    assert found == "10 of 22 leaked values found in rows (line 2, 4, 6, 8, 10, 12, 14, 16, 18, 20).\n"
    with pytest.raises(CommandError, match="Verify it with --leaked"):
        verify(number)

    run(path)

    number = str(Rotation.objects.latest("pk").pk)
    facts, status = verify(number, "--leaked", str(path), "--json")
    assert status == 0
    assert json.loads(facts) == {
        "rotation": int(number),
        "target": API_KEY,
        "values": 22,
        "found": 0,
        "found_lines": [],
        "other_lines": ["1-22"],
    }


def test_a_row_that_moves_while_the_valid_values_are_counted_is_found(
    orders: Database, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_once, moves = leaked.search, ["UPDATE shop_order SET api_key = 'KEY 2' WHERE api_key = 'key 1'"]

    async def search(*arguments: Any) -> int:  # noqa: ANN401 - those of search()
        found = await search_once(*arguments)
        while moves:
            orders.execute(moves.pop())
        return found

    monkeypatch.setattr(leaked, "search", search)
    assert verify(API_KEY, "--leaked", str(path)) == (
        "21 of 22 leaked values found in rows (line 1-20, 22).\n",
        1,
    )


@pytest.mark.usefixtures("orders")
def test_a_stop_during_the_first_search_does_not_change_the_number_of_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def search(*_: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return await asyncio.sleep(60, 0)

    run(path, options=RunOptions(batch=4, stop_after_rows=8))
    monkeypatch.setattr(leaked, "search", search)

    assert run(path).status == "interrupted"

    rotation = Rotation.objects.get()
    assert (rotation.rows_done, rotation.rows_total) == (8, ROWS // 3)


@pytest.mark.usefixtures("orders")
def test_a_list_is_checked_before_any_rotation(path: Path) -> None:
    # The field has no default.
    found, status = verify(API_KEY, "--leaked", str(path))
    assert (found, status) == ("20 of 22 leaked values found in rows (line 1-20).\n", 1)
    facts, status = verify(API_KEY, "--leaked", str(path), "--json")
    assert (json.loads(facts)["rotation"], json.loads(facts)["found"], status) == (None, 20, 1)
    assert kept() == set(range(ROWS))
    assert not Rotation.objects.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((API_KEY,), "Without --leaked, a verification needs the id of a rotation"),
        ((API_KEY, "--leaked", "-", "--repair"), "--repair needs the ledger"),
        (("shop.Order.nothing", "--leaked", "-"), "has no field 'nothing'"),
        (("99", "--leaked", "-"), "There is no rotation 99"),
        (("nothing", "--leaked", "-"), "'nothing' is not a valid target"),
    ],
)
@pytest.mark.usefixtures("database")
def test_a_check_says_what_it_needs(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        verify(*arguments)
