"""What the owner stores while it runs, for the page and the metrics."""

import asyncio
import time
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from django.utils import timezone

from rotator.events import (
    Event,
    Findings,
    Preflighted,
    RangeCompleted,
    RotationStarted,
    Throttled,
    Vacuumed,
    VacuumSkipped,
)
from rotator.exceptions import RotatorError
from rotator.models import Action, Measurement, Rotation
from rotator.postgres.connection import connected
from rotator.postgres.control import GAP_SECONDS, HELD, HELD_SECONDS
from rotator.postgres.owner import this_process
from rotator.runner import heartbeat
from tests.integration.outcomes import EventRecorder, assert_completed, rotate_tickets
from tests.integration.rotation_tables import COMMITTING, Database

pytestmark = COMMITTING


@pytest.fixture(autouse=True)
def frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)


def test_each_change_is_measured_at_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "MEASURE_SECONDS", 3600)
    database.make_tickets(1, 200)
    database.before_update("PERFORM pg_sleep(0.002); RETURN NEW;")

    def pause_once(event: Event) -> None:
        if isinstance(event, RangeCompleted):
            database.execute(
                "INSERT INTO rotator_control (rotation_id, revision, paused, paused_by, pace, cancelled_by,"
                " changed_by) SELECT max(id), 1, true, 'bob', '', '', 'bob' FROM rotator_rotation"
                " ON CONFLICT DO NOTHING"
            )
        elif isinstance(event, Throttled):
            database.execute("UPDATE rotator_control SET paused = false, revision = 2")

    assert_completed(rotate_tickets(pause_once, batch=5, concurrency=1), rows=200)

    measured = Measurement.objects.order_by("pk")
    assert all(measured.values_list("is_change", flat=True))
    found = list(measured.values_list("state", "held_by"))
    assert {("rotating", ""), ("throttled", "pause")} <= set(found)
    # The next one is only due in an hour, so each of them is a change.
    assert all(one != other for one, other in pairwise(found))
    assert found[-1][1] == ""


def test_measurements_come_regularly_without_a_change(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "MEASURE_SECONDS", 0.1)
    database.make_tickets(1, 200)
    database.before_update("PERFORM pg_sleep(0.003); RETURN NEW;")
    began = time.monotonic()
    rotate_tickets(batch=5, concurrency=1)
    seconds = time.monotonic() - began
    measured = Measurement.objects.filter(state="rotating").order_by("pk")
    rows = list(measured.values_list("rows_done", flat=True))
    assert 4 <= len(rows) <= 1 + seconds / 0.1
    assert measured.filter(is_change=True).count() == 1
    assert rows == sorted(rows)


def test_rejected_rows_are_stored_while_the_run_goes_on(database: Database) -> None:
    database.make_tickets(1, 300)
    trigger = database.before_update(
        "PERFORM pg_sleep(0.002); IF OLD.id IN (6, 101) THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;"
    )
    stored = set[tuple[str, int]]()

    def read(event: Event) -> None:
        if isinstance(event, RangeCompleted | RotationStarted):
            query = "SELECT status, jsonb_array_length(rejected_keys) FROM rotator_rotation"
            stored.update(database.connect().execute(query).fetchall())

    assert rotate_tickets(read, batch=5, concurrency=1).status == "failed"
    assert {("running", 0), ("running", 2)} <= stored

    # The next run retries these rows, so it begins without them.
    database.execute(f"DROP TRIGGER {trigger} ON tickets_ticket")
    stored.clear()
    assert_completed(rotate_tickets(read, batch=5, concurrency=1), rows=300)
    assert stored == {("running", 2), ("running", 0)}


