"""Triggers of the application that are slow, or that fail for every row."""

import re
import time

import pytest

from tests.acceptance.harness import Finished, wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed
from tests.faults.roles import documented_grants


def _add_trigger(database: Database, body: str) -> None:
    database.query(
        f"CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$"
    )
    database.query(
        "CREATE TRIGGER theirs BEFORE UPDATE ON tickets_ticket FOR EACH ROW EXECUTE FUNCTION theirs()"
    )


def _retries(finished: Finished) -> int:
    found = re.search(r"^  retries +(\d+)", finished.out, re.MULTILINE)
    assert found, finished.out
    return int(found[1])


@pytest.mark.slow
def test_a_range_that_is_too_slow_is_split_and_is_no_outage(database: Database, rotations: Rotations) -> None:
    audit = make_tickets(database, 20_000)
    # The first 200 rows take four seconds, and the limit of a statement is half a second.
    _add_trigger(database, "IF OLD.id <= 228 THEN PERFORM pg_sleep(0.02); END IF;")

    finished = rotations.rotated(database.url(), "--batch=200", "--concurrency=2")

    assert_completed(finished)
    reason = "query_canceled (57014): canceling statement due to statement timeout, in the function theirs()"
    assert re.findall(r"a range of .* is retried.*: .*", finished.err) == [
        f"a range of 200 rows is retried in two parts: {reason}"
    ]
    assert "unreachable" not in finished.err
    assert 0 < _retries(finished) < 40
    sizes = database.query("SELECT rows FROM rotator_completedrange ORDER BY id DESC LIMIT 20")
    assert max(rows for (rows,) in sizes) > 100
    audit.assert_rotated_once()


@pytest.mark.slow
def test_a_transaction_of_many_slices_is_limited_as_a_whole(database: Database, rotations: Rotations) -> None:
    audit = make_tickets(database, 24_000)
    # Each slice keeps the limit of a statement, a second. All of them together take more than seven seconds.
    slow_down(database, 0.6)
    running = rotations.rotate(
        database.url(), "--batch=24000", "--lock-timeout=200ms", "--pace=full", "--no-vacuum"
    )
    writes = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'tickets_ticket'::regclass"
        " AND mode = 'RowExclusiveLock'"
    )
    wait_until(lambda: database.number(writes), "rows are written")
    began = time.monotonic()
    database.query("UPDATE tickets_ticket SET title = title WHERE id = 1")
    waited = time.monotonic() - began
    finished = running.wait()

    assert_completed(finished)
    assert "24,000 rows is retried in two parts: the transaction of the range takes too long" in finished.err
    # The limit of the transaction, four seconds, and that of its last slice.
    assert waited < 5.5
    audit.assert_rotated_once()


FAULTS = {
    "a missing function": (
        "NEW.title := digest(NEW.token::text, 'sha256');",
        "undefined_function (42883): function digest(text, unknown) does not exist",
    ),
    "a missing table": (
        "INSERT INTO audit_log VALUES (NEW.id);",
        'undefined_table (42P01): relation "audit_log" does not exist',
    ),
    "an unset variable": (
        "NEW.title := current_setting('app.user');",
        'undefined_object (42704): unrecognized configuration parameter "app.user"',
    ),
    "a missing privilege": (
        "PERFORM count(*) FROM django_session;",
        "insufficient_privilege (42501): permission denied for table django_session",
    ),
}


@pytest.mark.parametrize(
    "fault", [next(iter(FAULTS)), *(pytest.param(fault, marks=pytest.mark.slow) for fault in [*FAULTS][1:])]
)
def test_a_fault_that_every_row_meets_stops_the_run_soon(
    database: Database, rotations: Rotations, fault: str
) -> None:
    body, reason = FAULTS[fault]
    audit = make_tickets(database, 5000)
    _add_trigger(database, body)
    with new_role(database, "rotating", *documented_grants("rotating")) as url:
        finished = rotations.rotated(url, "--batch=100")

    assert finished.status == 1
    assert "Traceback" not in finished.err
    assert finished.out.splitlines()[1] == (
        f"The server rejected the last 8 rows that were tried, and rotated none in between: {reason}, in the "
        "function theirs(). They keep their values. Remove the cause, then run the same command again."
    )
    # Other workers can have met it too, before the run stopped.
    assert 8 <= finished.err.count(" is rejected: ") < 12
    assert _retries(finished) < 20
    assert database.status() == "failed"
    assert audit.written() == 0

    database.query("DROP FUNCTION theirs() CASCADE")
    assert_completed(rotations.rotated(database.url()))
    audit.assert_rotated_once()


def test_a_fault_that_every_row_meets_during_the_run_stops_it_soon(
    database: Database, rotations: Rotations
) -> None:
    audit = make_tickets(database, 20_000)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(), "--batch=100")
    wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
    body, reason = FAULTS["a missing function"]
    _add_trigger(database, body)
    speed_up(database)
    finished = running.wait()

    assert finished.status == 1
    sentence = finished.out.splitlines()[1]
    assert sentence.startswith("The server rejected the last 12 rows that were tried, and rotated none")
    assert reason in sentence
    assert _retries(finished) < 50
    assert 500 < audit.changed() < 20_000
    audit.assert_each_row_written_at_most_once()
