"""What the tasks of Celery's workers leave behind, where no worker is needed to see it."""

import os
import sys
import threading
from types import SimpleNamespace
from typing import NoReturn

import pytest
from celery import Task
from django.db import connections

from rotator.api import prepare
from rotator.exceptions import ServerLostError
from rotator.models import CompletedRange, Rotation, Span, Verification
from rotator.models import Helper as HelperRow
from rotator.options import RunOptions
from rotator.postgres import rotations
from rotator.progress.lines import LogObserver
from rotator.runner.worker import Helper
from rotator.tasks import coordinate, coordinate_rotation, help_rotation, help_with_rotation
from tests.integration.outcomes import rotate_tickets
from tests.integration.rotation_tables import COMMITTING, TARGET, Database

pytestmark = COMMITTING


async def _lose_message(_rotation: int, _message: int) -> None:
    """Do as a broker does that takes every message and delivers none."""


def _begin(database: Database, **options: float) -> int:
    database.make_tickets(1, 100)
    return prepare([TARGET], "default", RunOptions(**options)).begin(lambda _event: None)  # type: ignore[arg-type] # checked by the class


def _running(database: Database) -> tuple[int, int]:
    """Begin a rotation that has a span and a message, and return both ids."""
    number = _begin(database)
    Rotation.objects.update(status="running")
    Span.objects.create(rotation_id=number, after=None, through=[100], checkpoints_before=0)
    return number, HelperRow.objects.create(rotation_id=number).pk


def _coordinate(number: int, *, stops: bool) -> bool:
    observer = LogObserver(hides_keys=False)
    return coordinate_rotation("default", number, observer, _lose_message, lambda: stops)


def test_a_coordinator_whose_server_is_lost_for_too_long_leaves_the_rotation_to_the_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = _begin(database, outage_budget_seconds=0.5)

    async def lose(*_: object, **__: object) -> NoReturn:
        raise ServerLostError("The server cannot be reached: it is gone.")

    with monkeypatch.context() as lost:
        lost.setattr(rotations, "beat", lose)
        lost.setattr(rotations, "take_over_from_self", lose)
        # The task is retried on this error.
        with pytest.raises(ServerLostError, match="it is gone"):
            _coordinate(number, stops=False)
    rotation = Rotation.objects.get()
    assert (rotation.status, rotation.error) == ("queued", "The server cannot be reached: it is gone.")
    # The retried task resumes it; its worker stops, and hands it on.
    assert _coordinate(number, stops=True)


def test_an_error_of_the_program_in_a_worker_is_noted_with_its_message(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, message = _running(database)

    async def fail(*_: object) -> NoReturn:
        raise KeyError("leaked")

    monkeypatch.setattr(Helper, "work", fail)
    with pytest.raises(KeyError):
        help_with_rotation("default", number, message, lambda: False)
    helper = HelperRow.objects.get()
    assert helper.error == "The program failed with KeyError: look at its traceback."
    assert helper.expires_at is None


def test_a_worker_that_finds_nothing_more_leaves_and_sends_nothing(database: Database) -> None:
    number, message = _running(database)
    assert help_with_rotation("default", number, message, lambda: False) is None
    assert sum(CompletedRange.objects.values_list("rows", flat=True)) == 100
    assert Span.objects.get().finished_at is not None
    assert not HelperRow.objects.exists()


def test_a_worker_whose_time_is_over_sends_the_next_message(database: Database) -> None:
    number, message = _running(database)
    following = help_with_rotation("default", number, message, lambda: True)
    assert following not in (None, message)
    helper = HelperRow.objects.get()
    assert (helper.pk, helper.expires_at) == (following, None)
    assert helper.sent_at is not None
    # The message before it has been delivered once more.
    assert help_with_rotation("default", number, message, lambda: False) is None
    assert not CompletedRange.objects.exists()
    assert help_with_rotation("default", number, following, lambda: False) is None
    assert CompletedRange.objects.exists()


def test_of_two_copies_of_a_message_one_works(database: Database) -> None:
    number, message = _running(database)
    copies: list[int | None] = []

    def deliver_again() -> None:
        copies.append(help_with_rotation("default", number, message, lambda: False))
        connections.close_all()

    def should_stop() -> bool:
        if not copies:
            # While the first one works.
            thread = threading.Thread(target=deliver_again)
            thread.start()
            thread.join()
        return False

    assert help_with_rotation("default", number, message, should_stop) is None
    assert copies == [None]
    assert Span.objects.get().generation == 1
    assert sum(CompletedRange.objects.values_list("rows", flat=True)) == 100


@pytest.mark.parametrize("task", [coordinate, help_rotation])
def test_a_worker_that_cannot_rotate_logs_one_sentence(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    number, message = _running(database)
    patched = SimpleNamespace(is_monkey_patched=lambda name: name == "socket")
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patched)
    with caplog.at_level("INFO"):
        task.apply(("default", number, *([message] if task is help_rotation else [])))
    said = {record.name: record.getMessage() for record in caplog.records}
    assert said["rotator"].startswith(
        f"Rotation {number}: eventlet has monkey-patched the process {os.getpid()} on "
    )
    assert " raised expected: RotatorError('eventlet has" in said["celery.app.trace"]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("status", ["interrupted", "queued", "failed"])
def test_a_message_for_a_rotation_that_does_not_run_ends_at_once(database: Database, status: str) -> None:
    number, message = _running(database)
    Rotation.objects.update(status=status)
    assert help_with_rotation("default", number, message, lambda: False) is None
    assert not HelperRow.objects.exists()
    assert not CompletedRange.objects.exists()


def test_the_next_task_resumes_a_verification_that_was_cut_off(database: Database) -> None:
    database.make_tickets(1, 100)
    assert rotate_tickets(prove=True).exit_status == 0
    number, verifications = Rotation.objects.get().pk, Verification.objects.all()
    verifications.update(finished_at=None)

    assert _coordinate(number, stops=True)
    assert not verifications.filter(finished_at__isnull=False).exists()
    assert not _coordinate(number, stops=False)

    assert verifications.get().result["is_verified"]
    # A copy of the message.
    assert not _coordinate(number, stops=True)
