"""What "completed" means while triggers and other sessions write to the table."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest

from rotator.events import Event, LateCommitsAwaited, RotationStopped
from rotator.models import Rotation
from rotator.options import Selection
from rotator.postgres import writer
from rotator.postgres.table import TargetTable
from tests.integration.outcomes import (
    CODES,
    ORDERS,
    SHOP,
    WEBHOOKS,
    EventRecorder,
    after_range,
    assert_unconfirmed,
    at_start,
    rotate,
)
from tests.integration.rotation_tables import TARGET, TICKETS, Database
from tests.pairs import all_pairs, quick
from tests.shop import models

pytestmark = SHOP

ROWS = 30
GENERATORS = "tests.shop.generators."
SOURCES = {
    "in bulk": Selection(),
    "from rows": Selection(generator=f"{GENERATORS}uuid_for_row"),
}
KEPT = {"the first": ORDERS, "the second": WEBHOOKS}
BOTH_KEYS = ["shop.Order.api_key", "shop.Order.webhook_secret"]
LATE = range(100, 110)

IN_A_SUBTRANSACTION = (
    "BEGIN UPDATE tickets_ticket SET title = 'touched' WHERE id = NEW.id;"
    " EXCEPTION WHEN division_by_zero THEN NULL; END;"
)

MakeTrigger = Callable[[Database, TargetTable], str]


def _put_back(table: TargetTable) -> str:
    name, (column, *_) = table.path[-1], table.columns
    return f"UPDATE {name} SET {column.name} = OLD.{column.name} WHERE id = OLD.id;"


def _before_row(condition: str) -> MakeTrigger:
    def make(database: Database, table: TargetTable) -> str:
        column = table.columns[0].name
        body = f"IF {condition} THEN NEW.{column} := OLD.{column}; END IF;"
        return database.make_trigger(body, table, timing="BEFORE UPDATE")

    return make


def _after_row(database: Database, table: TargetTable) -> str:
    return database.make_trigger(_put_back(table), table)


def _after_some_rows(database: Database, table: TargetTable) -> str:
    return database.make_trigger(f"IF OLD.id % 10 IN (2, 3) THEN {_put_back(table)} END IF;", table)


def _after_statement(database: Database, table: TargetTable) -> str:
    name, column = table.path[-1], table.columns[0].name
    return database.make_trigger(
        f"UPDATE {name} AS now SET {column} = was.{column} FROM was WHERE now.id = was.id;",
        table,
        each="STATEMENT",
        referencing="REFERENCING OLD TABLE AS was",
    )


def _deferred(database: Database, table: TargetTable) -> str:
    return database.make_trigger(_put_back(table), table, is_deferred=True)


def _in_a_subtransaction(database: Database, table: TargetTable) -> str:
    return database.make_trigger(
        f"BEGIN {_put_back(table)} EXCEPTION WHEN division_by_zero THEN NULL; END;", table
    )


def _by_insertion(database: Database, table: TargetTable) -> str:
    """Replace the row by what it was, which no update shows."""
    column = table.columns[0].name
    columns = {
        "tickets_ticket": "id, title, created_at, token",
        "shop_order": "id, created_at, status, is_paid, api_key, webhook_secret",
    }[table.path[-1]]
    values = ", ".join(
        f"{'OLD' if name == column else 'NEW'}.{name}" for name in columns.replace(",", "").split()
    )
    return database.make_trigger(
        f"DELETE FROM {table.path[-1]} WHERE id = OLD.id;"
        f" INSERT INTO {table.path[-1]} ({columns}) VALUES ({values});",
        table,
    )


KEEPING: dict[str, MakeTrigger] = {
    "BEFORE ROW": _before_row("true"),
    "AFTER ROW": _after_row,
    "AFTER STATEMENT": _after_statement,
    "deferred": _deferred,
    "in a subtransaction": _in_a_subtransaction,
    "by deleting and inserting": _by_insertion,
}
KEEPING_SOME: dict[str, MakeTrigger] = {
    "BEFORE ROW": _before_row("OLD.id % 10 IN (2, 3)"),
    "AFTER ROW": _after_some_rows,
}


def assert_refused(outcome: RotationStopped, trigger: str, *values: Mapping[str, Any]) -> None:
    """The run has failed for this trigger's sake, and says so without a value."""
    error = outcome.error
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    assert "still have their old values" in error
    assert trigger in error
    assert "run the same command again" in error
    assert not [value for each in values for value in each.values() if str(value) in error]
    rotation = Rotation.objects.get()
    assert (rotation.status, rotation.error) == ("failed", error)


