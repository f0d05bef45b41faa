"""What the user chooses in addition to the field: which rows, whose values, several fields at once."""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from django.db import connection as django_connection
from django.db.models.signals import post_save
from django.dispatch import receiver
from django.test import override_settings

from rotator.api import RotationUnfinishedError, Target, prepare, rotate, rotate_sync
from rotator.events import Event, RangeCompleted, RangeRetried, RotationStarted, RotationStopped
from rotator.exceptions import (
    OptionError,
    OwnedElsewhereError,
    RotationRepeatedError,
    RotatorError,
    TargetError,
    ValuesError,
)
from rotator.fields import generators
from rotator.options import RunOptions, Selection
from rotator.postgres.catalog import read_table
from rotator.signals import range_rotated
from tests.integration.any_model import (
    BATCH,
    KEYS,
    ROWS,
    START,
    make_rows,
    rotate_killed_and_resumed,
    table_of,
)
from tests.integration.killed import rotate_until_killed
from tests.integration.outcomes import assert_completed
from tests.integration.rotation_tables import Database
from tests.pairs import quick
from tests.shop import models

pytestmark = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

API_KEY = "shop.Order.api_key"
WEBHOOK = "shop.Order.webhook_secret"
MADE_BY = "tests.shop.generators."
TOKEN = Selection(generator=f"{MADE_BY}token")
OPTIONS = RunOptions(batch=BATCH, concurrency=2, vacuum=False, pace="full")


@pytest.fixture
def orders(database: Database) -> Database:
    """Orders, a third of them void, a day apart."""
    models.Order.objects.bulk_create(
        models.Order(
            api_key=f"leaked {i}",
            webhook_secret=f"leaked too {i}",
            status="void" if i % 3 == 0 else "active",
            is_paid=i % 2 == 0,
            created_at=START + timedelta(days=i),
        )
        for i in range(ROWS)
    )
    return database


def run(
    *labels: str, selection: Selection = TOKEN, observer: Callable[[Event], None] | None = None
) -> RotationStopped:
    return prepare(labels, "default", OPTIONS, selection).rotate(observer or (lambda _event: None))


def leaked(field: str = "api_key") -> set[int]:
    """Which orders still have the value that they were made with; numbered from 0."""
    return {
        int(value.rpartition(" ")[2])
        for value in models.Order.objects.values_list(field, flat=True)
        if value.startswith("leaked")
    }


# --- Which rows ------------------------------------------------------------------------------------

FILTERS: dict[str, tuple[Selection, Callable[[int], bool]]] = {
    "text": (Selection(filters=("status=active",)), lambda i: i % 3 != 0),
    "exclude": (Selection(excludes=("status=active",)), lambda i: i % 3 == 0),
    "time": (
        Selection(filters=("created_at__lt=2026-11-21T00:00:00Z",)),
        lambda i: START + timedelta(days=i) < datetime(2026, 11, 21, tzinfo=UTC),
    ),
    "boolean": (Selection(filters=("is_paid=true",)), lambda i: i % 2 == 0),
    "several": (
        Selection(filters=("is_paid=false", "created_at__day__gte=10"), excludes=("status__in=void,lost",)),
        lambda i: i % 2 == 1 and (START + timedelta(days=i)).day >= 10 and i % 3 != 0,
    ),
    "a percent sign": (Selection(excludes=("status__contains=%",)), lambda _: True),
    "null": (Selection(filters=("parent__isnull=true",)), lambda _: True),
    "a foreign key": (Selection(filters=("parent_id__isnull=1",)), lambda _: True),
    "a transform": (
        Selection(filters=("created_at__month=12",)),
        lambda i: (START + timedelta(days=i)).month == 12,
    ),
    "the rotated column": (Selection(filters=("api_key__isnull=false",)), lambda _: True),
    "a regular expression": (Selection(filters=("status__iregex=^ACT",)), lambda i: i % 3 != 0),
}


