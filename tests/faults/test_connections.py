"""Connections that are cut, that are cut at a COMMIT, and that fall silent."""

import random
import time

import pytest

from core.proxy import At, Proxy
from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, slow_down, speed_up
from tests.faults.harness import RANGE, Rotations, assert_completed

ROWS = 8000
CUTS = 4
CONCURRENCY = 4
# The client's own deadline for an answer is 30 s.
NOTICED_SECONDS = 60.0

TAKEN_OVER = b"generation = generation + 1"
COMPLETED = b"status = 'completed', finished_at"

SLOW = pytest.mark.slow
# Each of the three statements meets the same code; together, the quick tests try all moments but one.
RANGE_MOMENTS = [At.AFTER, At.LATE, *(pytest.param(at, marks=SLOW) for at in (At.BEFORE, At.NEVER))]
MOMENTS = [At.BEFORE, At.AFTER, *(pytest.param(at, marks=SLOW) for at in (At.LATE, At.NEVER))]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_connections_cut_again_and_again(
    database: Database, rotations: Rotations, proxy: Proxy, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(port=proxy.port), "--batch=50")
    cut = 0
    for _ in range(CUTS):
        done = database.checkpoints()
        wait_until(
            # More than the ranges in flight, which may be committed after the cut.
            lambda: database.checkpoints() > done + CONCURRENCY,  # noqa: B023 - over before the next
            "more checkpoints",
        )
        time.sleep(chance.random() / 20)
        cut += proxy.cut()
    speed_up(database)
    finished = running.wait()

    assert cut >= CUTS
    assert_completed(finished)
    assert finished.err.count("outage: ") == CUTS
    audit.assert_rotated_once()


def test_single_connections_ended_by_the_server(database: Database, rotations: Rotations) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(), "--batch=50")
    for number in range(CUTS):
        done = database.checkpoints()
        wait_until(
            lambda: database.checkpoints() > done + CONCURRENCY,  # noqa: B023 - over before the next
            "more checkpoints",
        )
        end = (
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'rotator'"
            " ORDER BY pid OFFSET %s LIMIT 1) AS one"
        )
        # The run may have lost so many connections that it has to open this one again.
        wait_until(lambda: database.query(end, [number]), "a connection is ended")  # noqa: B023 - the same
    speed_up(database)

    assert_completed(running.wait())
    audit.assert_rotated_once()


@pytest.mark.parametrize("at", RANGE_MOMENTS)
def test_a_range_whose_commit_is_ambiguous(
    database: Database, rotations: Rotations, proxy: Proxy, at: At
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(port=proxy.port), "--batch=50")
    for number in range(1, 3):
        proxy.cut_at_commit(at, containing=RANGE)
        wait_until(lambda: proxy.commits_cut == number, "a commit is cut")  # noqa: B023 - over before the next
    speed_up(database)
    finished = running.wait()

    assert_completed(finished)
    # Two of them may be lost at once.
    assert finished.err.count("outage: ") in (1, 2)
    audit.assert_rotated_once()


@pytest.mark.parametrize("at", MOMENTS)
def test_taking_over_from_itself_whose_commit_is_ambiguous(
    database: Database, rotations: Rotations, proxy: Proxy, at: At
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(port=proxy.port), "--batch=50")
    wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
    proxy.cut_at_commit(at, containing=TAKEN_OVER)
    proxy.cut()
    wait_until(lambda: proxy.commits_cut == 1, "the commit is cut")
    speed_up(database)
    finished = running.wait()

    assert_completed(finished)
    audit.assert_rotated_once()


@pytest.mark.parametrize("at", MOMENTS)
def test_a_completion_whose_commit_is_ambiguous(
    database: Database, rotations: Rotations, proxy: Proxy, at: At
) -> None:
    audit = make_tickets(database, 2000)
    proxy.cut_at_commit(at, containing=COMPLETED)

    finished = rotations.rotated(database.url(port=proxy.port), "--batch=500")

    assert proxy.commits_cut == 1
    assert_completed(finished)
    audit.assert_rotated_once()


@pytest.mark.slow
def test_a_silent_connection_is_detected_and_the_run_continues(
    database: Database, rotations: Rotations, proxy: Proxy
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    running = rotations.rotate(database.url(port=proxy.port), "--batch=50")
    wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
    proxy.go_silent()
    silent_at = time.monotonic()
    wait_until(lambda: "outage: " in running.err, "it is noticed", seconds=NOTICED_SECONDS)
    noticed_after = time.monotonic() - silent_at
    speed_up(database)
    finished = running.wait()

    assert noticed_after < NOTICED_SECONDS
    assert "has not answered for 30 s" in finished.err
    assert_completed(finished)
    audit.assert_rotated_once()


def test_a_slow_network_is_no_outage(database: Database, rotations: Rotations, proxy: Proxy) -> None:
    audit = make_tickets(database, 4000)
    proxy.delay(to_server_seconds=0.02, to_client_seconds=0.03)
    proxy.throttle(200_000)

    finished = rotations.rotated(database.url(port=proxy.port), "--batch=200")

    assert_completed(finished)
    assert "outage: " not in finished.err
    audit.assert_rotated_once()
