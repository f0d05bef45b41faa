"""Other sessions that write to the table: in the opposite order, and in older transactions."""

import os
import re
import threading

import psycopg
import pytest

from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations, assert_completed
from tests.faults.neighbour import Neighbour
from tests.faults.roles import documented_grants

# Ten thousand of them take two minutes.
TRANSACTIONS = int(os.environ.get("ROTATOR_TEST_TRANSACTIONS", "400"))
ROWS = 6000
MOST_ROUNDS = 50
# That of a range's transaction, and as long again for a busy machine.
LONGEST_WAIT_SECONDS = 4.0


def test_a_neighbour_that_updates_in_the_opposite_order(database: Database, rotations: Rotations) -> None:
    make_tickets(database, ROWS)
    neighbour = Neighbour(database)
    rounds = 0
    with neighbour.at_work():
        # On a fast machine they miss each other a few times.
        while neighbour.transactions < TRANSACTIONS or not (neighbour.waited or rounds == MOST_ROUNDS):
            options = ("--restart", "--batch=1500", "--concurrency=3")
            finished = rotations.rotated(database.url(), *options, seconds=120)
            assert_completed(finished)
            rounds += 1

    assert neighbour.refused == []
    assert neighbour.waited > 0, "they have never met"
    assert neighbour.longest_seconds < LONGEST_WAIT_SECONDS
    assert database.query("SELECT DISTINCT count(*) FROM audit_writes GROUP BY id") == [(rounds,)]
    assert database.number("SELECT count(DISTINCT id) FROM audit_writes") == ROWS


def test_rows_that_older_transactions_commit_late(database: Database, rotations: Rotations) -> None:
    audit = make_tickets(database, ROWS)
    bound = database.number("SELECT max(id) FROM tickets_ticket")
    slow_down(database, 0.05)
    # Ids that are missing: between others, between others, above all, between others.
    late = {"plain": 7, "savepoint": 15, "above": bound + 100, "prepared": 23}
    insert = (
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " VALUES (%s, 'late', now(), gen_random_uuid())"
    )
    plain, savepoint, above, prepared = (
        psycopg.connect(database.url(application_name=name)) for name in late
    )
    plain.execute(insert, [late["plain"]])
    savepoint.execute("SAVEPOINT one")
    savepoint.execute(insert, [late["savepoint"]])
    savepoint.execute("RELEASE one")
    above.execute(insert, [late["above"]])
    prepared.execute(insert, [late["prepared"]])
    prepared.execute("PREPARE TRANSACTION 'a late one'")

    running = rotations.rotate(database.url(), "--batch=50")
    wait_until(lambda: database.checkpoints() > 10, "it has begun without them")
    plain.commit()
    savepoint.commit()
    speed_up(database)
    wait_until(lambda: running.err.count("waiting for 2 transactions") == 1, "it waits for the others")
    assert running.is_alive
    above.commit()
    wait_until(lambda: "waiting for 1 transaction older" in running.err, "it waits for the prepared one")
    tokens = dict(database.query("SELECT id, token FROM tickets_ticket WHERE title = 'late'"))
    database.query("COMMIT PREPARED 'a late one'")
    finished = running.wait()
    for connection in (plain, savepoint, above, prepared):
        connection.close()

    assert_completed(finished)
    for named in ("application plain", "application savepoint", "application above", "prepared a late one"):
        assert named in finished.err
    # All four had been inserted before it began, and each was rotated once.
    assert database.query(
        "SELECT id, count(*) FROM audit_writes WHERE id = ANY (%s) GROUP BY id ORDER BY id",
        [list(late.values())],
    ) == [(ticket, 1) for ticket in sorted(late.values())]
    rotated = dict(database.query("SELECT id, token FROM tickets_ticket WHERE title = 'late'"))
    assert len(rotated) == 4
    assert rotated[late["above"]] != tokens[late["above"]]
    audit.assert_rotated_once()


WAITING = "waiting for locks that other sessions hold: "
# Five seconds after the first deferral, and as long again for a busy machine.
NAMED_SECONDS = 10.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "phrase"),
    [("reading", r"pid {}, psql, idle in transaction for \d+ s"), ("rotating", "pid {}, psql")],
)
def test_who_holds_a_row_is_named_as_far_as_the_role_may_see(
    database: Database, rotations: Rotations, role: str, phrase: str
) -> None:
    audit = make_tickets(database, ROWS)
    grants = documented_grants(role) + ["GRANT pg_read_all_stats TO reading"] * (role == "reading")
    holder = psycopg.connect(database.url(application_name="psql"))
    pid = holder.info.backend_pid
    holder.execute("SELECT FROM tickets_ticket WHERE id = 1 FOR UPDATE")
    with new_role(database, role, *grants) as url, holder:
        running = rotations.rotate(url, "--batch=500")
        wait_until(lambda: database.checkpoints() > 5, "the other ranges are completed")
        wait_until(lambda: WAITING in running.err, "the holder is named", seconds=NAMED_SECONDS)
        holder.rollback()
        assert_completed(running.wait())
    (named,) = re.findall(f"{WAITING}(.*)", running.err)
    assert re.fullmatch(phrase.format(pid), named)
    audit.assert_rotated_once()


@pytest.mark.slow
def test_who_holds_the_table_is_named_while_late_rows_wait(database: Database, rotations: Rotations) -> None:
    audit = make_tickets(database, ROWS)
    late = psycopg.connect(database.url())
    late.execute(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " VALUES (7, 'late', now(), gen_random_uuid())"
    )
    running = rotations.rotate(database.url(), "--batch=500")
    # First before the bound is frozen, then after the last range.
    wait_until(lambda: running.err.count("waiting for 1 transaction older") == 2, "it waits for the late row")
    holder = psycopg.connect(database.url(application_name="psql"))
    locking = threading.Thread(target=holder.execute, args=["LOCK TABLE tickets_ticket IN SHARE MODE"])
    locking.start()
    wait_until(
        lambda: database.query("SELECT 1 FROM pg_locks WHERE NOT granted"), "it is the next in the queue"
    )
    late.commit()
    late.close()
    locking.join()
    wait_until(lambda: WAITING in running.err, "the holder is named", seconds=NAMED_SECONDS)
    assert f"{WAITING}pid {holder.info.backend_pid}, psql, idle in transaction for " in running.err
    holder.close()
    finished = running.wait()
    assert_completed(finished)
    assert "rotated 1 late row" in finished.err
    audit.assert_rotated_once()
