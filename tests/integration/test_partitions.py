"""Partitions that come, go and come back while a rotation is under way."""

from itertools import product

import pytest
from psycopg import errors

from rotator.api import prepare
from rotator.exceptions import TargetError
from rotator.options import RunOptions, Selection
from rotator.postgres.table import Column, TargetTable
from tests.integration.outcomes import SHOP, EventRecorder, after_range, assert_unconfirmed, at_start, rotate
from tests.integration.rotation_tables import MONTH, Database, fill
from tests.pairs import all_pairs

pytestmark = SHOP

LABEL = "shop.Partitioned.secret"
DAYS = TargetTable(
    path=("shop_partitioned",),
    key=(Column(name="day", type_name="date"), Column(name="number", type_name="int4")),
    columns=(Column(name="secret", type_name="varchar"),),
)
ROWS = 40
SOURCES = {
    "in bulk": Selection(),
    "from rows": Selection(generator="tests.shop.generators.token_for_row"),
}
RELOADED = (
    "CREATE TABLE shop_copy AS SELECT day, number, 'leaked ' || number FROM shop_january;"
    "TRUNCATE shop_january;INSERT INTO shop_january SELECT * FROM shop_copy;DROP TABLE shop_copy"
)


def leaked(database: Database) -> int:
    """The number of rows that have their old value."""
    ((rows,),) = database.execute("SELECT count(*) FROM shop_partitioned WHERE secret LIKE 'leaked %'")
    return int(rows)


def make_february(database: Database, kind: str) -> None:
    """Make a table of the parent's shape: a plain one, or one with partitions."""
    by = "" if kind == "plain" else "PARTITION BY HASH (number)"
    database.execute(f"CREATE TABLE shop_february (LIKE shop_partitioned INCLUDING ALL) {by}")
    if by:
        for part in range(2):
            database.execute(
                f"CREATE TABLE shop_february_{part} PARTITION OF shop_february"
                f" FOR VALUES WITH (MODULUS 2, REMAINDER {part})"
            )


def attach(database: Database, name: str, first: int) -> None:
    database.execute(
        f"ALTER TABLE shop_partitioned ATTACH PARTITION shop_{name} {MONTH.format(first, first + 1)}"
    )


# --- Attached --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind_and_source", "ranges"), all_pairs(product(["plain", "partitioned"], SOURCES), [1, 3, 4])
)
def test_old_rows_of_an_attached_table_are_rotated(
    days: Database, kind_and_source: tuple[str, str], ranges: int
) -> None:
    kind, source = kind_and_source
    make_february(days, kind)
    fill(days, "shop_february", "2026-02-01")
    recorder = EventRecorder(after_range(ranges, lambda: attach(days, "february", 2)))
    outcome = rotate(LABEL, recorder, selection=SOURCES[source])
    assert_unconfirmed(outcome, 0)
    assert recorder.counted() == (60, 0)
    assert leaked(days) == 0


@pytest.mark.parametrize(("kind", "source"), all_pairs(["plain", "partitioned"], SOURCES))
def test_rows_that_were_written_after_the_start_and_before_the_attachment_are_rotated(
    days: Database, kind: str, source: str
) -> None:
    make_february(days, kind)

    def fill_and_attach() -> None:
        fill(days, "shop_february", "2026-02-01")
        attach(days, "february", 2)

    recorder = EventRecorder(after_range(3, fill_and_attach))
    assert_unconfirmed(rotate(LABEL, recorder, selection=SOURCES[source]), 0)
    assert leaked(days) == 0


def test_rows_of_the_attaching_transaction_are_rotated(days: Database) -> None:
    make_february(days, "plain")

    def fill_and_attach() -> None:
        days.execute("BEGIN")
        fill(days, "shop_february", "2026-02-01")
        attach(days, "february", 2)
        days.execute("COMMIT")

    assert_unconfirmed(rotate(LABEL, EventRecorder(after_range(3, fill_and_attach))), 0)
    assert leaked(days) == 0


def test_rows_that_are_written_after_the_attachment_are_left_as_they_are(days: Database) -> None:
    """However many transactions there are while the attached rows are rotated."""
    make_february(days, "plain")
    fill(days, "shop_february", "2026-02-01")

    def attach_and_write() -> None:
        attach(days, "february", 2)
        fill(days, "shop_partitioned", "2026-02-21", "issued", 5)

    # After the last range.
    recorder = EventRecorder(after_range(14, attach_and_write))
    assert_unconfirmed(rotate(LABEL, recorder, batch=3), 5)
    assert recorder.counted() == (60, 5)
    assert leaked(days) == 0
    assert days.execute("SELECT count(*) FROM shop_partitioned WHERE secret LIKE 'issued %'") == [(5,)]


def test_attached_between_two_runs(days: Database) -> None:
    rotate(LABEL, stop_after_rows=30)
    make_february(days, "partitioned")
    fill(days, "shop_february", "2026-02-01")
    attach(days, "february", 2)
    outcome = rotate(LABEL)
    assert_unconfirmed(outcome, 0)
    assert outcome.late_rows == 20
    assert leaked(days) == 0


