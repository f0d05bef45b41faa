"""Requests of users in the database: who may change them, and the answer without a working process."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from rotator.events import ActionKind, Event, LimitsChanged, Throttled, ignore
from rotator.exceptions import RevisionError
from rotator.models import Action, Control, Rotation
from rotator.options import RunOptions
from rotator.postgres.connection import Server
from rotator.postgres.control import Requested
from rotator.postgres.owner import this_process
from rotator.runner.context import RunContext
from rotator.runner.control import LiveControl
from tests.integration.outcomes import (
    EventRecorder,
    after_range,
    assert_completed,
    make_rotation,
    rotate_tickets,
)
from tests.integration.rotation_tables import (
    COMMITTING,
    TICKETS,
    Database,
    once_each,
)

pytestmark = COMMITTING

USER = this_process().user


def ask(*words: str) -> str:
    out = io.StringIO()
    call_command("rotations", *words, stdout=out)
    return out.getvalue()


def test_of_two_users_at_once_one_is_refused(database: Database) -> None:
    rotation = make_rotation()
    Control.change(rotation, ActionKind.CHANGED, {"batch": 500}, by="zoe")
    # Long enough for all of them to read the row before the first one commits, if no lock stops them.
    database.before_update("PERFORM pg_sleep(0.3); RETURN NEW;", replace(TICKETS, path=("rotator_control",)))

    def change(by: str) -> str:
        try:
            Control.change(rotation, ActionKind.PAUSED, {"paused": True}, by=by, revision=1)
        except RevisionError as error:
            return str(error)
        finally:
            connection.close()
        return ""

    with ThreadPoolExecutor(4) as users:
        answers = list(users.map(change, ["alice", "bob", "carol", "dave"]))
    control = Control.objects.get()
    assert sum(not answer for answer in answers) == 1
    assert (control.revision, Action.objects.count()) == (2, 2)
    expected = f"was changed since revision 1: its revision is 2, by {control.changed_by}. Look at it"
    assert sum(expected in answer for answer in answers) == 3


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_without_an_owner_a_request_is_stored(status: str) -> None:
    number = str(make_rotation(status=status).pk)
    assert ask(number, "pause") == (
        f"Rotation {number}: the request is stored as revision 1. The rotation is {status}, so no process "
        "answers. The request applies when the rotation is resumed.\n"
    )
    assert ask(number, "set", "concurrency=2", "batch=500").startswith(f"Rotation {number}: the request is ")
    control = Control.objects.get()
    assert (control.paused, control.paused_by, control.concurrency, control.batch) == (True, USER, 2, 500)
    assert f"paused, concurrency 2, batch 500: revision 2 by {USER} at " in ask(number)
    assert ask(number, "--log").splitlines()[1].endswith(f" UTC  changed by {USER}: concurrency=2 batch=500")


def test_a_silent_owner_is_said_not_to_answer() -> None:
    rotation = make_rotation(updated_at=datetime.now(UTC) - timedelta(seconds=60))
    with pytest.raises(SystemExit) as ended:
        ask(str(rotation.pk), "pause")
    assert ended.value.code == 1
    assert Control.objects.get().paused


def test_a_queued_rotation_is_cancelled_without_an_owner() -> None:
    rotation = make_rotation(status="queued")
    assert ask(str(rotation.pk), "cancel") == (
        f"Rotation {rotation.pk} is cancelled. The same command resumes it.\n"
    )
    rotation.refresh_from_db()
    assert (rotation.status, rotation.stop_reason) == ("interrupted", "rotations cancel")
    assert f"  reason     cancelled by {USER}\n" in ask(str(rotation.pk))


def test_a_finished_rotation_is_not_changed() -> None:
    rotation = make_rotation(status="completed", finished_at=datetime.now(UTC))
    for request in ("pause", "resume", "cancel"):
        with pytest.raises(CommandError, match=r"is completed, so it cannot be changed.$"):
            ask(str(rotation.pk), request)
    assert ask("pause", "--all") == "There are no unfinished rotations in this database.\n"
    assert not Control.objects.exists()


def test_a_large_range_needs_the_pace_full() -> None:
    number = str(make_rotation(status="interrupted", options=RunOptions(pace="full").to_json()).pk)
    ask(number, "set", "batch=200000")
    with pytest.raises(CommandError, match=r"^--batch must be at most 100,000, not 200000: "):
        ask(number, "set", "pace=gentle")
    ask(number, "set", "pace=gentle", "batch=default")


def test_a_run_is_paused_limited_and_counts_its_figures(database: Database) -> None:
    database.make_tickets(1, 200)
    database.count_updates()

    def change() -> None:
        database.execute(
            "INSERT INTO rotator_control (rotation_id, revision, paused, paused_by, pace, concurrency, batch,"
            " cancelled_by, changed_by) SELECT id, 1, true, 'alice', '', 1, 7, '', 'alice'"
            " FROM rotator_rotation"
        )

    change_once = after_range(3, change)

    def resume(event: Event) -> None:
        change_once(event)
        if isinstance(event, Throttled):
            assert event.reason == "paused by alice"
            database.execute("UPDATE rotator_control SET paused = false, revision = 2, changed_by = 'bob'")

    database.before_update("PERFORM pg_sleep(0.03); RETURN NEW;")
    recorder = EventRecorder(resume)
    assert_completed(rotate_tickets(recorder), rows=200)
    assert [event for event in recorder.events if isinstance(event, LimitsChanged)] == [
        LimitsChanged(concurrency=1, batch=7, by="alice")
    ]
    rotation = Rotation.objects.get()
    assert rotation.throttled_seconds > 0.5
    assert (rotation.throttle_reason, rotation.throttled_since, rotation.applied_revision) == ("", None, 2)
    assert database.updates() == once_each((1, 200))


# --- What an owner and a helper apply ---------------------------------------------------------------


def requested(**fields: object) -> Requested:
    values = {
        "revision": 0,
        "paused": False,
        "paused_by": "",
        "pace": "",
        "concurrency": None,
        "batch": None,
        "cancel_revision": 0,
        "cancelled_by": "",
        "changed_by": "alice",
        "applied_revision": 0,
        "throttle_reason": "",
        "silent_seconds": 0.5,
        **fields,
    }
    return Requested(**values)  # type: ignore[arg-type] # the fields of a test


class Applied:
    """A live control with what it does."""

    def __init__(self, **options: object) -> None:
        chosen = RunOptions(**options)  # type: ignore[arg-type] # the options of a test
        unused: Any = None
        context = RunContext(server=Server(parameters={}), target=unused, options=chosen, notify=ignore)
        self.gate, self.pacing = context.gate, context.pacing
        self.cancelled = list[str]()
        self.live = LiveControl(context, self.cancelled.append)

    @property
    def reasons(self) -> list[str]:
        return [hold.reason for hold in self.gate.holds.values()]


def test_limits_are_upper_limits_and_default_is_that_of_the_run() -> None:
    applied = Applied(concurrency=4, batch=2000)
    applied.live.apply(requested(revision=1, concurrency=2, batch=500, pace="gentle"))
    assert (applied.gate.concurrency, applied.gate.max_rows, applied.pacing.pace) == (2, 500, "gentle")
    applied.live.apply(requested(revision=2, concurrency=8, pace="of a newer version"))
    assert (applied.gate.concurrency, applied.gate.max_rows, applied.pacing.pace) == (4, 2000, "gentle")
    applied.live.apply(requested(revision=3))
    assert (applied.gate.concurrency, applied.pacing.pace) == (4, "balanced")
    assert applied.live.revision == 3


def test_a_request_to_cancel_is_for_the_owner_of_that_time() -> None:
    earlier = requested(revision=3, cancel_revision=3, cancelled_by="bob", applied_revision=2)
    by_user = Applied()
    by_user.live.apply(earlier)
    assert by_user.cancelled == []
    by_user.live.apply(requested(revision=5, cancel_revision=5, cancelled_by="bob"))
    by_user.live.apply(requested(revision=6, cancel_revision=5, cancelled_by="bob"))
    assert by_user.cancelled == ["bob"]
    # Celery has begun it: no user has resumed the rotation.
    by_celery = Applied(rotation=7)
    by_celery.live.apply(earlier)
    assert by_celery.cancelled == ["bob"]


def test_a_helper_follows_the_owners_throttles_and_holds_while_they_are_unknown() -> None:
    applied = Applied()
    applied.live.follow_owner(requested(throttle_reason="lag 14 s > 10 s"), has_throttles=True)
    assert applied.reasons == ["lag 14 s > 10 s"]
    applied.live.follow_owner(requested(), has_throttles=True)
    assert applied.gate.is_open
    applied.live.follow_owner(requested(silent_seconds=7.0), has_throttles=False)
    assert applied.gate.is_open
    applied.live.follow_owner(requested(silent_seconds=7.0), has_throttles=True)
    assert applied.reasons == ["no heartbeat of the owner for 7 s > 5 s"]
    applied.live.follow_owner(requested(paused=True, paused_by="alice"), has_throttles=True)
    assert applied.reasons == ["paused by alice"]