def test_the_log_has_options_and_vacuums(database: Database) -> None:
    database.make_tickets(1, 200)
    rotate_tickets(batch=50, stop_after_rows=100, pace="balanced")
    rotate_tickets(batch=50, pace="full")
    assert list(Action.objects.order_by("pk").values_list("kind", "detail"))[:4] == [
        ("started", "--concurrency 3 --batch 50"),
        ("stopped", "--stop-after"),
        ("resumed", "--concurrency 3 --batch 50 --pace full"),
        ("completed", ""),
    ]
    vacuumed = Action.objects.get(kind="vacuumed")
    assert vacuumed.detail.endswith(" s")
    assert vacuumed.by == Action.objects.earliest("pk").by


def test_a_skipped_vacuum_is_logged_with_its_reason(database: Database) -> None:
    database.make_tickets(1, 200)
    neighbour = database.connect()
    neighbour.execute("BEGIN; LOCK TABLE tickets_ticket IN SHARE UPDATE EXCLUSIVE MODE")

    def unlock(event: Event) -> None:
        # ANALYZE would wait for the lock, too.
        if isinstance(event, VacuumSkipped):
            neighbour.execute("ROLLBACK")

    rotate_tickets(unlock, batch=50)
    assert Action.objects.get(kind="VACUUM skipped").detail == "the table is busy"


def test_two_tasks_log_each_vacuum_once_and_again_after_an_error(database: Database) -> None:
    rotation = Rotation.objects.create(target="t", database="default", started_xid=1, version="0")
    # The log needs nothing else of a run.
    context: Any = SimpleNamespace(owner=this_process())
    unused: Any = None
    measured = heartbeat.Heartbeat(context, unused, unused, unused)
    measured.take(Vacuumed(seconds=1.0))
    measured.take(VacuumSkipped(reason="the table is busy", is_once=True))

    async def log() -> None:
        async with connected(database.server) as one, connected(database.server) as other:
            with pytest.raises((RotatorError, psycopg.Error)):
                await measured.log_vacuums(one, rotation.pk + 1)
            await asyncio.gather(*(measured.log_vacuums(each, rotation.pk) for each in (one, other)))

    asyncio.run(log())
    assert set(Action.objects.values_list("kind", flat=True)) == {"vacuumed", "VACUUM skipped"}
    assert Action.objects.count() == 2


def test_the_findings_of_the_preflight_are_stored(database: Database) -> None:
    database.make_tickets(1, 200)
    recorder = EventRecorder()
    rotate_tickets(recorder, preflight=True, stop_after_rows=100)
    (reported,) = (event.findings for event in recorder.events if isinstance(event, Preflighted))
    assert reported.table.indexes
    saved = Rotation.objects.get().findings
    assert saved is not None
    assert Findings.from_json(saved) == reported
    rotate_tickets(restart=True)
    assert Rotation.objects.latest("pk").findings is None


def test_a_hold_ends_with_the_next_change_or_with_its_owner(database: Database) -> None:
    rotation = Rotation.objects.create(target="t", database="default", started_xid=1, version="0")
    began = timezone.now() - timedelta(hours=1)
    for seconds, held, is_change in (
        (0, "", True),
        (7, "pause", True),
        (12, "pause", False),
        (14, "", True),
        # Another owner resumes while the pause lasts.
        (600, "pause", True),
        (605, "pause", False),
        (900, "pause", True),
        (904, "pause\nreplica lag of r1", True),
        (909, "pause\nreplica lag of r1", False),
    ):
        Measurement.objects.create(
            rotation=rotation,
            at=began + timedelta(seconds=seconds),
            rows_done=0,
            state="rotating",
            held_by=held,
            is_change=is_change,
            workers=1,
        )
    parameters = {"rotation": rotation.pk, "gap": GAP_SECONDS, "limit": 3}
    found = database.execute(HELD, parameters)
    assert [(names, (until - since).total_seconds()) for names, since, until in found] == [
        ("pause\nreplica lag of r1", 5),
        ("pause", 4),
        ("pause", 5),
    ]
    sums = database.execute(HELD_SECONDS, {**parameters, "limit": None})
    assert sums == [("pause", 7 + 5 + 4 + 5), ("replica lag of r1", 5)]