# --- Triggers that keep old values -----------------------------------------------------------------


@pytest.mark.parametrize(("keeping", "source"), all_pairs(KEEPING, SOURCES))
def test_a_trigger_that_keeps_old_values_fails_the_run(database: Database, keeping: str, source: str) -> None:
    database.make_tickets(1, ROWS)
    trigger = KEEPING[keeping](database, TICKETS)
    before = database.values()

    outcome = rotate(TARGET, selection=SOURCES[source])

    assert outcome.error.startswith("Rows in the range ")
    assert_refused(outcome, trigger, before, database.values())
    assert database.values() == before
    assert database.checkpoints() == []

    database.execute(f'DROP TRIGGER "{trigger}" ON tickets_ticket')
    assert_unconfirmed(rotate(TARGET, selection=SOURCES[source]), 0)
    assert database.changed(before) == before.keys()


@pytest.mark.parametrize(("keeping", "kept_and_source"), all_pairs(KEEPING, product(KEPT, SOURCES)))
def test_a_trigger_that_keeps_one_of_two_columns_fails_the_run(
    database: Database, keeping: str, kept_and_source: tuple[str, str]
) -> None:
    kept, source = kept_and_source
    models.Order.objects.bulk_create(
        models.Order(id=i, api_key=f"leaked {i}", webhook_secret=f"leaked too {i}") for i in range(ROWS)
    )
    trigger = KEEPING[keeping](database, KEPT[kept])
    before = database.values(ORDERS), database.values(WEBHOOKS)
    generator = "two_keys" if source == "in bulk" else "two_keys_for_row"

    outcome = rotate(BOTH_KEYS, selection=Selection(generator=GENERATORS + generator))

    assert_refused(outcome, trigger, *before)
    assert (database.values(ORDERS), database.values(WEBHOOKS)) == before
    assert database.checkpoints() == []


def test_a_column_that_stays_null_is_not_one_that_a_trigger_keeps(database: Database) -> None:
    """A trigger writes to the table, so the values of every row are compared."""
    models.ByInteger.objects.bulk_create(
        models.ByInteger(id=i, nullable="leaked" if i % 2 else None, as_text="leaked") for i in range(ROWS)
    )
    table = TargetTable(path=("shop_byinteger",), key=ORDERS.key, columns=ORDERS.columns)
    database.make_trigger("UPDATE shop_byinteger SET note = 'touched' WHERE id = NEW.id;", table)

    outcome = rotate(["shop.ByInteger.nullable", "shop.ByInteger.as_text"])

    assert_unconfirmed(outcome, 0)
    assert not models.ByInteger.objects.filter(as_text="leaked").exists()
    assert not models.ByInteger.objects.filter(nullable="leaked").exists()
    assert models.ByInteger.objects.filter(nullable=None).count() == ROWS // 2


# Each kind of trigger meets the source that it does not meet above.
@pytest.mark.parametrize(("keeping", "source"), all_pairs(KEEPING, reversed(SOURCES)))
def test_late_rows_whose_values_a_new_trigger_keeps_are_all_named(
    database: Database, keeping: str, source: str
) -> None:
    outcome, trigger, late = _rotate_late_rows(database, KEEPING[keeping], SOURCES[source])

    _assert_rejected(outcome, trigger, *LATE)
    assert database.values() == late
    assert database.rotation("late_rows") == 0

    database.execute(f'DROP TRIGGER "{trigger}" ON tickets_ticket')
    assert_unconfirmed(rotate(TARGET, selection=SOURCES[source]), 0)
    assert database.changed(late) == {f"[{number}]" for number in LATE}


def _rotate_late_rows(
    database: Database, keeping: MakeTrigger, selection: Selection
) -> tuple[RotationStopped, str, dict[str, Any]]:
    """Rotate with a trigger that keeps values of late rows only; return its name, and the values before."""
    database.make_tickets(1, ROWS)
    older, triggers, late = _older(database), list[str](), dict[str, Any]()

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and len(database.checkpoints()) == ROWS // 10:
            older.execute("COMMIT")
            triggers.append(keeping(database, TICKETS))
            late.update(database.values())

    outcome = rotate(TARGET, commit, selection=selection)
    return outcome, triggers[0], late


def _older(database: Database) -> Any:  # noqa: ANN401 - a connection
    """A transaction, not over, that has inserted the late rows before any rotation."""
    older = database.connect()
    older.execute("BEGIN")
    older.execute(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " SELECT id, 'late', now(), gen_random_uuid() FROM unnest(%s::int[]) AS id",
        (list(LATE),),
    )
    return older


