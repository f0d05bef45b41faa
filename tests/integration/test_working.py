"""What the tasks of Celery's workers leave behind, where no worker is needed to see it."""

import logging
from typing import NoReturn

import pytest

from rotator.api import prepare
from rotator.exceptions import ServerLostError
from rotator.models import Rotation, Span
from rotator.options import RunOptions
from rotator.postgres import rotations
from rotator.postgres.fence import Lease
from rotator.progress import log_observer
from rotator.runner.worker import SpanWork
from rotator.tasks import coordinate_rotation, work_on_span
from tests.integration.rotation_tables import COMMITTING, TARGET, Database

pytestmark = COMMITTING


class _Broker:
    """Takes every message, and no worker ever gets one."""

    async def publish(self, lease: Lease, span: int) -> None:
        """Forget it."""

    async def revoke(self) -> None:
        """Forget it."""


def _begin(database: Database, **options: float) -> int:
    database.make_tickets(1, 100)
    return prepare([TARGET], "default", RunOptions(**options)).begin(lambda _event: None)  # type: ignore[arg-type] # checked by the class


def _coordinate(number: int, *, stops: bool) -> bool:
    observer = log_observer(logging.getLogger(__name__))
    return coordinate_rotation("default", number, observer, _Broker(), lambda: stops)


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


def test_an_error_of_the_program_in_a_worker_is_noted_with_the_span(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = _begin(database)
    Rotation.objects.update(status="running")
    generation = Rotation.objects.get().generation
    span = Span.objects.create(
        rotation_id=number,
        after=None,
        through=[100],
        checkpoints_before=0,
        generation=0,
        worker="",
        rows=0,
        ranges=0,
        retries=0,
        failed_keys=[],
        error="",
    )

    async def fail(*_: object) -> NoReturn:
        raise KeyError("leaked")

    monkeypatch.setattr(SpanWork, "rotate", fail)
    with pytest.raises(KeyError):
        work_on_span("default", Lease(rotation=number, generation=generation), span.pk, lambda: False)
    span.refresh_from_db()
    assert span.error == "The program failed with KeyError: look at its traceback."
    assert span.finished_at is not None