def test_attached_rows_that_match_no_filter_are_left_alone(days: Database) -> None:
    make_february(days, "plain")
    fill(days, "shop_february", "2026-02-01")
    recorder = EventRecorder(after_range(2, lambda: attach(days, "february", 2)))
    outcome = rotate(LABEL, recorder, selection=Selection(filters=("number__lt=5",)), batch=3)
    assert_unconfirmed(outcome, 0)
    assert recorder.counted() == (15, 0)
    assert leaked(days) == 45


# --- Detached and back -----------------------------------------------------------------------------


PUT_BACK = {
    "all": "UPDATE shop_january SET secret = 'leaked ' || number",
    "some": "UPDATE shop_january SET secret = 'leaked ' || number WHERE number % 3 = 0",
    # Another file, in which no row has an older transaction.
    "reloaded": RELOADED,
}


@pytest.mark.parametrize(("put_back", "is_between_runs"), all_pairs(PUT_BACK, [False, True]))
def test_old_values_that_are_put_back_into_a_detached_partition_are_rotated(
    days: Database, put_back: str, *, is_between_runs: bool
) -> None:
    def detach_and_attach() -> None:
        days.execute("ALTER TABLE shop_partitioned DETACH PARTITION shop_january")
        for statement in PUT_BACK[put_back].split(";"):
            days.execute(statement)
        attach(days, "january", 1)

    if is_between_runs:
        rotate(LABEL, stop_after_rows=30)
        detach_and_attach()
        outcome = rotate(LABEL)
    else:
        outcome = rotate(LABEL, EventRecorder(after_range(3, detach_and_attach)))
    assert_unconfirmed(outcome, 0)
    assert leaked(days) == 0


@pytest.mark.parametrize("name", ["january", "march"])
def test_a_partition_that_is_detached_and_comes_back_is_not_rotated_twice(days: Database, name: str) -> None:
    days.count_updates(DAYS)

    def detach_and_attach() -> None:
        days.execute(f"ALTER TABLE shop_partitioned DETACH PARTITION shop_{name}")
        attach(days, name, {"january": 1, "march": 3}[name])

    assert_unconfirmed(rotate(LABEL, EventRecorder(after_range(4, detach_and_attach))), 0)
    assert set(days.updates().values()) == {1}


def test_a_leaf_of_a_partition_comes_back_with_old_values(days: Database) -> None:
    def detach_and_attach() -> None:
        days.execute("ALTER TABLE shop_march DETACH PARTITION shop_march_1")
        days.execute("UPDATE shop_march_1 SET secret = 'leaked ' || number")
        days.execute(
            "ALTER TABLE shop_march ATTACH PARTITION shop_march_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
        )

    assert_unconfirmed(rotate(LABEL, EventRecorder(after_range(4, detach_and_attach))), 0)
    assert leaked(days) == 0


# --- New, dropped, moved ---------------------------------------------------------------------------


def test_rows_of_a_new_partition_are_left_as_they_are(days: Database) -> None:
    def make() -> None:
        days.execute(f"CREATE TABLE shop_february PARTITION OF shop_partitioned {MONTH.format(2, 3)}")
        fill(days, "shop_partitioned", "2026-02-01", "issued", 5)

    recorder = EventRecorder(after_range(3, make))
    assert_unconfirmed(rotate(LABEL, recorder), 5)
    assert recorder.counted() == (40, 5)
    assert days.execute("SELECT count(*) FROM shop_partitioned WHERE secret LIKE 'issued %'") == [(5,)]
    assert leaked(days) == 0


@pytest.mark.parametrize(("name", "ranges"), all_pairs(["january", "march"], [1, 3]))
def test_a_partition_that_is_dropped_is_not_missed(days: Database, name: str, ranges: int) -> None:
    recorder = EventRecorder(after_range(ranges, lambda: days.execute(f"DROP TABLE shop_{name}")))
    assert_unconfirmed(rotate(LABEL, recorder), 0)
    assert recorder.counted() == (20, 0)
    assert leaked(days) == 0


def test_rows_that_move_to_another_partition_are_not_confirmed(days: Database) -> None:
    def move() -> None:
        # One from a range that is to come to one that is completed, and one the other way.
        days.execute("UPDATE shop_partitioned SET day = '2026-01-06' WHERE day = '2026-03-15'")
        days.execute("UPDATE shop_partitioned SET day = '2026-03-30' WHERE day = '2026-01-05'")

    recorder = EventRecorder(after_range(2, move))
    assert_unconfirmed(rotate(LABEL, recorder), 2)
    assert recorder.counted() == (38, 2)
    assert leaked(days) == 1


def test_rows_that_move_before_their_range_are_confirmed(days: Database) -> None:
    def move() -> None:
        days.execute(
            "UPDATE shop_partitioned SET number = number + 1 WHERE day >= '2026-03-01' AND number < 19"
        )

    recorder = EventRecorder(at_start(move))
    assert_unconfirmed(rotate(LABEL, recorder), 0)
    assert leaked(days) == 0


