"""A rotation that is resumed on something else than it was begun on, or on a table that was rewritten."""

import json
import re
from collections.abc import Callable, Mapping

import pytest

from rotator.events import ConfirmationStarted, Event, LateCommitsAwaited, RotationStopped
from rotator.exceptions import TargetError
from rotator.models import Rotation
from rotator.postgres.table import TargetTable
from rotator.runner import acquire
from tests.integration.outcomes import (
    CODES,
    SHOP,
    EventRecorder,
    after_range,
    assert_unconfirmed,
    at_start,
    rotate,
)
from tests.integration.rotation_tables import END_THE_ROTATOR, TARGET, Database
from tests.pairs import all_pairs, quick

pytestmark = SHOP

ROWS = 40
FILL = "INSERT INTO shop_coded SELECT i, 'leaked ' || i FROM generate_series(1, 40) AS i"
MakeTable = Callable[[str], TargetTable]


@pytest.fixture
def table(database: Database, coded: MakeTable) -> TargetTable:
    new_values = coded("text")
    database.execute(FILL)
    return new_values


def leaked(database: Database) -> int:
    """The number of codes that have their old value."""
    ((rows,),) = database.execute("SELECT count(*) FROM shop_coded WHERE secret LIKE 'leaked %'")
    return int(rows)


def assert_one_sentence(error: str) -> None:
    """It says what is the matter, and ends with what to do."""
    named = rf"({re.escape(CODES)}|\S+\.shop_coded)"
    assert re.match(f"Cannot continue rotation {Rotation.objects.latest('pk').pk} of {named}: ", error)
    assert error.endswith("Rotate all rows again with --restart.")
    assert "leaked" not in error


def assert_restart_rotates_all(database: Database, rows: int = ROWS) -> None:
    outcome = rotate(CODES, restart=True)
    assert_unconfirmed(outcome, 0)
    assert outcome.rows == rows
    assert not leaked(database)


def assert_resuming_is_refused(database: Database, reason: str) -> None:
    """The next run changes nothing and gives the reason."""
    before, checkpoints = database.execute("SELECT * FROM shop_coded"), database.checkpoints()
    with pytest.raises(TargetError, match=reason) as caught:
        rotate(CODES)
    assert_one_sentence(str(caught.value))
    assert database.checkpoints() == checkpoints
    assert database.execute("SELECT * FROM shop_coded") == before


def assert_failed(outcome: RotationStopped, reason: str) -> None:
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    assert re.search(reason, outcome.error)
    assert_one_sentence(outcome.error)


# --- Another table, key, database or server --------------------------------------------------------

RESTORED = "DROP TABLE shop_coded; CREATE TABLE shop_coded (id bigint PRIMARY KEY, secret text); " + FILL
SWAPPED = (
    "CREATE TABLE shop_copy AS SELECT id, 'leaked ' || id AS secret FROM shop_coded;"
    " ALTER TABLE shop_copy ADD PRIMARY KEY (id);"
    " DROP TABLE shop_coded; ALTER TABLE shop_copy RENAME TO shop_coded"
)
OTHER_TABLES = {
    "dropped and restored": RESTORED,
    "a copy with the same name": SWAPPED,
    "two tables that change their names": (
        "CREATE TABLE shop_other (LIKE shop_coded INCLUDING ALL); ALTER TABLE shop_coded RENAME TO shop_old;"
        " ALTER TABLE shop_other RENAME TO shop_coded; INSERT INTO shop_coded SELECT * FROM shop_old;"
        " DROP TABLE shop_old"
    ),
}


def execute_script(database: Database, script: str) -> None:
    for statement in script.split(";"):
        database.execute(statement)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("script", OTHER_TABLES.values(), ids=OTHER_TABLES)