@pytest.mark.parametrize(("selection", "matches"), FILTERS.values(), ids=FILTERS)
def test_only_rows_that_match_get_a_new_value(
    orders: Database, selection: Selection, matches: Callable[[int], bool]
) -> None:
    chosen = Selection(filters=selection.filters, excludes=selection.excludes, generator=TOKEN.generator)
    orders.count_updates(table_of(models.Order, "api_key"))
    expected = {i for i in range(ROWS) if matches(i)}

    outcome = run(API_KEY, selection=chosen)

    assert_completed(outcome, rows=len(expected))
    assert outcome.rows_total == len(expected)
    assert leaked() == set(range(ROWS)) - expected
    assert sum(orders.updates().values()) == len(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Six hours behind UTC, as the last order is made at noon.
        ("created_at__lt=2026-11-21T10:00:00", 21),
        ("created_at__hour=6", ROWS),
    ],
)
@pytest.mark.usefixtures("orders")
def test_without_time_zones_a_time_is_one_of_the_projects(text: str, expected: int) -> None:
    with override_settings(USE_TZ=False, TIME_ZONE="America/Chicago"):
        outcome = run(API_KEY, selection=Selection(filters=(text,), generator=TOKEN.generator))
    assert_completed(outcome, rows=expected)
    assert len(leaked()) == ROWS - expected


def test_a_filtered_rotation_survives_its_death(orders: Database) -> None:
    selection = Selection(filters=("status=active",), generator=TOKEN.generator)
    rotate_killed_and_resumed(orders, API_KEY, rows=40, selection=selection)
    assert leaked() == {i for i in range(ROWS) if i % 3 == 0}


def test_a_row_that_comes_to_match_meanwhile_is_left_to_the_next_rotation(orders: Database) -> None:
    """Which rows match is decided when their range is written."""

    def void(event: Event) -> None:
        if isinstance(event, RotationStarted):
            orders.execute("UPDATE shop_order SET status = 'active' WHERE api_key = 'leaked 57'")

    assert_completed(
        run(
            API_KEY, selection=Selection(filters=("status=active",), generator=TOKEN.generator), observer=void
        ),
        rows=41,
    )


REFUSED_FILTERS = {
    "status": "Write it as field=value",
    "colour=red": "has no such field. Its columns are .*api_key",
    "parent__status=active": "needs another table",
    "uses=1": "has no such field|needs another table",
    "api_key__startswith=leaked": "which is rotated",
    "created_at__lt=2026-11-01T00:00:00": "lacks a time zone",
    "created_at__lt=yesterday": "is not a valid time",
    "is_paid=perhaps": "true or false",
    "status__resembles=active": "Unsupported lookup",
    "id=seven": "expected a number",
    "id__in=": "expected a number",
    "webhook_secret__length=3": "Unsupported lookup",
}


def test_a_composite_key_is_asked_for_by_its_columns() -> None:
    with pytest.raises(OptionError, match=r"--filter pk: .* Filter by shop and number one by one"):
        prepare(["shop.ByPair.as_char"], "default", OPTIONS, Selection(filters=("pk=3",)))


@pytest.mark.parametrize("option", ["--filter", "--exclude"])
def test_what_cannot_be_asked_of_one_table_is_refused(option: str) -> None:
    for text, reason in REFUSED_FILTERS.items():
        selection = Selection(
            filters=(text,) if option == "--filter" else (),
            excludes=(text,) if option == "--exclude" else (),
            generator=TOKEN.generator,
        )
        with pytest.raises(OptionError, match=reason) as caught:
            prepare([API_KEY], "default", OPTIONS, selection)
        assert option in str(caught.value)


@pytest.mark.parametrize(
    ("option", "text"),
    [("filters", "status__regex=("), ("excludes", "status__iregex=*\n"), ("filters", "status__regex=a{9,1}")],
)
@pytest.mark.parametrize("is_dry", [True, False])
def test_a_filter_that_only_the_server_can_refuse_is_refused_before_the_rotation_begins(
    orders: Database, option: str, text: str, *, is_dry: bool
) -> None:
    selection = Selection(**{option: ("id__gt=0", text)}, generator=TOKEN.generator)  # type: ignore[arg-type] # filters
    prepared = prepare([API_KEY], "default", replace(OPTIONS, preflight=False), selection)
    with pytest.raises(OptionError) as caught:
        prepared.examine(print) if is_dry else prepared.rotate(print)
    sentence = str(caught.value)
    assert sentence.startswith(f"The server cannot use --{option.removesuffix('s')} id__gt=0 --")
    assert text.strip() in sentence
    assert ": invalid_regular_expression (2201B): invalid regular expression: " in sentence
    assert sentence.endswith(". Correct the filter.")
    assert "\n" not in sentence
    assert orders.execute("SELECT FROM rotator_rotation") == []


