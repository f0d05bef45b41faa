"""Every kind of key with every kind of secret: rotated, killed, resumed, and audited."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import connection as django_connection
from django.db.models import Model
from psycopg.sql import SQL, Identifier

from rotator.api import prepare
from rotator.events import Event, LimitRaised, RangeCompleted, RangeDeferred
from rotator.exceptions import TargetError
from rotator.options import RunOptions, Selection, WaitLimits
from rotator.postgres.table import TargetTable, identifier
from rotator.postgres.writer import RangeUpdate
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
from tests.integration.rotation_tables import SCHEMA, Database
from tests.pairs import all_pairs
from tests.shop import models

pytestmark = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

FIELDS = (
    "as_uuid",
    "as_char",
    "as_text",
    "as_bytes",
    "as_integer",
    "as_big_integer",
    "as_custom",
    "as_hex",
    "nullable",
)


@pytest.mark.parametrize(("model", "field"), all_pairs(KEYS, FIELDS))
def test_each_row_gets_one_new_value(database: Database, model: type[Model], field: str) -> None:
    make_rows(model, KEYS[model])
    table = table_of(model, field)
    database.count_updates(table)
    before, notes = database.values(table), database.values(table_of(model, "note"))
    nulls = {key for key, value in before.items() if value is None}
    assert bool(nulls) == (field == "nullable")

    rotate_killed_and_resumed(database, f"{model._meta.label}.{field}", rows=ROWS - len(nulls))

    after = database.values(table)
    assert database.updates() == Counter(before.keys() - nulls)
    assert database.changed(before, table) == before.keys() - nulls
    assert len(set(after.values()) - {None}) == ROWS - len(nulls)
    assert database.values(table_of(model, "note")) == notes
    # Django reads what was written.
    for row in model._default_manager.all():
        assert getattr(row, field) is None or getattr(row, field)


# --- Models of all kinds ---------------------------------------------------------------------------


@pytest.fixture
def odd(database: Database) -> Iterator[TargetTable]:
    table = table_of(models.Odd, "secret")
    schema = Identifier(table.path[0])
    database.execute(SQL("CREATE SCHEMA {}").format(schema))
    # Made by hand: Django's own quoting of such names is what the model relies on.
    database.execute(
        SQL("CREATE TABLE {} ({} bigserial PRIMARY KEY, {} varchar(40))").format(
            Identifier(*table.path), Identifier(table.key[0].name), Identifier(table.columns[0].name)
        )
    )
    yield table
    database.execute(SQL("DROP SCHEMA {} CASCADE").format(schema))


def test_odd_names_in_a_schema(database: Database, odd: TargetTable) -> None:
    database.execute(
        SQL("INSERT INTO {} ({}) SELECT 'leaked ' || i FROM generate_series(1, %s) i").format(
            odd.name, identifier(odd.columns[0].name)
        ),
        (ROWS,),
    )
    before = database.values(odd)
    rotate_killed_and_resumed(database, "shop.Odd.secret")
    assert database.changed(before, odd) == before.keys()


@pytest.fixture
def orders() -> None:
    for i in range(ROWS):
        models.SpecialOrder.objects.create(
            api_key=f"leaked {i}",
            status="void" if i % 3 == 0 else "active",
            created_at=START + timedelta(days=i),
            is_paid=i % 2 == 0,
        )


@pytest.mark.parametrize(
    "label", ["shop.SpecialOrder.api_key", "shop.OrderProxy.api_key", "shop.Order.api_key"]
)
@pytest.mark.usefixtures("orders")
def test_the_table_that_holds_the_column_is_rotated(database: Database, label: str) -> None:
    table = table_of(models.Order, "api_key")
    before = database.values(table)
    rotate_killed_and_resumed(database, label, selection=Selection(generator="tests.shop.generators.token"))
    assert database.changed(before, table) == before.keys()
    assert database.rotation("target") == "shop.Order.api_key"


@pytest.mark.usefixtures("orders")
def test_the_column_of_a_child_is_found_by_its_parents_key(database: Database) -> None:
    table = table_of(models.SpecialOrder, "coupon")
    before = database.values(table)
    rotate_killed_and_resumed(database, "shop.SpecialOrder.coupon")
    assert database.changed(before, table) == before.keys()


@pytest.fixture
def partitioned(database: Database) -> Iterator[TargetTable]:
    database.execute(
        "CREATE TABLE shop_partitioned (day date, number integer, secret varchar(40) NOT NULL,"
        " PRIMARY KEY (day, number)) PARTITION BY RANGE (day)"
    )
    for name, first, last in (("a", "2026-01-01", "2026-02-01"), ("b", "2026-02-01", "2027-01-01")):
        database.execute(
            f"CREATE TABLE shop_partition_{name} PARTITION OF shop_partitioned"
            f" FOR VALUES FROM ('{first}') TO ('{last}') PARTITION BY HASH (number)"
        )
        for part in range(2):
            database.execute(
                f"CREATE TABLE shop_partition_{name}{part} PARTITION OF shop_partition_{name}"
                f" FOR VALUES WITH (MODULUS 2, REMAINDER {part})"
            )
    yield table_of(models.Partitioned, "secret")
    database.execute("DROP TABLE shop_partitioned")


def test_a_partitioned_table(database: Database, partitioned: TargetTable) -> None:
    database.execute(
        "INSERT INTO shop_partitioned SELECT '2026-01-01'::date + i, i, 'leaked ' || i"
        f" FROM generate_series(1, {ROWS}) AS i"
    )
    database.count_updates(partitioned)
    before = database.values(partitioned)
    late = database.connect()
    late.execute("BEGIN")
    late.execute("UPDATE shop_partitioned SET secret = 'late' WHERE number = 50")

    def end_it(event: Event) -> None:
        # After its row was deferred: the range waits for the lock.
        if isinstance(event, RangeDeferred) and late.info.transaction_status:
            late.execute("COMMIT")

    outcome = prepare(["shop.Partitioned.secret"], "default", RunOptions(batch=BATCH), Selection()).rotate(
        end_it
    )

    assert outcome.status == "completed"
    assert database.changed(before, partitioned) == before.keys()
    assert set(database.values(partitioned).values()).isdisjoint({"late", *before.values()})
    assert outcome.storage is not None
    assert outcome.storage.heap_bytes > 0


def test_the_time_limit_of_a_range_allows_for_planning_many_partitions(
    database: Database, partitioned: TargetTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = RangeUpdate.planning_seconds

    async def planning_seconds(*arguments: Any) -> float:  # noqa: ANN401 - handed on
        # Planning takes milliseconds, and a busy machine does not run a statement in so short a time.
        return 1000 * await measure(*arguments)

    monkeypatch.setattr(RangeUpdate, "planning_seconds", planning_seconds)
    database.execute(
        "INSERT INTO shop_partitioned SELECT '2026-01-01'::date + i, i, 'leaked ' || i"
        f" FROM generate_series(1, {ROWS}) AS i"
    )
    before = database.values(partitioned)
    raised = list[LimitRaised]()
    # Less than planning takes.
    options = RunOptions(batch=BATCH, limits=WaitLimits(statement_seconds=0.001))

    outcome = prepare(["shop.Partitioned.secret"], "default", options, Selection()).rotate(
        lambda event: raised.append(event) if isinstance(event, LimitRaised) else None
    )

    assert outcome.status == "completed"
    assert database.changed(before, partitioned) == before.keys()
    (limit,) = raised
    assert limit.partitions == 4
    assert limit.statement_seconds == pytest.approx(0.001 + 2 * limit.planning_seconds)


def test_partitions_are_killed_and_resumed(database: Database, partitioned: TargetTable) -> None:
    database.execute(
        "INSERT INTO shop_partitioned SELECT '2026-01-01'::date + i, i, 'leaked ' || i"
        f" FROM generate_series(1, {ROWS}) AS i"
    )
    database.count_updates(partitioned)
    before = database.values(partitioned)
    rotate_killed_and_resumed(database, "shop.Partitioned.secret")
    assert database.updates() == Counter(before.keys())


def test_thirty_indexes(database: Database) -> None:
    make_rows(models.ByBigInteger, KEYS[models.ByBigInteger])
    for number in range(30):
        database.execute(
            f"CREATE INDEX thirty_{number} ON shop_bybiginteger (as_char, (as_integer % {number + 2}))"
        )
    table = table_of(models.ByBigInteger, "as_char")
    before = database.values(table)
    rotate_killed_and_resumed(database, "shop.ByBigInteger.as_char")
    assert database.changed(before, table) == before.keys()
    database.execute("DROP INDEX " + ", ".join(f"thirty_{number}" for number in range(30)))


# --- Keys under collations -------------------------------------------------------------------------

COLLATIONS = {
    "C": "provider = libc, locale = 'C'",
    "en_US of libc": "provider = libc, locale = 'en_US.UTF-8'",
    "ICU": "provider = icu, locale = 'en-US'",
    "ICU, digits as numbers": "provider = icu, locale = 'und-u-kn-kf-upper'",
    "ICU, regardless of case": "provider = icu, locale = 'und-u-ks-level2', deterministic = false",
}


def make_collation(database: Database, collation: str) -> None:
    database.execute(
        SQL(f"CREATE COLLATION {{}} ({COLLATIONS[collation]})").format(Identifier(SCHEMA, collation))
    )


@pytest.fixture
def words(database: Database) -> Iterator[TargetTable]:
    yield table_of(models.Word, "secret")
    database.execute("DROP TABLE IF EXISTS shop_word")


@pytest.mark.parametrize("collation", COLLATIONS)
def test_no_key_is_missed_or_met_twice(database: Database, words: TargetTable, collation: str) -> None:
    try:
        make_collation(database, collation)
    except psycopg.Error as error:
        pytest.skip(f"this server has no such collation ({type(error).__name__})")
    database.execute(
        SQL("CREATE TABLE shop_word (word text COLLATE {} PRIMARY KEY, secret uuid)").format(
            Identifier(SCHEMA, collation)
        )
    )
    spelled = [f"{a}{b}{c}" for a in "aAäÄzZ-" for b in ("", " ", "_", "10", "9", "ß") for c in "éEñ'"]
    database.execute(
        "INSERT INTO shop_word SELECT word, gen_random_uuid() FROM unnest(%s::text[]) AS word"
        " ON CONFLICT DO NOTHING",
        (spelled,),
    )
    database.count_updates(words)
    before = database.values(words)
    assert len(before) > ROWS

    rotate_killed_and_resumed(database, "shop.Word.secret", rows=len(before))

    assert database.updates() == Counter(before.keys())
    assert database.changed(before, words) == before.keys()


@pytest.mark.usefixtures("words")
def test_another_version_of_the_keys_collation_is_refused(database: Database) -> None:
    # C has no versions, for it never changes.
    for collation in ("ICU", "en_US of libc"):
        with suppress(psycopg.Error):
            make_collation(database, collation)
            break
    else:
        pytest.skip("this server has no collations with versions")
    database.execute(
        SQL("CREATE TABLE shop_word (word text COLLATE {} PRIMARY KEY, secret uuid)").format(
            Identifier(SCHEMA, collation)
        )
    )
    database.execute("INSERT INTO shop_word SELECT i, gen_random_uuid() FROM generate_series(1, 60) AS i")
    name = str(django_connection.settings_dict["NAME"])
    labels, options = ["shop.Word.secret"], RunOptions(batch=BATCH)
    rotate_until_killed(name, labels, Selection(), options=options, ranges=2)
    database.execute(
        "UPDATE rotator_rotation SET identity = jsonb_set(identity, '{key,0,collation_version}', '\"0.old\"')"
    )
    checkpoints = database.checkpoints()
    with pytest.raises(TargetError, match=r"had 0\.old.*--restart"):
        prepare(labels, "default", options).rotate(lambda _event: None)
    assert database.checkpoints() == checkpoints


# --- While others write ----------------------------------------------------------------------------


def test_random_keys_while_others_insert_a_thousand_a_second(database: Database) -> None:
    rows, made_by = 5_000, [str(field.column) for field in models.ByUuid._meta.concrete_fields]
    make_rows(models.ByUuid, KEYS[models.ByUuid])
    new = {"id": "gen_random_uuid()", "as_uuid": "gen_random_uuid()", "as_char": "gen_random_uuid()::text"}
    copied = ", ".join(new.get(name, name) for name in made_by)
    insert = (
        f"INSERT INTO shop_byuuid ({', '.join(made_by)}) SELECT {copied}"
        " FROM (SELECT * FROM shop_byuuid LIMIT 1) AS one, generate_series(1, %s)"
    )
    database.execute(insert, (rows,))
    database.execute("ANALYZE shop_byuuid")
    table = table_of(models.ByUuid, "as_uuid")
    before = database.values(table)
    neighbour, is_over, inserted = database.connect(), threading.Event(), 0

    def insert_now_and_then() -> None:
        nonlocal inserted
        while not is_over.wait(0.05):
            neighbour.execute(insert, (50,))
            inserted += 50

    with ThreadPoolExecutor(1) as threads:
        inserting = threads.submit(insert_now_and_then)
        try:
            prepared = prepare(["shop.ByUuid.as_uuid"], "default", RunOptions(batch=500))
            outcome = prepared.rotate(lambda _event: None)
        finally:
            is_over.set()
        inserting.result()

    assert outcome.status == "completed"
    assert inserted > 0
    after = database.values(table)
    assert all(after[key] != value for key, value in before.items())
    assert len(after) == len(before) + inserted


@pytest.mark.parametrize("generator", ["", "tests.shop.generators.uuid_for_namesake"])
@pytest.mark.parametrize("proves", [False, True])
def test_columns_with_the_names_of_our_own(database: Database, generator: str, *, proves: bool) -> None:
    key = ("rotator_position", "rotator_old_0", "rotator_key", "rotator_text", "jsonb_build_array")
    database.execute(
        f"CREATE TABLE shop_namesake ({', '.join(f'{name} integer' for name in key)},"
        f" rotator_place integer, digest uuid, PRIMARY KEY ({', '.join(key)}))"
    )
    insert = "INSERT INTO shop_namesake SELECT i, 2, 3, -i, i, 5, gen_random_uuid() FROM generate_series"
    late = database.connect()

    def commit(event: Event) -> None:
        if isinstance(event, RangeCompleted) and late.info.transaction_status:
            late.execute("COMMIT")

    try:
        database.execute(f"{insert}(1, {ROWS}) AS i")
        late.execute("BEGIN")
        late.execute(f"{insert}({ROWS + 1}, {ROWS + 5}) AS i".encode())
        if proves:
            # The ledger waits for such transactions.
            late.execute("COMMIT")
        before = database.execute("SELECT digest FROM shop_namesake")
        options = RunOptions(batch=BATCH, concurrency=2, vacuum=False, pace="full", prove=proves)
        prepared = prepare(["shop.Namesake.digest"], "default", options, Selection(generator=generator))
        stopped = prepared.rotate(commit)
        after = database.execute("SELECT digest FROM shop_namesake")
    finally:
        late.close()
        database.execute("DROP TABLE shop_namesake")

    assert_completed(stopped, rows=ROWS + 5)
    assert len(after) == ROWS + 5
    assert set(after).isdisjoint(before)