def test_another_table_of_the_same_name_is_refused_between_runs(database: Database, script: str) -> None:
    rotate(CODES, stop_after_rows=20)
    execute_script(database, script)
    assert_resuming_is_refused(database, r"table is another one: its oid is \d+ and was \d+")
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("other", quick("dropped and restored", slow=[*OTHER_TABLES][1:]))
def test_another_table_of_the_same_name_fails_the_run(database: Database, other: str) -> None:
    script = OTHER_TABLES[other]
    outcome = rotate(CODES, EventRecorder(after_range(2, lambda: execute_script(database, script))))
    assert_failed(outcome, r"table is another one: its oid is \d+ and was \d+")
    assert_resuming_is_refused(database, "table is another one")
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
def test_no_row_of_another_table_of_the_same_name_is_written(database: Database) -> None:
    script = (
        "CREATE TABLE shop_other (LIKE shop_coded INCLUDING ALL);"
        " INSERT INTO shop_other SELECT id, 'fresh ' || id FROM shop_coded;"
        " ALTER TABLE shop_coded RENAME TO shop_old; ALTER TABLE shop_other RENAME TO shop_coded"
    )
    outcome = rotate(CODES, EventRecorder(after_range(2, lambda: execute_script(database, script))))
    assert_failed(outcome, r"table is another one: its oid is \d+ and was \d+")
    ((fresh,),) = database.execute("SELECT count(*) FROM shop_coded WHERE secret LIKE 'fresh %'")
    assert fresh == ROWS
    database.execute("DROP TABLE shop_old")


OTHER_COLUMNS = {
    "two columns that change their names": (
        "ALTER TABLE shop_coded RENAME secret TO legacy; ALTER TABLE shop_coded RENAME other TO secret"
    ),
    "dropped and added with a constant": (
        "ALTER TABLE shop_coded DROP secret; ALTER TABLE shop_coded ADD secret text DEFAULT 'leaked constant'"
    ),
}


@pytest.fixture
def other_column(database: Database, table: TargetTable) -> TargetTable:
    """A table with a second column of leaked values."""
    database.execute("ALTER TABLE shop_coded ADD other text DEFAULT 'leaked elsewhere'")
    return table