@pytest.mark.parametrize(("keeping", "source"), all_pairs(KEEPING_SOME, SOURCES))
def test_rows_whose_values_a_trigger_keeps_are_named_and_all_others_rotated(
    database: Database, keeping: str, source: str
) -> None:
    database.make_tickets(1, ROWS)
    trigger = KEEPING_SOME[keeping](database, TICKETS)
    before = database.values()

    outcome = rotate(TARGET, selection=SOURCES[source])

    _assert_rejected(outcome, trigger, 2, 3, 12, 13, 22, 23)
    assert database.changed(before) == before.keys() - {key for key, _ in outcome.rejected_keys}

    database.execute(f'DROP TRIGGER "{trigger}" ON tickets_ticket')
    assert_unconfirmed(rotate(TARGET, selection=SOURCES[source]), 0)
    assert database.changed(before) == before.keys()


@pytest.mark.parametrize(("keeping", "source"), all_pairs(KEEPING_SOME, SOURCES))
def test_late_rows_whose_values_a_trigger_keeps_are_named(
    database: Database, keeping: str, source: str
) -> None:
    outcome, trigger, late = _rotate_late_rows(database, KEEPING_SOME[keeping], SOURCES[source])

    _assert_rejected(outcome, trigger, 102, 103)
    assert database.changed(late) == {f"[{number}]" for number in LATE if number not in (102, 103)}
    assert database.rotation("late_rows") == len(LATE) - 2


def test_a_block_of_rows_whose_values_a_trigger_keeps_does_not_end_the_run(database: Database) -> None:
    database.make_tickets(1, 200)
    trigger = _before_row("OLD.id BETWEEN 101 AND 150")(database, TICKETS)
    before = database.values()

    outcome = rotate(TARGET, batch=200)

    _assert_rejected(outcome, trigger, *range(101, 151))
    assert database.changed(before) == before.keys() - {f"[{number}]" for number in range(101, 151)}


def test_a_block_of_rows_whose_values_a_trigger_keeps_does_not_end_a_resumed_run(database: Database) -> None:
    database.make_tickets(1, 200)
    trigger = _before_row("OLD.id BETWEEN 101 AND 150")(database, TICKETS)
    before = database.values()

    rotate(TARGET, batch=50, stop_after_rows=150)
    assert len(database.changed(before)) == 100
    outcome = rotate(TARGET, batch=50)

    _assert_rejected(outcome, trigger, *range(101, 151))
    assert database.changed(before) == before.keys() - {f"[{number}]" for number in range(101, 151)}


def test_a_single_row_of_a_filter_whose_value_a_trigger_keeps_is_named(database: Database) -> None:
    database.make_tickets(1, ROWS)
    trigger = _before_row("true")(database, TICKETS)

    outcome = rotate(TARGET, batch=ROWS, selection=Selection(filters=("id=7",)))

    _assert_rejected(outcome, trigger, 7)


def test_a_trigger_that_keeps_the_values_of_every_row_ends_a_run_of_small_ranges_too(
    database: Database,
) -> None:
    database.make_tickets(1, ROWS)
    trigger = KEEPING["BEFORE ROW"](database, TICKETS)

    outcome = rotate(TARGET, batch=5)

    assert outcome.error.startswith("The server rejected the last 8 rows that were tried, and rotated none")
    assert_refused(outcome, trigger, database.values())


def _assert_rejected(outcome: RotationStopped, trigger: str, *numbers: int) -> None:
    """These rows, and no others, are rejected for this trigger's sake."""
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    reason = (
        "rows still have their old values after the update, because one of the triggers that an update "
        f"fires restores them: {trigger}"
    )
    assert sorted(outcome.rejected_keys) == sorted((f"[{number}]", reason) for number in numbers)


# --- Triggers that write other rows ----------------------------------------------------------------


TOUCHING = {
    # Each row is written again by its own range.
    "ahead": ("UPDATE tickets_ticket SET title = 'touched' WHERE id = NEW.id + 3;", 0),
    "behind": ("UPDATE tickets_ticket SET title = 'touched' WHERE id = NEW.id - 3 AND (id - 1) / 20 = 0;", 3),
    # The last write of the rows up to 40 is that of the range after theirs.
    "in the range before": ("UPDATE tickets_ticket SET title = 'touched' WHERE id = NEW.id - 20;", 40),
    "one row": ("UPDATE tickets_ticket SET title = title || '!' WHERE id = 1;", 1),
    # A subtransaction has an id of its own, which no checkpoint has.
    "in a subtransaction": (IN_A_SUBTRANSACTION, 60),
}