def test_null_stays_null_unless_it_is_asked_for(database: Database) -> None:
    models.ByInteger.objects.bulk_create(
        models.ByInteger(id=i, nullable=None if i % 2 else f"leaked {i}") for i in range(20)
    )
    label = "shop.ByInteger.nullable"
    assert_completed(run(label, selection=Selection()), rows=10)
    assert models.ByInteger.objects.filter(nullable=None).count() == 10
    assert_completed(run(label, selection=Selection(include_null=True)), rows=20)
    assert not models.ByInteger.objects.filter(nullable=None).exists()
    assert database.rotation("selection")["include_null"]


def test_of_several_columns_each_null_stays(database: Database) -> None:
    models.ByInteger.objects.bulk_create(
        models.ByInteger(id=i, nullable=None if i % 2 else f"leaked {i}", as_text="leaked") for i in range(20)
    )
    assert_completed(run("shop.ByInteger.nullable", "shop.ByInteger.as_text", selection=Selection()), rows=20)
    assert models.ByInteger.objects.filter(nullable=None).count() == 10
    assert not models.ByInteger.objects.filter(as_text="leaked").exists()
    assert database.rotation("rows_done") == 20


# --- Whose values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "generator"), [("as_char", "uuid.uuid4"), ("as_bytes", f"{MADE_BY}key_file")]
)
def test_values_are_what_the_field_makes_of_them(database: Database, field: str, generator: str) -> None:
    models.ByInteger.objects.bulk_create(models.ByInteger(id=i) for i in range(ROWS))
    table = table_of(models.ByInteger, field)
    before = database.values(table)
    assert_completed(run(f"shop.ByInteger.{field}", selection=Selection(generator=generator)), rows=ROWS)
    assert database.changed(before, table) == before.keys()


def test_several_fields_in_one_update(orders: Database) -> None:
    orders.count_updates(table_of(models.Order, "api_key"))
    selection = Selection(generator="tests.shop.generators.two_keys")
    rotate_killed_and_resumed(orders, WEBHOOK, API_KEY, selection=selection)
    assert leaked("api_key") | leaked("webhook_secret") == set()
    assert set(orders.updates().values()) == {1}
    assert orders.rotation("target") == f"{API_KEY} {WEBHOOK}"


def test_columns_that_belong_together(database: Database) -> None:
    models.Checked.objects.bulk_create(
        models.Checked(token=f"leaked {i}", checksum="leaked") for i in range(ROWS)
    )
    rotate_killed_and_resumed(
        database,
        "shop.Checked.token",
        "shop.Checked.checksum",
        selection=Selection(generator=f"{MADE_BY}token_and_checksum"),
    )
    for row in models.Checked.objects.all():
        assert row.checksum == hashlib.sha256(row.token.encode()).hexdigest()


@pytest.mark.parametrize(
    "model", quick(models.ByInteger, models.ByPair, slow=[models.ByMoment, models.ByDecimal, models.ByUuid])
)
def test_a_generator_that_wants_the_row(database: Database, model: Any) -> None:  # noqa: ANN401 - any of them
    make_rows(model, KEYS[model])
    rotate_killed_and_resumed(
        database,
        f"{model._meta.label}.as_custom",
        selection=Selection(generator=f"{MADE_BY}named_after_hash"),
    )
    for row in model.objects.all():
        assert row.as_custom.startswith(hashlib.sha256(str(row.pk).encode()).hexdigest()[:16])


def test_rows_committed_late_get_values_of_their_own_too(orders: Database) -> None:
    late = orders.connect()
    late.execute("BEGIN")
    late.execute(
        "INSERT INTO shop_order (created_at, status, is_paid, api_key, webhook_secret) VALUES"
        " (now(), 'active', true, 'leaked 100', '') RETURNING id"
    )

    def commit(event: Event) -> None:
        if isinstance(event, RangeCompleted) and late.info.transaction_status:
            late.execute("COMMIT")

    outcome = run(API_KEY, selection=Selection(generator=f"{MADE_BY}named_after"), observer=commit)
    assert outcome.status == "completed"
    for order in models.Order.objects.all():
        assert order.api_key.startswith(f"{order.pk}-")


