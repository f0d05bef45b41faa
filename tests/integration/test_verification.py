"""What a verification finds, what it repairs, and when it says that it knows nothing."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from psycopg import sql

from rotator.api import prepare
from rotator.events import (
    Event,
    LedgerProgressed,
    RotationStopped,
    VacuumStarted,
    VerificationProgressed,
    Verified,
)
from rotator.exceptions import OptionError, RotatorError, ServerRefusedError
from rotator.models import Ledger, Rotation, Verification
from rotator.options import RunOptions, Selection
from rotator.postgres import survivors
from rotator.postgres.errors import ANSWER_SECONDS
from rotator.postgres.table import TargetTable
from rotator.progress.summary import verification_summary
from rotator.runner import proof, verification
from tests.integration.killed import kill_itself, until_killed
from tests.integration.outcomes import SHOP, EventRecorder, after_range, rotate_tickets
from tests.integration.rotation_tables import Database

pytestmark = SHOP

ROWS = 60
OLD = "old_tickets"


@pytest.fixture
def old(database: Database) -> Iterator[None]:
    """Rotated tickets with a ledger, and a copy of the tickets before the rotation."""
    database.make_tickets(1, ROWS)
    database.execute(f"CREATE TABLE {OLD} AS SELECT * FROM tickets_ticket")
    assert rotate_tickets(prove=True).exit_status == 0
    yield
    database.execute(f"DROP TABLE {OLD}")


def _verify(*, repairs: bool = False, rotation: int | None = None, observer: Any = None) -> Verified:  # noqa: ANN401 - an observer
    found = Rotation.objects.get(pk=rotation) if rotation else Rotation.objects.latest("pk")
    prepared = prepare(
        found.target.split(),
        "default",
        RunOptions.from_json(found.options),
        Selection.from_json(found.selection),
    )
    return prepared.verify(observer or EventRecorder(), found.pk, repairs=repairs)


def _with_old_values(database: Database) -> set[str]:
    """The keys of rows that have a value of the copy, whichever row had it: found without the ledger."""
    return {
        key
        for (key,) in database.execute(
            f"SELECT jsonb_build_array(id)::text FROM tickets_ticket WHERE token IN (SELECT token FROM {OLD})"
        )
    }


def _save_stale(database: Database, *numbers: int) -> None:
    """Write old values back, as save() of objects that were loaded before the rotation does."""
    database.execute(
        f"UPDATE tickets_ticket t SET token = o.token FROM {OLD} o WHERE o.id = t.id AND t.id = ANY (%s)",
        (list(numbers),),
    )


@pytest.mark.usefixtures("old")
def test_it_names_exactly_the_rows_with_old_values_and_repair_ends_at_none(database: Database) -> None:
    _save_stale(database, 7, 8, 40)

    found = _verify()

    assert set(found.survivor_keys) == _with_old_values(database) == {"[7]", "[8]", "[40]"}
    assert (found.survivors, found.exit_status, found.is_verified) == (3, 1, False)
    before = database.values()
    repaired = _verify(repairs=True)
    assert (repaired.repaired, repaired.survivors, repaired.exit_status) == (3, 0, 0)
    assert database.changed(before) == {"[7]", "[8]", "[40]"}
    assert _with_old_values(database) == set()
    assert repaired.coverage is not None
    assert repaired.coverage.confirmed_rows == ROWS
    # As often as cron runs it.
    again = _verify(repairs=True)
    assert (again.repaired, again.exit_status) == (0, 0)


@pytest.mark.usefixtures("old")
def test_a_ledger_that_was_dropped_by_hand_is_named(database: Database) -> None:
    ledger = f"rotator_ledger_{Rotation.objects.latest('pk').pk}"
    ((schema,),) = database.execute("SELECT schemaname FROM pg_tables WHERE tablename = %s", (ledger,))
    database.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(schema, ledger)))

    with pytest.raises(ServerRefusedError, match=rf'relation ".*{ledger}" does not exist\. Restore it'):
        _verify()


@pytest.mark.usefixtures("old")
def test_values_that_were_swapped_reinserted_or_restored_are_found(database: Database) -> None:
    # The unique index allows no value twice.
    database.execute(f"UPDATE tickets_ticket SET token = (SELECT token FROM {OLD} WHERE id = 2) WHERE id = 1")
    database.execute(f"UPDATE tickets_ticket SET token = (SELECT token FROM {OLD} WHERE id = 1) WHERE id = 2")
    database.execute(
        f"INSERT INTO tickets_ticket SELECT 1000, title, created_at, token FROM {OLD} WHERE id = 3"
    )
    database.execute("DELETE FROM tickets_ticket WHERE id BETWEEN 50 AND 55")
    database.execute(f"INSERT INTO tickets_ticket SELECT * FROM {OLD} WHERE id BETWEEN 50 AND 55")

    found = _verify()

    assert set(found.survivor_keys) == _with_old_values(database)
    assert found.survivors == 9
    assert _verify(repairs=True).is_verified


@pytest.mark.usefixtures("old")
def test_a_table_that_was_restored_from_a_dump_is_searched(database: Database) -> None:
    database.execute("CREATE TABLE restored (LIKE tickets_ticket INCLUDING ALL)")
    database.execute(f"INSERT INTO restored SELECT * FROM {OLD}")
    database.execute("ALTER TABLE tickets_ticket RENAME TO rotated")
    database.execute("ALTER TABLE restored RENAME TO tickets_ticket")
    try:
        found = _verify()
    finally:
        database.execute("DROP TABLE tickets_ticket")
        database.execute("ALTER TABLE rotated RENAME TO tickets_ticket")

    assert (found.survivors, found.exit_status) == (ROWS, 1)
    assert found.coverage is not None
    assert "the table is another one" in found.coverage.unknown


def _match_nothing(_ledger: object, _table: TargetTable) -> sql.Composable:
    return sql.SQL("(false)")


@pytest.mark.usefixtures("old")
def test_with_a_broken_search_the_control_fails_and_nothing_is_verified(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save_stale(database, 7)
    monkeypatch.setattr(survivors, "is_in_ledger", _match_nothing)

    found = _verify()

    assert found.survivors == 0
    assert (found.is_verified, found.exit_status) == (False, 1)
    assert found.controls is not None
    assert (found.controls.planted, found.controls.planted_found) == (3, 0)
    assert verification_summary(found).startswith("Not verified: a control ")
    assert Ledger.objects.get().entries == ROWS + 1


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE rotator_ledger SET salt = sha256('another')",
        "DELETE FROM {ledger} WHERE ctid = (SELECT max(ctid) FROM {ledger})",
        "TRUNCATE {ledger}",
    ],
)
@pytest.mark.usefixtures("old")
def test_a_damaged_ledger_verifies_nothing(database: Database, damage: str) -> None:
    rotation = Rotation.objects.get().pk
    database.execute(damage.format(ledger=f"rotator_ledger_{rotation}"))
    found = _verify()
    assert (found.is_verified, found.exit_status) == (False, 1)
    assert found.controls is not None
    assert not found.controls.have_passed


def test_a_failed_control_before_the_rotation_rotates_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_tickets(1, ROWS)
    asyncio.run(database.until_the_tickets_are_older())
    before = database.values()
    monkeypatch.setattr(survivors, "is_in_ledger", _match_nothing)

    stopped = rotate_tickets(prove=True)

    assert stopped.exit_status == 1
    assert "The control of the ledger failed: 0 of 60 rows" in stopped.error
    assert database.changed(before) == set()


def test_a_row_that_comes_into_the_selection_during_the_run_enters_the_ledger(database: Database) -> None:
    database.make_tickets(1, ROWS)
    database.execute("UPDATE tickets_ticket SET title = CASE WHEN id < 40 THEN 'on' ELSE 'off' END")
    before = database.values()
    # The values of the rows from 30 on are in the ledger already.
    change = "UPDATE tickets_ticket SET title = 'on' WHERE id BETWEEN 30 AND 39 OR id = 55"
    recorder = EventRecorder(after_range(1, lambda: database.execute(change)))

    outcome = rotate_tickets(recorder, prove=True, selection=Selection(filters=("title=on",)), concurrency=1)

    assert (outcome.rows, outcome.exit_status) == (40, 0)
    assert Ledger.objects.get().entries == 41
    database.execute("UPDATE tickets_ticket SET token = %s WHERE id = 55", (before["[55]"],))
    assert _verify().survivor_keys == ("[55]",)


def test_a_row_whose_key_changes_while_the_ledger_is_loaded_enters_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "LOAD_ROWS", 7)
    database.make_tickets(1, ROWS)
    before = database.values()
    changes = iter([f"UPDATE tickets_ticket SET id = -1 WHERE id = {ROWS - 1}"])

    def change(event: Event) -> None:
        if isinstance(event, LedgerProgressed):
            for statement in changes:
                database.execute(statement)

    outcome = rotate_tickets(EventRecorder(change), prove=True)

    assert (outcome.rows, outcome.exit_status) == (ROWS, 0)
    database.execute("UPDATE tickets_ticket SET token = %s WHERE id = -1", (before[f"[{ROWS - 1}]"],))
    assert _verify().survivor_keys == ("[-1]",)


def test_without_a_ledger_survivors_are_unknown(database: Database) -> None:
    database.make_tickets(1, ROWS)
    assert rotate_tickets().exit_status == 0

    found = _verify()

    assert (found.survivors, found.exit_status) == (None, 1)
    assert found.coverage is not None
    assert (found.coverage.confirmed_rows, found.coverage.older_rows) == (ROWS, 0)
    assert "unknown whether old values" in verification_summary(found)
    with pytest.raises(OptionError, match="has no ledger"):
        _verify(repairs=True)


def test_an_unfinished_rotation_is_not_verified(database: Database) -> None:
    database.make_tickets(1, ROWS)
    rotate_tickets(prove=True, concurrency=1, stop_after_rows=20)

    found = _verify()

    assert (found.survivors, found.exit_status) == (ROWS - 20, 1)
    assert found.coverage is not None
    assert (found.coverage.status, found.coverage.gap_rows) == ("interrupted", ROWS - 20)
    assert (found.coverage.older_rows, found.coverage.confirmed_rows) == (ROWS - 20, 20)
    with pytest.raises(OptionError, match="it is interrupted"):
        _verify(repairs=True)


@pytest.mark.usefixtures("old")
def test_a_killed_verification_resumes_where_it_stopped(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save_stale(database, 3, 58)
    number = Rotation.objects.get().pk

    until_killed(_verify_until_killed, str(database.server.parameters["dbname"]), number, 2)

    unfinished = Verification.objects.latest("pk")
    assert (unfinished.finished_at, unfinished.through, unfinished.rows) == (None, [14], 14)
    monkeypatch.setattr(verification, "SEARCH_ROWS", 7)
    recorder = EventRecorder()
    found = _verify(observer=recorder)
    assert found.number == unfinished.pk
    assert recorder.of(VerificationProgressed) == 7
    assert (found.rows, set(found.survivor_keys)) == (ROWS, {"[3]", "[58]"})
    assert found.controls is not None
    assert found.controls.planted == 3


@pytest.mark.usefixtures("old")
def test_a_resumed_verification_without_rows_to_search_has_controls_too(database: Database) -> None:
    until_killed(
        _verify_until_killed, str(database.server.parameters["dbname"]), Rotation.objects.get().pk, 2
    )
    assert Verification.objects.latest("pk").through == [14]
    database.execute("DELETE FROM tickets_ticket WHERE id > 14")

    found = _verify()

    assert found.controls is not None
    assert (found.controls.planted, found.controls.planted_found, found.is_verified) == (3, 3, True)


def _verify_until_killed(database: str, rotation: int, ranges: int) -> None:
    from django.conf import settings  # noqa: PLC0415 - another process

    settings.DATABASES["default"]["NAME"] = database
    verification.SEARCH_ROWS = 7  # type: ignore[misc] # for this process alone
    left = ranges

    def observer(event: Event) -> None:
        nonlocal left
        left -= isinstance(event, VerificationProgressed)
        if not left:
            kill_itself()

    _verify(rotation=rotation, observer=observer)


@pytest.mark.usefixtures("old")
def test_a_verification_that_was_killed_at_its_end_has_controls_too(database: Database) -> None:
    database.execute("UPDATE rotator_verification SET finished_at = NULL")
    found = _verify()
    assert found.number == Verification.objects.get().pk
    assert found.controls is not None
    assert (found.controls.planted, found.is_verified) == (3, True)


def _assert_completed_but_not_verified(stopped: RotationStopped) -> None:
    assert (stopped.status, stopped.exit_status) == ("completed", 1)
    assert stopped.verification is not None
    assert stopped.verification.error
    assert not Verification.objects.filter(finished_at__isnull=False).exists()


def test_a_stop_cancels_the_counts_of_the_final_verification(database: Database) -> None:
    database.make_tickets(1, ROWS)
    stopped_at, other = list[float](), database.connect()

    def interrupt() -> None:
        # A query that the server has not begun cannot be cancelled.
        is_waiting = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        while other.execute(is_waiting).fetchone() == (0,):
            time.sleep(0.05)
        stopped_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)

    def lock(event: Event) -> None:
        if isinstance(event, VerificationProgressed):
            # The counts wait for it.
            other.execute("BEGIN")
            other.execute("LOCK TABLE rotator_completedrange")
            interrupting.start()

    stopped = rotate_tickets(lock, prove=True)
    interrupting.join()
    other.execute("ROLLBACK")

    # The server's answer is awaited for longer.
    assert time.monotonic() - stopped_at[0] < ANSWER_SECONDS
    _assert_completed_but_not_verified(stopped)


def test_a_second_stop_during_the_final_verification_does_not_verify(database: Database) -> None:
    database.make_tickets(1, ROWS)

    def interrupt_twice(event: Event) -> None:
        if isinstance(event, VerificationProgressed):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    _assert_completed_but_not_verified(rotate_tickets(interrupt_twice, prove=True))


def test_a_ledger_that_is_forgotten_before_the_final_verification_does_not_verify(database: Database) -> None:
    database.make_tickets(1, ROWS)

    def forget(event: Event) -> None:
        if isinstance(event, VacuumStarted):
            database.execute("UPDATE rotator_ledger SET state = 'forgotten'")

    stopped = rotate_tickets(forget, prove=True)

    _assert_completed_but_not_verified(stopped)
    assert stopped.verification is not None
    assert stopped.verification.error == "The ledger was dropped."


@pytest.mark.parametrize("search_rows", [verification.SEARCH_ROWS, 7])
@pytest.mark.usefixtures("old")
def test_a_survivor_whose_value_is_planted_too_is_named(
    database: Database, monkeypatch: pytest.MonkeyPatch, search_rows: int
) -> None:
    _save_stale(database, 1, 3, 40)
    monkeypatch.setattr(verification, "SEARCH_ROWS", search_rows)

    found = _verify()

    assert set(found.survivor_keys) == {"[1]", "[3]", "[40]"}
    assert found.controls is not None
    assert (found.controls.planted, found.controls.planted_found) == (3, 3)
    assert Ledger.objects.get().entries == found.controls.entries_found


@pytest.mark.usefixtures("old")
def test_two_processes_do_not_continue_the_same_verification(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "SEARCH_ROWS", 7)

    def other_continues(event: Event) -> None:
        if isinstance(event, VerificationProgressed):
            database.execute("UPDATE rotator_verification SET through = '[60]' WHERE finished_at IS NULL")

    with pytest.raises(RotatorError, match="Another process has continued this verification"):
        _verify(observer=other_continues)


@pytest.mark.usefixtures("old")
def test_an_earlier_repair_cannot_write_any_more(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    _save_stale(database, 3, 58)
    monkeypatch.setattr(verification, "SEARCH_ROWS", 7)

    def other_repairs(event: Event) -> None:
        if isinstance(event, VerificationProgressed) and event.rows == 7:
            database.execute("UPDATE rotator_rotation SET generation = generation + 1")

    with pytest.raises(RotatorError, match="Another process has taken this rotation over"):
        _verify(repairs=True, observer=other_repairs)
    assert _with_old_values(database) == {"[58]"}


@pytest.mark.usefixtures("old")
def test_the_command_ends_with_1_while_anything_is_left(database: Database, tmp_path: Path) -> None:
    _save_stale(database, 7)
    number, out, report = Rotation.objects.get().pk, StringIO(), tmp_path / "report.json"

    with pytest.raises(SystemExit) as ended:
        call_command("verify_rotation", number, report=report, stdout=out, stderr=StringIO())

    assert ended.value.code == 1
    assert out.getvalue().startswith("Not verified: 1 row of tickets.Ticket.token has an old value")
    assert json.loads(report.read_text())["survivor_keys"] == ["[7]"]
    call_command("verify_rotation", number, "--repair", stdout=out, stderr=StringIO())
    with pytest.raises(CommandError, match="There is no rotation 99"):
        call_command("verify_rotation", 99)


def test_an_old_value_in_a_row_that_the_filters_leave_out_is_found_and_repaired(database: Database) -> None:
    database.make_tickets(1, ROWS)
    database.execute(f"CREATE TABLE {OLD} AS SELECT * FROM tickets_ticket")
    try:
        assert rotate_tickets(prove=True, selection=Selection(excludes=("id__gt=50",))).exit_status == 0
        database.execute(
            f"UPDATE tickets_ticket SET token = (SELECT token FROM {OLD} WHERE id = 5) WHERE id = 55"
        )
        found = _verify()
        assert found.survivor_keys == ("[55]",)
        assert found.coverage is not None
        assert found.coverage.excluded_rows == 10
        repaired = _verify(repairs=True)
        assert (repaired.repaired, repaired.exit_status) == (1, 0)
    finally:
        database.execute(f"DROP TABLE {OLD}")


def test_the_evidence_says_first_what_is_not_proved(database: Database, tmp_path: Path) -> None:
    database.make_tickets(1, ROWS)
    database.execute(f"CREATE TABLE {OLD} AS SELECT * FROM tickets_ticket")
    trigger = database.before_update("IF NEW.id = 9 THEN RAISE check_violation; END IF; RETURN NEW;")
    try:
        selection = Selection(excludes=("id__gt=50",))
        assert rotate_tickets(prove=True, selection=selection).status == "failed"
        _save_stale(database, 3)
        _verify()
        facts = _evidence(tmp_path)
        first = facts["NOT_PROVED"]
        assert next(iter(facts)) == "NOT_PROVED"
        assert first["is_verified"] is False
        assert (first["rejected_rows"], first["excluded_rows"], first["survivors"]) == (1, 10, 2)
        assert [rejected["key"] for rejected in first["rejected_keys"]] == ["[9]"]
        assert first["rows_in_gaps"] == 1
        assert any(
            sentence.startswith("10 rows do not match the filters now") for sentence in first["reasons"]
        )
        assert any("rejected the new values of 1 rows" in sentence for sentence in first["reasons"])

        database.execute(f"DROP TRIGGER {trigger} ON tickets_ticket")
        assert rotate_tickets(prove=True, selection=selection).status == "completed"
        assert _verify(repairs=True).is_verified
        facts = _evidence(tmp_path)
        assert facts["NOT_PROVED"]["is_verified"] is True
        assert facts["NOT_PROVED"]["reasons"] == [
            "10 rows do not match the filters now, so they may have old values."
        ]
        assert [each["survivors"] for each in facts["verification"]["over_time"]] == [2, 1, 1, 0]
        shown = (tmp_path / "evidence.json").read_text()
        secrets = [str(token) for token in database.values().values()]
        secrets += [str(token) for (token,) in database.execute(f"SELECT token FROM {OLD}")]
        assert [secret for secret in secrets if secret in shown] == []
        # The values of filters are left out, too.
        assert facts["sanitization"]["selection"]["excludes"] == ["id__gt"]
        listed = StringIO()
        call_command("rotations", str(Rotation.objects.latest("pk").pk), json=True, stdout=listed)
        assert json.loads(listed.getvalue())["selection"]["excludes"] == ["id__gt"]
        assert shown == json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    finally:
        database.execute(f"DROP TABLE {OLD}")


def _evidence(folder: Path) -> dict[str, Any]:
    path = folder / "evidence.json"
    call_command("rotations", Rotation.objects.latest("pk").pk, evidence=path, stdout=StringIO())
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts
