"""What Celery's workers do for a distributed rotation, by what its row in the database says."""

from dataclasses import replace

from django.db import InterfaceError, OperationalError
from django.db.models.functions import Now

from rotator.errors import (
    OwnedElsewhereError,
    RotationOverError,
    RotatorError,
    RowsLockedError,
    ServerLostError,
    StoppedBeforeStartError,
)
from rotator.events import Observer
from rotator.models import Rotation, Span
from rotator.postgres.transaction import Claim
from rotator.run.context import ShouldStop
from rotator.run.distribution import SpanPublisher
from rotator.run.options import RunOptions
from rotator.run.run import LEFT_TO_WORKERS, program_error
from rotator.selection import Selection
from rotator.service import prepare


def rotate_span(database: str, claim: Claim, span: int, should_stop: ShouldStop) -> None:
    """Rewrite what is left of a span; nothing where it is another's by now, or nobody's.

    An error that trying again here does not mend is noted with the span, and ends the rotation: what it is
    has to be known where somebody looks.

    Args:
        database: Django's alias of the database.
        claim: What the message about the span says of the rotation.
        span: The span's id.
        should_stop: Whether the worker has to stop.

    Raises:
        RotatorError: It cannot be done here.
    """
    rotation = (
        Rotation.objects.using(database)
        .filter(pk=claim.rotation, generation=claim.generation, status=Rotation.Status.RUNNING)
        .first()
    )
    if rotation is None:
        return
    options, selection = RunOptions.read(rotation.options), Selection.read(rotation.selection)
    try:
        prepared = prepare(rotation.target.split(), database, options, selection, is_begun=True)
        prepared.rotate_span(claim, span, should_stop, rotation.identity)
    except (ServerLostError, RowsLockedError, OperationalError, InterfaceError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, RotatorError) else program_error(error)
        Span.objects.using(database).filter(
            pk=span, rotation=rotation, rotation__generation=claim.generation, finished_at=None
        ).update(error=reason, finished_at=Now(), updated_at=Now())
        raise


def coordinate(
    database: str, number: int, observer: Observer, publisher: SpanPublisher, should_stop: ShouldStop
) -> bool:
    """Plan and watch a rotation that was begun and left to the workers.

    Args:
        database: Django's alias of the database.
        number: The rotation's id; one that is over, or was stopped on purpose, is no worker's work.
        observer: Is told of everything.
        publisher: Has the spans rewritten.
        should_stop: Whether the worker has to stop.

    Returns:
        Whether another worker is to go on with it.

    Raises:
        OwnedElsewhereError: Another process is alive and coordinates it.
        ServerLostError: The server could not be reached in the first place.
        RotatorError: It cannot be done here; the rotation's row says why.
    """
    rotations = Rotation.objects.using(database).filter(pk=number, status__in=Rotation.UNFINISHED)
    try:
        rotation = rotations.first()
    except OperationalError as error:
        raise ServerLostError(f"The database '{database}' cannot be reached.") from error
    if rotation is None or (rotation.status != Rotation.Status.RUNNING and rotation.error != LEFT_TO_WORKERS):
        return False
    options = replace(
        RunOptions.read(rotation.options),
        rotation=number,
        # The signals of a worker are its own, and nobody looks at a preflight here.
        listens_to_signals=False,
        preflight=False,
        # They were meant for the beginning.
        restart=False,
        after=None,
        take_over=False,
    )
    lost = ""
    try:
        prepared = prepare(rotation.target.split(), database, options, Selection.read(rotation.selection))
        outcome = prepared.rotate(observer, publisher, should_stop)
        stopped = outcome.stopped
        # An option that ended the run has nothing left for another worker.
        is_left = stopped.status == "interrupted" and outcome.exit_status != 0 and not stopped.superseded
        if is_left and not should_stop():
            lost = stopped.error
    except RotationOverError:
        is_left = False
    except StoppedBeforeStartError:
        is_left = True
    except (OwnedElsewhereError, ServerLostError):
        raise
    except (OperationalError, InterfaceError) as error:
        raise ServerLostError(f"The database '{database}' cannot be reached.") from error
    except Exception as error:
        reason = str(error) if isinstance(error, RotatorError) else program_error(error)
        # Unless somebody has taken it over meanwhile.
        rotations.filter(generation=rotation.generation, updated_at=rotation.updated_at).update(
            status=Rotation.Status.FAILED, error=reason, updated_at=Now()
        )
        raise
    if lost:
        raise ServerLostError(lost)
    return is_left