BAD_GENERATORS = {
    "constant": "same value 100 times",
    "none": "returned None for api_key",
    "too_long": r"over its limit \(max_length 80\)",
    "raising": "raised RuntimeError",
    "exiting": "raised SystemExit",
    "cancelling": "raised CancelledError",
    "empty": "returned an empty value",
    "half_of_a_character": "for api_key that is not valid Unicode",
    "token_and_checksum": "mapping with checksum, token, but the fields are api_key",
    "blob": r"blob returned bytes for shop\.Order\.api_key, which stores text\. Return a str\.",
    "in_memory": "returned memoryview for",
    "pair": "returned tuple for",
    "pair_for_row": "returned tuple for",
    "in_list": "returned list for",
    "in_set": "returned set for",
    "in_mapping": "returned dict for",
    "no_text": "returned object for",
}


def test_a_bad_generator_is_found_out_before_anything_is_changed(orders: Database) -> None:
    for name, reason in BAD_GENERATORS.items():
        with pytest.raises(ValuesError, match=reason) as caught:
            run(API_KEY, selection=Selection(generator=MADE_BY + name))
        assert caught.value.__cause__ is None
    assert leaked() == set(range(ROWS))
    assert orders.execute("SELECT id FROM rotator_rotation") == []


@pytest.mark.parametrize("name", ["number", "uuid_for_row", "lazy_text"])
def test_a_generator_can_return_what_has_a_text_of_its_own(orders: Database, name: str) -> None:
    run(API_KEY, selection=Selection(generator=MADE_BY + name))
    assert leaked() == set()
    assert orders.execute("SELECT FROM shop_order WHERE api_key !~ '^[A-Za-z0-9_-]+$'") == []


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    "label", ["shop.ByInteger.as_text", "shop.ByInteger.as_custom", "shop.Client.encrypted"]
)
def test_bytes_are_no_text_for_any_field_that_stores_text(label: str) -> None:
    with pytest.raises(ValuesError, match=r"returned bytes for .*, which stores text"):
        run(label, selection=Selection(generator=f"{MADE_BY}blob"))


@pytest.mark.usefixtures("database")
def test_a_default_that_makes_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.ByInteger._meta.get_field("as_text"), "default", partial(os.urandom, 8))
    with pytest.raises(ValuesError, match=r"The default of .* returned bytes for shop\.ByInteger\.as_text"):
        run("shop.ByInteger.as_text", selection=Selection())


@pytest.mark.usefixtures("database")
def test_bytes_for_a_field_that_decodes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    models.ByInteger.objects.create(id=1)
    field = models.ByInteger._meta.get_field("as_custom")
    monkeypatch.setattr(field, "get_prep_value", lambda value: value if value is None else value.hex())
    run("shop.ByInteger.as_custom", selection=Selection(generator=f"{MADE_BY}few_bytes"))
    assert re.fullmatch("[0-9a-f]{16}", models.ByInteger.objects.get().as_custom[::-1])


def test_a_later_failure_names_the_range_and_the_rotation_can_be_resumed(orders: Database) -> None:
    selection = Selection(generator=f"{MADE_BY}later")
    outcome = run(API_KEY, selection=selection)
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    assert "over its limit (max_length 80)" in outcome.error
    assert "The range (" in outcome.error
    done = sum(rows for *_, rows in orders.checkpoints())
    assert 0 < done == ROWS - len(leaked()) < ROWS