@pytest.mark.usefixtures("other_column")
@pytest.mark.parametrize("script", OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_another_column_of_the_same_name_is_refused_between_runs(database: Database, script: str) -> None:
    rotate(CODES, stop_after_rows=20)
    execute_script(database, script)
    assert_resuming_is_refused(database, r"the rotated columns are other ones: .* are [34] and were 2")
    outcome = rotate(CODES, restart=True)
    assert_unconfirmed(outcome, 0)
    assert not leaked(database)


@pytest.mark.usefixtures("other_column")
@pytest.mark.parametrize("script", OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_another_column_of_the_same_name_fails_the_run(database: Database, script: str) -> None:
    outcome = rotate(CODES, EventRecorder(after_range(2, lambda: execute_script(database, script))))
    assert_failed(outcome, "the rotated columns are other ones")
    assert_resuming_is_refused(database, "the rotated columns are other ones")


@pytest.mark.usefixtures("other_column")
def test_another_column_of_the_field_is_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has another db_column from one release to the next."""
    from tests.shop.models import Coded  # noqa: PLC0415 - where it is changed

    rotate(CODES, stop_after_rows=20)
    monkeypatch.setattr(Coded._meta.get_field("secret"), "column", "other")
    assert_resuming_is_refused(database, "the rotated columns are other ones")


@pytest.mark.usefixtures("table")
def test_a_renamed_column_is_the_same_one(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.shop.models import Coded  # noqa: PLC0415 - where it is changed

    rotate(CODES, stop_after_rows=20)
    database.execute("ALTER TABLE shop_coded RENAME secret TO renamed")
    monkeypatch.setattr(Coded._meta.get_field("secret"), "column", "renamed")
    assert_unconfirmed(rotate(CODES), 0)
    ((rows,),) = database.execute("SELECT count(*) FROM shop_coded WHERE renamed LIKE 'leaked %'")
    assert rows == 0


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("type_name", quick("numeric(20, 0)", "text", slow=["integer"]))
def test_another_type_of_the_key_is_refused(database: Database, type_name: str) -> None:
    rotate(CODES, stop_after_rows=20)
    database.execute(f"ALTER TABLE shop_coded ALTER id TYPE {type_name}")
    reason = rf"the key is id {re.escape(type_name.replace(', ', ','))}.* and was id bigint"
    assert_resuming_is_refused(database, reason)
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
def test_another_type_of_the_key_during_a_run_fails_it(database: Database) -> None:
    def change() -> None:
        database.execute("ALTER TABLE shop_coded ALTER id TYPE text")

    outcome = rotate(CODES, EventRecorder(after_range(2, change)), outage_budget_seconds=2)
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    assert_resuming_is_refused(database, "the key is id text")
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("collation", ["C", "POSIX"])
def test_another_collation_of_the_key_is_refused(database: Database, collation: str) -> None:
    database.execute("ALTER TABLE shop_coded ALTER id TYPE text")
    rotate(CODES, stop_after_rows=20)
    database.execute(f'ALTER TABLE shop_coded ALTER id TYPE text COLLATE "{collation}"')
    assert_resuming_is_refused(database, f"the key is id text COLLATE pg_catalog.{collation} and was id text")
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
def test_another_column_as_the_key_is_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has another primary key from one release to the next."""
    from tests.shop.models import Coded  # noqa: PLC0415 - where it is changed

    database.execute("ALTER TABLE shop_coded ADD number bigint NOT NULL DEFAULT 0")
    database.execute("UPDATE shop_coded SET number = 1000 - id")
    database.execute("ALTER TABLE shop_coded ADD UNIQUE (number)")
    rotate(CODES, stop_after_rows=20)
    monkeypatch.setattr(Coded._meta.pk, "column", "number")
    assert_resuming_is_refused(database, "the key is number bigint and was id bigint")
    outcome = rotate(CODES, restart=True)
    assert_unconfirmed(outcome, 0)
    assert not leaked(database)


@pytest.mark.usefixtures("table")
def test_a_key_whose_index_is_gone_is_refused(database: Database) -> None:
    rotate(CODES, stop_after_rows=20)
    database.execute("ALTER TABLE shop_coded DROP CONSTRAINT shop_coded_pkey")
    with pytest.raises(TargetError, match="no index on its primary key"):
        rotate(CODES)


def change_identity(database: Database, **fields: object) -> None:
    database.execute("UPDATE rotator_rotation SET identity = identity || %s::jsonb", (json.dumps(fields),))


ELSEWHERE: dict[str, tuple[Mapping[str, object], str]] = {
    "server": (
        {"system": "7000000000000000001"},
        r"the server is another one: its system identifier is \d+ and was 7000000000000000001",
    ),
    "database": ({"database_oid": 7}, r"the database is another one: its oid is \d+ and was 7"),
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("changed", "reason"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_another_place_is_refused(database: Database, changed: Mapping[str, object], reason: str) -> None:
    rotate(CODES, stop_after_rows=20)
    change_identity(database, **changed)
    assert_resuming_is_refused(database, reason)
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("changed", "reason"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_another_place_is_noticed_before_completion(
    database: Database, monkeypatch: pytest.MonkeyPatch, changed: Mapping[str, object], reason: str
) -> None:
    """A server that is replaced behind the same address loses every connection."""
    # The run has written nothing there, so the rotation's row looks as if its owner were at work.
    monkeypatch.setattr(acquire, "SILENT_SECONDS", 0.3)

    def replace() -> None:
        change_identity(database, **changed)
        database.execute(END_THE_ROTATOR)

    recorder = EventRecorder(after_range(2, replace))
    assert_failed(rotate(CODES, recorder), reason)
    # Not after all ranges: none is written in another place.
    assert not any(isinstance(event, ConfirmationStarted) for event in recorder.events)
    assert_resuming_is_refused(database, reason)


def test_what_a_newer_version_records_is_no_other_target(database: Database) -> None:
    database.make_tickets(1, ROWS)
    rotate(TARGET, stop_after_rows=20)
    change_identity(database, of_a_later_version=[1])
    assert_unconfirmed(rotate(TARGET), 0)


# --- Rotations of an older version -----------------------------------------------------------------


def _as_begun_by_an_older_version(database: Database) -> None:
    database.execute("UPDATE rotator_rotation SET identity = '{}'")
    database.execute("UPDATE rotator_completedrange SET xid = NULL, has_other_writes = false")


@pytest.mark.usefixtures("table")
def test_rows_that_an_older_version_rotated_are_not_confirmed(database: Database, table: TargetTable) -> None:
    before = database.values(table)
    rotate(CODES, stop_after_rows=20)
    half = database.values(table)
    _as_begun_by_an_older_version(database)
    recorder = EventRecorder()

    outcome = rotate(CODES, recorder)

    assert outcome.resumed
    assert_unconfirmed(outcome, 20)
    assert recorder.counted() == (20, 20)
    assert database.changed(before, table) == before.keys()
    # The older version's values stay.
    assert len(database.changed(half, table)) == 20


# --- Rewrites --------------------------------------------------------------------------------------

REWRITES = {
    "a volatile default": "ALTER TABLE shop_coded ADD more uuid DEFAULT gen_random_uuid()",
    "another type of a column": "ALTER TABLE shop_coded ALTER secret TYPE varchar(90) USING secret || ' '",
    "truncated and reloaded": (
        "CREATE TABLE shop_copy AS SELECT id, secret FROM shop_coded; TRUNCATE shop_coded;"
        " INSERT INTO shop_coded SELECT id, 'leaked ' || id FROM shop_copy; DROP TABLE shop_copy"
    ),
    "unlogged": "ALTER TABLE shop_coded SET UNLOGGED",
}
HARMLESS = {
    "VACUUM FULL": "VACUUM FULL shop_coded",
    "CLUSTER": "CLUSTER shop_coded USING shop_coded_pkey",
    "VACUUM FREEZE": "VACUUM FREEZE shop_coded",
    "both": "VACUUM FULL FREEZE shop_coded; CLUSTER shop_coded USING shop_coded_pkey",
    "a constant default": "ALTER TABLE shop_coded ADD IF NOT EXISTS more text DEFAULT 'constant'",
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("script", REWRITES.values(), ids=REWRITES)
def test_a_rewrite_between_runs_is_refused(database: Database, script: str) -> None:
    rotate(CODES, stop_after_rows=20)
    execute_script(database, script)
    assert_resuming_is_refused(database, "another session has rewritten every row")
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("rewrite", "ranges"), all_pairs(REWRITES, [1, 2, 4]))
def test_a_rewrite_during_a_run_fails_it(database: Database, rewrite: str, ranges: int) -> None:
    script = REWRITES[rewrite]
    outcome = rotate(CODES, EventRecorder(after_range(ranges, lambda: execute_script(database, script))))
    assert_failed(outcome, "another session has rewritten every row")
    assert_resuming_is_refused(database, "another session has rewritten every row")
    assert_restart_rotates_all(database)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("rewrite", quick("a volatile default", slow=[*REWRITES][1:]))
def test_a_rewrite_before_the_first_range_hides_nothing(database: Database, rewrite: str) -> None:
    script = REWRITES[rewrite]
    outcome = rotate(CODES, EventRecorder(at_start(lambda: execute_script(database, script))))
    assert_unconfirmed(outcome, 0)
    assert not leaked(database)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("script", HARMLESS.values(), ids=HARMLESS)
def test_what_keeps_the_rows_transactions_is_no_rewrite(database: Database, script: str) -> None:
    rotate(CODES, stop_after_rows=20)
    execute_script(database, script)
    outcome = rotate(CODES, EventRecorder(after_range(1, lambda: execute_script(database, script))), batch=5)
    assert_unconfirmed(outcome, 0)
    assert outcome.resumed
    assert not leaked(database)


@pytest.mark.usefixtures("table")
def test_rows_that_others_write_beside_a_vacuum_full_are_no_rewrite(database: Database) -> None:
    def write() -> None:
        database.execute("UPDATE shop_coded SET secret = secret WHERE id IN (3, 9)")
        database.execute("INSERT INTO shop_coded VALUES (99, 'of the application')")
        database.execute("VACUUM FULL shop_coded")

    assert_unconfirmed(rotate(CODES, EventRecorder(after_range(2, write))), 3)


@pytest.mark.usefixtures("table")
def test_a_rewrite_hides_no_late_row(database: Database) -> None:
    older = database.connect()
    older.execute("BEGIN")
    older.execute("INSERT INTO shop_coded VALUES (0, 'leaked late')")

    def commit(event: Event) -> None:
        if isinstance(event, LateCommitsAwaited) and database.checkpoints() and older.info.transaction_status:
            older.execute("COMMIT")
            database.execute(REWRITES["a volatile default"])

    assert_failed(rotate(CODES, commit), "another session has rewritten every row")
    assert leaked(database) == 1
    assert_restart_rotates_all(database, ROWS + 1)


@pytest.mark.usefixtures("table")
def test_a_table_that_is_emptied_during_a_run_is_completed(database: Database) -> None:
    recorder = EventRecorder(after_range(2, lambda: database.execute("TRUNCATE shop_coded")))
    assert_unconfirmed(rotate(CODES, recorder), 0)
    assert recorder.counted() == (0, 0)