@pytest.mark.parametrize("keeps", ["january", "march_0", "partitioned"])
def test_a_trigger_of_a_partition_that_keeps_old_values_is_named(days: Database, keeps: str) -> None:
    table = TargetTable(path=(f"shop_{keeps}",), key=DAYS.key, columns=DAYS.columns)
    trigger = days.make_trigger("NEW.secret := OLD.secret;", table, timing="BEFORE UPDATE")
    outcome = rotate(LABEL)
    assert outcome.status == "failed"
    # Of a range, one partition by hash has only some of the rows, which are rejected one by one.
    said = {outcome.error} if keeps != "march_0" else {reason for _, reason in outcome.rejected_keys}
    assert said
    assert all(trigger in each and "leaked" not in each for each in said)
    assert leaked(days) == ROWS - sum(rows for *_, rows in days.checkpoints())


def test_a_trigger_that_writes_to_another_partition_is_noticed(days: Database) -> None:
    table = TargetTable(path=("shop_march",), key=DAYS.key, columns=DAYS.columns)
    days.make_trigger(
        "UPDATE shop_partitioned SET secret = secret WHERE day = '2026-01-03' AND number = 2;", table
    )
    recorder = EventRecorder()
    assert_unconfirmed(rotate(LABEL, recorder), 1)
    assert recorder.counted() == (39, 1)
    assert leaked(days) == 0


@pytest.mark.parametrize("is_between_runs", [False, True])
def test_one_partition_that_is_rewritten_is_noticed(days: Database, *, is_between_runs: bool) -> None:
    def reload() -> None:
        days.execute("CREATE TEMP TABLE copy AS SELECT day, number FROM shop_january")
        days.execute("TRUNCATE shop_january")
        days.execute("INSERT INTO shop_january SELECT day, number, 'leaked ' || number FROM copy")
        days.execute("DROP TABLE copy")

    if is_between_runs:
        rotate(LABEL, stop_after_rows=30)
        reload()
        with pytest.raises(TargetError, match=r"rewritten every row.*--restart"):
            rotate(LABEL)
    else:
        outcome = rotate(LABEL, EventRecorder(after_range(3, reload)))
        assert outcome.status == "failed"
        assert "--restart" in outcome.error
    assert_unconfirmed(rotate(LABEL, restart=True), 0)
    assert leaked(days) == 0


def test_a_partitioned_table_is_proved_guarded_and_repaired(days: Database) -> None:
    days.execute("UPDATE shop_partitioned SET secret = md5(secret || day)")
    days.execute("CREATE TABLE shop_old AS SELECT * FROM shop_partitioned")
    stale = (
        "UPDATE shop_partitioned p SET secret = o.secret FROM shop_old o WHERE o.day = p.day"
        " AND o.number = p.number AND o.number = 7"
    )
    try:
        outcome = rotate(LABEL, prove=True, guard="refuse")
        assert outcome.verification is not None
        assert outcome.verification.is_verified
        with pytest.raises(errors.CheckViolation):
            days.execute(stale)
        replica = days.connect()
        replica.execute("SET session_replication_role = replica")
        replica.execute(stale.encode())
        verified = prepare([LABEL], "default", RunOptions()).verify(
            EventRecorder(), outcome.rotation, repairs=True
        )
        assert (verified.repaired, verified.is_verified) == (2, True)
    finally:
        days.execute("DROP TABLE shop_old")


@pytest.mark.parametrize(
    ("kind", "source"), [("plain", "in bulk"), ("partitioned", "in bulk"), ("plain", "from rows")]
)
def test_old_rows_of_an_attached_table_enter_the_ledger(days: Database, kind: str, source: str) -> None:
    make_february(days, kind)
    fill(days, "shop_february", "2026-02-01")
    days.execute("UPDATE shop_partitioned SET secret = md5(secret || day)")
    days.execute("UPDATE shop_february SET secret = md5(secret || day)")
    days.execute("CREATE TABLE shop_old AS SELECT * FROM shop_february")
    try:
        recorder = EventRecorder(after_range(1, lambda: attach(days, "february", 2)))
        outcome = rotate(LABEL, recorder, selection=SOURCES[source], prove=True)
        assert_unconfirmed(outcome, 0)
        days.execute(
            "UPDATE shop_partitioned p SET secret = o.secret FROM shop_old o WHERE o.day = p.day"
            " AND o.number = p.number AND o.number < 7"
        )
        verified = prepare([LABEL], "default", RunOptions(), SOURCES[source]).verify(
            EventRecorder(), outcome.rotation, repairs=False
        )
        assert verified.survivors == 7
    finally:
        days.execute("DROP TABLE shop_old")


def test_a_reference_to_a_partition_is_refused(days: Database) -> None:
    days.execute("ALTER TABLE shop_january ADD UNIQUE (secret)")
    days.execute("CREATE TABLE shop_reference (secret varchar REFERENCES shop_january (secret))")
    try:
        with pytest.raises(TargetError, match="is referenced by shop_reference"):
            rotate(LABEL)
    finally:
        days.execute("DROP TABLE shop_reference")