@pytest.mark.parametrize("name", ["slow", "slow_for_row"])
def test_a_slow_generator_gets_smaller_ranges(
    orders: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(generators, "BULK_SECONDS", 0.06)
    monkeypatch.setattr(generators, "ROWS_SECONDS", 0.06)
    heard: list[Event] = []
    outcome = prepare(
        [API_KEY], "default", RunOptions(batch=ROWS), Selection(generator=MADE_BY + name)
    ).rotate(heard.append)
    assert_completed(outcome, rows=ROWS)
    assert leaked() == set()
    retried = [event for event in heard if isinstance(event, RangeRetried)]
    assert retried
    assert all(event.split for event in retried)
    assert retried[0].reason == f"the generator {MADE_BY}{name} is slow"
    assert len(orders.checkpoints()) > 3


REFUSED_GENERATORS = {
    "nowhere.at_all": "cannot be imported",
    f"{MADE_BY}nothing": "cannot be imported",
    "token": "cannot be called",
    f"{MADE_BY}two": "needs first, second",
    f"{MADE_BY}coroutine": "is a coroutine",
    "string.ascii_letters": "cannot be called",
}


def test_what_cannot_be_called_is_refused() -> None:
    for path, reason in REFUSED_GENERATORS.items():
        with pytest.raises(TargetError, match=reason):
            prepare([API_KEY], "default", OPTIONS, Selection(generator=path))


def test_a_hash_is_stored_as_the_generator_made_it(database: Database) -> None:
    models.Application.objects.bulk_create(models.Application() for _ in range(ROWS))
    table = table_of(models.Application, "secret")
    before = database.values(table)
    with pytest.raises(ValuesError, match="must return a mapping"):
        run("shop.Application.secret", selection=TOKEN)
    rotate_killed_and_resumed(
        database, "shop.Application.secret", selection=Selection(generator=f"{MADE_BY}hashed")
    )
    assert database.changed(before, table) == before.keys()


def test_a_neighbour_that_derives_nothing_from_it_is_left_alone(database: Database) -> None:
    models.Application.objects.bulk_create(models.Application() for _ in range(ROWS))
    before = database.values(table_of(models.Application, "secret"))
    assert_completed(run("shop.Application.nickname", selection=Selection()), rows=ROWS)
    assert database.values(table_of(models.Application, "secret")) == before


def test_what_saving_would_have_done_is_named() -> None:
    def hear(**_: object) -> None:
        pass

    labels = ["shop.Checked.token", "shop.Checked.checksum"]
    selection = Selection(generator=f"{MADE_BY}token_and_checksum")
    post_save.connect(hear, sender=models.Checked)
    try:
        bypassed = prepare(labels, "default", OPTIONS, selection).target.bypassed
    finally:
        post_save.disconnect(hear, sender=models.Checked)
    assert bypassed == (
        "changed_at (auto_now) keeps its value",
        "receivers of post_save are not called",
    )


# --- What cannot be a target -----------------------------------------------------------------------

REFUSED_TARGETS = {
    ("shop.Order.api_key",): "has no default .* --generator",
    ("shop.Order.created_at", "shop.Checked.token"): "are in different tables",
    ("shop.Order.id",): "is the primary key",
    ("shop.ByPair.number",): "is the primary key",
    ("shop.SpecialOrder.order_ptr",): "is the primary key",
    ("shop.Order.parent",): "refers to other rows",
    ("shop.Order.generated",): "is generated by the server",
    ("shop.Code.code",): r"shop\.Use\.code refers to shop\.Code\.code",
    ("shop.Application.secret",): "is a HashedField, which transforms .* --generator",
    ("shop.Application.name",): r"Name shop\.Application\.checksum as a target too",
    ("shop.Application.encrypted",): "through an SQL expression of its own",
}


def test_what_cannot_be_rotated_is_refused_with_the_reason() -> None:
    for labels, reason in REFUSED_TARGETS.items():
        with pytest.raises(TargetError, match=reason):
            prepare(labels, "default", OPTIONS)


def test_the_server_knows_of_what_the_models_do_not_say(database: Database) -> None:
    made = "CREATE TABLE shop_orderview (id bigint PRIMARY KEY, api_key text"
    cases = {
        "CREATE VIEW shop_orderview AS SELECT 1::bigint AS id, 'x'::text AS api_key": "is a view",
        "CREATE MATERIALIZED VIEW shop_orderview AS SELECT 1::bigint AS id": "is a materialized view",
        "CREATE TABLE shop_orderview (id bigint NOT NULL, api_key text)": "no index on its primary key",
        f"{made} GENERATED ALWAYS AS ('x') STORED)": "is generated by the server",
        f"{made}[])": "is an array",
        "CREATE TABLE shop_orderview (id bigint PRIMARY KEY)": "has no column api_key",
        "CREATE TABLE shop_orderview ()": "has no column id and no column api_key",
        "CREATE TABLE shop_orderview (id bigint NOT NULL, api_key text) PARTITION BY HASH (api_key);"
        "CREATE UNIQUE INDEX ON ONLY shop_orderview (api_key, id)": "no index on its primary key",
        "CREATE TABLE shop_orderview (id bigint UNIQUE, api_key text)": (
            "these columns of it allow NULL: id. Run ALTER TABLE ... ALTER COLUMN id SET NOT NULL"
        ),
        f"{made.replace('PRIMARY KEY', 'NOT NULL UNIQUE DEFERRABLE')})": "not deferrable",
        "CREATE TABLE shop_orderview (id bigint NOT NULL, api_key text);"
        "CREATE UNIQUE INDEX ON shop_orderview (id) WHERE id > 0": "not partial",
        'CREATE TABLE shop_orderview (id text COLLATE "C" NOT NULL, api_key text);'
        'CREATE UNIQUE INDEX ON shop_orderview (id COLLATE "POSIX")': "the columns' own collation",
        "CREATE TABLE shop_orderview (id text NOT NULL, api_key text);"
        "CREATE UNIQUE INDEX ON shop_orderview (id text_pattern_ops)": "default operator class",
        "CREATE TABLE shop_orderview (id bigint NOT NULL, api_key text);"
        "CREATE UNIQUE INDEX ON shop_orderview ((id + 0))": "no index on its primary key",
        "CREATE TABLE shop_orderview (id jsonb PRIMARY KEY, api_key text)": "not written as one text",
        "CREATE TABLE shop_orderview (id int[] PRIMARY KEY, api_key text)": "not written as one text",
        f"{made}); CREATE RULE twice AS ON UPDATE TO shop_orderview DO ALSO SELECT 1": "rule twice rewrites",
        f"{made} UNIQUE); CREATE TABLE shop_referrer (api_key text REFERENCES shop_orderview (api_key))": (
            "is referenced by shop_referrer"
        ),
        f"{made}); CREATE TABLE shop_child () INHERITS (shop_orderview)": "other tables inherit",
    }
    for statement, reason in cases.items():
        database.execute(statement)
        try:
            with pytest.raises(TargetError, match=reason):
                run("shop.OrderView.api_key", selection=TOKEN)
        finally:
            kind = (
                "TABLE" if " TABLE " in statement else "MATERIALIZED VIEW" if "MATER" in statement else "VIEW"
            )
            database.execute(f"DROP {kind} shop_orderview CASCADE")
            database.execute("DROP TABLE IF EXISTS shop_referrer, shop_child")
    with pytest.raises(TargetError, match="does not exist"):
        run("shop.OrderView.api_key", selection=TOKEN)


def test_all_columns_of_a_key_that_allow_null_are_named(database: Database) -> None:
    database.execute(
        "ALTER TABLE shop_bypair DROP CONSTRAINT shop_bypair_pkey,"
        " ALTER shop DROP NOT NULL, ALTER number DROP NOT NULL"
    )
    try:
        with pytest.raises(
            TargetError,
            match=r"these columns of it allow NULL: shop, number\. Run ALTER TABLE \.\.\. "
            r"ALTER COLUMN shop SET NOT NULL, ALTER COLUMN number SET NOT NULL\.$",
        ):
            run("shop.ByPair.as_char")
    finally:
        database.execute("ALTER TABLE shop_bypair ADD PRIMARY KEY (shop, number)")


def test_all_columns_that_cannot_be_rotated_are_named(database: Database) -> None:
    database.execute("ALTER TABLE shop_checked RENAME TO shop_checked_before")
    try:
        database.execute(
            "CREATE TABLE shop_checked (id bigint PRIMARY KEY, token text[], changed_at timestamptz,"
            " checksum text GENERATED ALWAYS AS ('x') STORED)"
        )
        with pytest.raises(
            TargetError,
            match=r"^The column checksum of public\.shop_checked is generated by the server.*\. "
            r"The column token of public\.shop_checked is an array.*\.$",
        ):
            run(
                "shop.Checked.token",
                "shop.Checked.checksum",
                selection=Selection(generator=f"{MADE_BY}token_and_checksum"),
            )
    finally:
        database.execute("DROP TABLE IF EXISTS shop_checked")
        database.execute("ALTER TABLE shop_checked_before RENAME TO shop_checked")


# --- The same alone goes on ------------------------------------------------------------------------


def test_another_selection_does_not_go_on(orders: Database) -> None:
    selection = Selection(filters=("status=active",), generator=TOKEN.generator)
    name = str(django_connection.settings_dict["NAME"])
    rotate_until_killed(name, [API_KEY], selection, options=OPTIONS, ranges=2)
    before = leaked()
    for other in (
        TOKEN,
        Selection(filters=("status=void",), generator=TOKEN.generator),
        Selection(filters=("status=active",), generator=f"{MADE_BY}letters"),
        Selection(filters=("status=active",), generator=TOKEN.generator, include_null=True),
    ):
        with pytest.raises(OptionError) as caught:
            run(API_KEY, selection=other)
        assert str(selection) in str(caught.value)
        assert str(other) in str(caught.value)
    assert leaked() == before
    assert_completed(run(API_KEY, selection=selection), rows=40)
    assert orders.rotation("selection") == json.loads(json.dumps(selection.to_json()))


def test_another_rotation_with_the_same_field_has_to_wait(orders: Database) -> None:
    name = str(django_connection.settings_dict["NAME"])
    rotate_until_killed(name, [API_KEY], TOKEN, options=OPTIONS, ranges=2)
    with pytest.raises(OwnedElsewhereError, match="has one of the same columns"):
        run(API_KEY, WEBHOOK, selection=Selection(generator=f"{MADE_BY}two_keys"))
    assert leaked("webhook_secret") == set(range(ROWS))
    assert_completed(run(WEBHOOK, selection=Selection()), rows=ROWS)
    assert_completed(run(API_KEY), rows=ROWS)
    assert len(orders.execute("SELECT id FROM rotator_rotation")) == 2


def test_another_model_of_the_same_column_has_to_wait(orders: Database) -> None:
    name = str(django_connection.settings_dict["NAME"])
    rotate_until_killed(name, [API_KEY], TOKEN, options=OPTIONS, ranges=2)
    # As a second model with the same db_table names it.
    orders.execute("UPDATE rotator_rotation SET target = 'twin.Order.api_key'")
    with pytest.raises(OwnedElsewhereError, match=r"of twin\.Order\.api_key is unfinished"):
        run(API_KEY)
    assert_completed(run(WEBHOOK, selection=Selection()), rows=ROWS)


@pytest.mark.parametrize("preflight", [False, True])
def test_a_completed_rotation_of_another_model_of_the_same_columns_is_not_repeated(
    orders: Database, *, preflight: bool
) -> None:
    selection = Selection(generator=f"{MADE_BY}two_keys")
    assert_completed(run(API_KEY, WEBHOOK, selection=selection), rows=ROWS)
    # As a second model with the same db_table names them, in another order.
    orders.execute("UPDATE rotator_rotation SET target = 'twin.Order.a twin.Order.key'")

    prepared = prepare([API_KEY, WEBHOOK], "default", replace(OPTIONS, preflight=preflight), selection)
    completed = prepared.earlier(lambda _event: None).completed
    assert completed is not None
    with pytest.raises(RotationRepeatedError, match=r"of twin\.Order\.a twin\.Order\.key completed at"):
        prepared.rotate(lambda _event: None)

    # One of the columns is not the same as both.
    assert_completed(run(API_KEY, selection=TOKEN), rows=ROWS)
    options = replace(OPTIONS, after=completed.id)
    repeated = prepare([API_KEY, WEBHOOK], "default", options, selection).rotate(lambda _event: None)
    assert_completed(repeated, rows=ROWS)


# --- Those who want to know ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_receivers_are_called_for_each_commit(orders: Database, kind: str) -> None:
    heard: list[dict[str, Any]] = []

    def hear(sender: object, **what: Any) -> None:  # noqa: ANN401 - whatever a signal carries
        del what["signal"]
        # Committed, so that other sessions see it.
        what["checkpoints"] = len(orders.checkpoints())
        heard.append(what | {"sender": sender})
        raise RuntimeError

    async def hear_too(sender: object, **what: Any) -> None:  # noqa: ANN401 - whatever a signal carries
        await asyncio.sleep(0)
        hear(sender, **what)

    range_rotated.connect(hear if kind == "function" else hear_too, sender=models.Order)
    try:
        outcome = run(API_KEY)
    finally:
        range_rotated.disconnect(hear if kind == "function" else hear_too, sender=models.Order)

    assert_completed(outcome, rows=ROWS)
    assert {what["sender"] for what in heard} == {models.Order}
    assert sum(what["rows"] for what in heard) == ROWS
    spans = {(what["after"] and what["after"][0], what["through"][0]) for what in heard}
    assert {(json.loads(a)[0] if a else None, json.loads(t)[0]) for a, t, _ in orders.checkpoints()} == spans
    assert all(
        what["checkpoints"] > 0 and what["rotation"] and what["database"] == "default" for what in heard
    )


def test_receivers_get_the_keys_of_late_rows(orders: Database) -> None:
    late = orders.connect()
    late.execute("BEGIN")
    ((number,),) = late.execute(
        "INSERT INTO shop_order (created_at, status, is_paid, api_key, webhook_secret) VALUES"
        " (now(), 'active', true, 'leaked 100', '') RETURNING id"
    ).fetchall()
    heard: list[list[Any]] = []

    @receiver(range_rotated)
    def hear(keys: list[list[Any]], **_: Any) -> None:  # noqa: ANN401 - whatever a signal carries
        heard.extend(keys)

    def commit(event: Event) -> None:
        if isinstance(event, RangeCompleted) and late.info.transaction_status:
            late.execute("COMMIT")

    run(API_KEY, observer=commit)
    assert heard in ([[number]], [])
    assert leaked() == set()


# --- From programs ---------------------------------------------------------------------------------


def test_a_script_does_what_the_command_does(orders: Database) -> None:
    heard: list[Event] = []
    stopped = rotate_sync(
        Target(API_KEY, filters=["status=active"], generator=TOKEN.generator),
        batch=BATCH,
        observer=heard.append,
    )
    assert (stopped.status, stopped.rows) == ("completed", 40)
    assert heard[-1] == stopped
    assert leaked() == {i for i in range(ROWS) if i % 3 == 0}
    assert orders.rotation("status") == "completed"


async def test_so_does_a_coroutine(orders: Database) -> None:
    stopped = await rotate(Target([API_KEY], generator=TOKEN.generator), concurrency=2, batch=BATCH)
    assert stopped.rows == ROWS
    assert orders.rotation("status") == "completed"


async def test_a_cancelled_call_leaves_a_rotation_that_can_be_resumed(orders: Database) -> None:
    target = Target(API_KEY, generator=TOKEN.generator)

    def stop(event: Event) -> None:
        if isinstance(event, RangeCompleted):
            task.cancel()

    task = asyncio.ensure_future(rotate(target, batch=1, concurrency=1, observer=stop))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert orders.rotation("status") == "interrupted"
    assert orders.rotation("stop_reason") == "cancellation by the calling program"
    stopped = await rotate(target)
    assert (stopped.resumed, stopped.rows) == (True, ROWS)


async def test_what_it_cannot_do_it_raises(orders: Database) -> None:
    with pytest.raises(OptionError, match="must be from 1 to"):
        await rotate(Target(API_KEY), batch=0)
    with pytest.raises(OptionError, match="--lock-timeout must be from 1ms to 24h"):
        await rotate(Target(API_KEY), lock_timeout=timedelta(0))
    with pytest.raises(OptionError, match="no database 'nope'"):
        await rotate(Target(API_KEY, database="nope"))
    with pytest.raises(TargetError, match="has no default"):
        await rotate(Target(API_KEY))
    orders.before_update("RAISE EXCEPTION 'no';", table_of(models.Order, "api_key"))
    with pytest.raises(RotationUnfinishedError) as caught:
        await rotate(Target(API_KEY, filters=["id__isnull=false"], generator=TOKEN.generator), batch=ROWS)
    assert caught.value.stopped.status == "failed"
    assert 8 <= len(caught.value.stopped.rejected_keys) < ROWS
    assert "the last 8 rows that were tried" in str(caught.value)
    assert isinstance(caught.value, RotatorError)


async def test_a_name_that_postgresql_has_shortened_is_refused(
    database: Database, control: psycopg.AsyncConnection
) -> None:
    # The last of the 63 bytes would be the first half of a character.
    long, short = "a" * 62 + "\u00e4b", "a" * 62
    database.execute(f'CREATE TABLE shop_orderview (id bigint PRIMARY KEY, "{long}" text)')
    try:
        read = partial(read_table, control, path=("shop_orderview",), key=("id",))
        assert (await read(columns=(short,))).oid
        with pytest.raises(TargetError) as refused:
            await read(columns=(long,))
    finally:
        database.execute("DROP TABLE shop_orderview")

    assert str(refused.value) == (
        f"PostgreSQL has shortened the name of the column {long} of shop_orderview to 63 bytes. Set "
        f"db_column = '{short}' in the model, then run the same command again."
    )