@pytest.mark.parametrize(("touching", "source"), all_pairs(TOUCHING, SOURCES))
def test_rows_that_a_trigger_touches_get_a_new_value_too(
    database: Database, monkeypatch: pytest.MonkeyPatch, touching: str, source: str
) -> None:
    body, unconfirmed = TOUCHING[touching]
    monkeypatch.setattr(writer, "SLICE_ROWS", 7)
    database.make_tickets(1, 60)
    database.make_trigger(body)
    before, recorder = database.values(), EventRecorder()

    outcome = rotate(TARGET, recorder, batch=20, selection=SOURCES[source])

    assert_unconfirmed(outcome, unconfirmed)
    assert recorder.counted() == (60 - unconfirmed, unconfirmed)
    assert database.changed(before) == before.keys()


def test_a_statement_trigger_that_touches_the_whole_table_leaves_no_old_value(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SLICE_ROWS", 7)
    database.make_tickets(1, 60)
    database.make_trigger("UPDATE tickets_ticket SET title = 'touched';", each="STATEMENT")
    before = database.values()
    # The last range's transaction has written every row last, and only its own are known to be new.
    assert_unconfirmed(rotate(TARGET, batch=20), 40)
    assert database.changed(before) == before.keys()


def test_rows_outside_that_a_trigger_touches_are_not_confirmed(database: Database) -> None:
    database.make_tickets(1, ROWS)
    database.make_trigger("UPDATE tickets_ticket SET title = 'touched' WHERE id = 1000;")
    before, recorder = database.values(), EventRecorder(at_start(lambda: database.make_tickets(1000, 1000)))

    assert_unconfirmed(rotate(TARGET, recorder), 1)

    assert recorder.counted() == (ROWS, 1)
    after = database.values()
    assert all(after[key] != value for key, value in before.items())


@pytest.mark.parametrize("source", SOURCES)
def test_old_values_that_a_trigger_files_in_the_same_table_are_not_confirmed(
    database: Database, source: str
) -> None:
    database.make_tickets(1, ROWS)
    database.make_trigger(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " VALUES (OLD.id + 1000, 'history', now(), OLD.token);"
    )
    before, recorder = database.values(), EventRecorder()

    assert_unconfirmed(rotate(TARGET, recorder, selection=SOURCES[source]), ROWS)

    assert recorder.counted() == (ROWS, ROWS)
    after = database.values()
    assert all(after[key] != value for key, value in before.items())


def test_late_rows_that_a_trigger_touches_are_not_confirmed(database: Database) -> None:
    """Nothing tells them from the rows that the trigger wrote in the same transaction."""
    database.make_tickets(1, ROWS)
    older = _older(database)

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and len(database.checkpoints()) == ROWS // 10:
            older.execute("COMMIT")
            database.make_trigger("UPDATE tickets_ticket SET title = 'touched' WHERE id = NEW.id;")
            before.update(database.values())

    before: dict[str, Any] = {}
    assert_unconfirmed(rotate(TARGET, commit), len(LATE))
    assert database.changed(before) == {f"[{number}]" for number in LATE}


# --- Rows that other sessions write ----------------------------------------------------------------

OTHERS = {
    "a key changes to one above the bound": "UPDATE tickets_ticket SET id = id + 1000 WHERE id = 25",
    "a key changes to one in a completed range": "UPDATE tickets_ticket SET id = -25 WHERE id = 25",
    "a key of a completed range changes": "UPDATE tickets_ticket SET id = 1005 WHERE id = 5",
    "a stale save": "UPDATE tickets_ticket SET token = token, title = 'saved' WHERE id = 5",
    "an insert above the bound": (
        "INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (99, '', now(), gen_random_uuid())"
    ),
    "an insert in a completed range": (
        "INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (-1, '', now(), gen_random_uuid())"
    ),
}


@pytest.mark.parametrize("statement", OTHERS.values(), ids=OTHERS)
def test_rows_that_others_write_during_a_run_are_not_confirmed(database: Database, statement: str) -> None:
    database.make_tickets(1, ROWS)
    recorder = EventRecorder(after_range(1, lambda: database.execute(statement)))
    assert_unconfirmed(rotate(TARGET, recorder), 1)
    confirmed, unconfirmed = recorder.counted()
    assert confirmed + unconfirmed == len(database.values())


@pytest.mark.parametrize(
    "other", quick("a stale save", slow=[name for name in OTHERS if name != "a stale save"])
)
def test_rows_that_others_write_between_two_runs_are_not_confirmed(database: Database, other: str) -> None:
    statement = OTHERS[other]
    database.make_tickets(1, ROWS)
    rotate(TARGET, stop_after_rows=10)
    database.execute(statement)
    recorder = EventRecorder()
    assert_unconfirmed(rotate(TARGET, recorder), 1)
    confirmed, unconfirmed = recorder.counted()
    assert confirmed + unconfirmed == len(database.values())


def test_rows_that_others_write_before_their_range_are_confirmed(database: Database) -> None:
    database.make_tickets(1, ROWS)
    recorder = EventRecorder(at_start(lambda: database.execute("UPDATE tickets_ticket SET title = 'saved'")))
    assert_unconfirmed(rotate(TARGET, recorder), 0)
    assert recorder.counted() == (ROWS, 0)


def test_others_rows_do_not_get_another_value(database: Database) -> None:
    """The application may have given it to a customer a second ago."""
    database.make_tickets(1, ROWS)
    given: dict[str, Any] = {}

    def insert() -> None:
        database.make_tickets(100, 110)
        given.update((key, value) for key, value in database.values().items() if len(key) == len("[100]"))

    assert_unconfirmed(rotate(TARGET, EventRecorder(after_range(1, insert))), len(range(100, 111)))
    after = database.values()
    assert {key: after[key] for key in given} == given


def test_with_a_filter_only_rows_that_match_are_counted(database: Database) -> None:
    database.make_tickets(1, ROWS)
    database.execute("UPDATE tickets_ticket SET title = 'matches' WHERE id % 2 = 0")

    def write() -> None:
        database.execute("UPDATE tickets_ticket SET created_at = now() WHERE id IN (1, 2, 3, 4, 6)")
        database.make_tickets(100, 110)

    recorder = EventRecorder(after_range(1, write))
    outcome = rotate(TARGET, recorder, selection=Selection(filters=("title=matches",)), batch=10)
    assert_unconfirmed(outcome, 3)
    assert recorder.counted() == (ROWS // 2 - 3, 3)


def test_rows_that_are_deleted_are_counted_nowhere(database: Database) -> None:
    database.make_tickets(1, ROWS)
    recorder = EventRecorder(
        after_range(1, lambda: database.execute("DELETE FROM tickets_ticket WHERE id IN (3, 25)"))
    )
    assert_unconfirmed(rotate(TARGET, recorder), 0)
    assert recorder.counted() == (ROWS - 2, 0)


def test_the_run_waits_for_an_older_transaction_that_still_writes(database: Database) -> None:
    """Its rows look older than the start, whenever it writes them."""
    database.make_tickets(1, ROWS)
    older = _older(database)

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and older.info.transaction_status:
            older.execute("UPDATE tickets_ticket SET title = 'saved' WHERE id = 5")
            older.execute("COMMIT")

    recorder = EventRecorder(commit)
    before = database.values()
    assert_unconfirmed(rotate(TARGET, recorder), 0)
    assert recorder.counted() == (ROWS + len(LATE), 0)
    assert before.items().isdisjoint(database.values().items())


# --- Values that equal the old ones by chance ------------------------------------------------------


@pytest.mark.parametrize(
    ("type_name", "generator"),
    all_pairs(["text", "varchar(5)", "char(5)", "numeric(5, 2)"], ["digit", "digit_for_row"]),
)
def test_each_value_differs_from_the_old_one_even_where_there_are_few(
    database: Database, coded: Callable[[str], TargetTable], type_name: str, generator: str
) -> None:
    table = coded(type_name)
    database.execute(
        f"INSERT INTO shop_coded SELECT i, (i % 5)::text::{type_name} FROM generate_series(1, 80) AS i"
    )
    before = database.values(table)
    outcome = rotate(CODES, batch=2, selection=Selection(generator=GENERATORS + generator))
    assert_unconfirmed(outcome, 0)
    assert database.changed(before, table) == before.keys()


def test_late_values_differ_from_the_old_ones_too(
    database: Database, coded: Callable[[str], TargetTable]
) -> None:
    table = coded("char(5)")
    older = database.connect()
    older.execute("BEGIN")
    older.execute("INSERT INTO shop_coded SELECT i, i % 5 FROM generate_series(1, 80) AS i")
    before: dict[str, Any] = {}

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and recorder.has_started and not before:
            older.execute("COMMIT")
            before.update(database.values(table))

    recorder = EventRecorder(commit)
    selection = Selection(generator=f"{GENERATORS}digit")
    assert_unconfirmed(rotate(CODES, recorder, batch=2, selection=selection), 0)
    assert database.changed(before, table) == before.keys() != set()
    assert database.rotation("late_rows") == 80
