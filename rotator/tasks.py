"""The Celery tasks of a distributed rotation, and the functions that send their messages.

Workers import this module, and so does the command with ``--celery``. No other module imports Celery.
"""

import asyncio
import logging
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Final, NoReturn

from celery import Celery, Task, current_app, shared_task
from celery.exceptions import Reject
from celery.signals import worker_shutting_down
from django.db import InterfaceError, OperationalError
from django.db.models.functions import Now
from django.utils.module_loading import import_string

from rotator.api import Prepared, prepare_again
from rotator.apps import hides_keys, rotator_setting
from rotator.events import Observer
from rotator.exceptions import (
    BrokerError,
    OptionError,
    OwnedElsewhereError,
    RotationFinishedError,
    RotatorError,
    ServerLostError,
    StoppedBeforeStartError,
)
from rotator.models import Helper, Ledger, Rotation
from rotator.postgres.fence import Lease
from rotator.postgres.spans import LEASE_SECONDS
from rotator.progress.lines import LogObserver
from rotator.progress.text import HIDDEN
from rotator.runner.aio import run_in_daemon_thread
from rotator.runner.context import AskForHelp, ShouldStop
from rotator.runner.runner import program_error


def help_with_rotation(database: str, number: int, message: int, should_stop: ShouldStop) -> int | None:
    """Rewrite spans of a rotation; do nothing where the message is not valid, or not valid any more.

    Each message is valid once, so a copy that a broker delivers again ends here. An error that would recur is
    recorded for the rotation's owner, who ends the rotation with it.

    Returns:
        The id of the message to send to the next task; None where none is needed.
    """
    rotations, helpers = Rotation.objects.using(database), Helper.objects.using(database)
    if not helpers.filter(pk=message, rotation=number).delete()[0]:
        return None
    rotation = rotations.filter(pk=number, status=Rotation.Status.RUNNING).first()
    if rotation is None:
        return None
    lease = Lease(rotation=number, generation=rotation.generation)
    helper = helpers.create(rotation=rotation, expires_at=Now() + timedelta(seconds=LEASE_SECONDS))
    this = helpers.filter(pk=helper.pk)
    try:
        prepared = prepare_again(rotation, database, is_begun=True)
        is_left = prepared.help(lease, helper.pk, should_stop, rotation.identity)
    except (ServerLostError, OperationalError, InterfaceError):
        # The owner sends another message when the lease has expired.
        raise
    except Exception as error:
        this.update(error=_reason(error), expires_at=None)
        raise
    # Where the owner has sent another message instead, this row is deleted already.
    is_left = bool(this.delete()[0]) and is_left
    return helpers.create(rotation=rotation, sent_at=Now()).pk if is_left else None


def coordinate_rotation(
    database: str, number: int, observer: Observer, ask_for_help: AskForHelp, should_stop: ShouldStop
) -> bool:
    """Plan and watch a rotation that is queued for Celery workers, and verify it if it has a ledger.

    A rotation that is verified or was stopped is left as it is.

    Returns:
        Whether another worker has to resume it.

    Raises:
        OwnedElsewhereError: Another process coordinates it.
        ServerLostError: The server is unreachable.
        RotatorError: This worker cannot rotate the target; the rotation's row has the reason.
    """
    with _errors_as_outages(database):
        rotation = Rotation.objects.using(database).filter(pk=number).first()
        if rotation is not None and rotation.status == Rotation.Status.COMPLETED:
            return _resume_verification(rotation, database, observer, should_stop)
    if rotation is None or not rotation.is_active:
        return False
    try:
        with _errors_as_outages(database):
            stopped = _prepare_for_worker(rotation, database).rotate(observer, ask_for_help, should_stop)
    except RotationFinishedError:
        return False
    except StoppedBeforeStartError:
        return True
    except (OwnedElsewhereError, ServerLostError):
        raise
    except Exception as error:
        _record_failure(rotation, database, error)
        raise
    if stopped.status == "queued" and stopped.error:
        raise ServerLostError(stopped.error)
    is_unverified = stopped.verification is not None and bool(stopped.verification.error)
    return stopped.status == "queued" or is_unverified


@contextmanager
def _errors_as_outages(database: str) -> Iterator[None]:
    """Raise ServerLostError for the errors of Django's own connection."""
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        raise ServerLostError(f"The database '{database}' cannot be reached.") from error


def _prepare_for_worker(rotation: Rotation, database: str) -> Prepared:
    prepared = prepare_again(rotation, database)
    # Celery handles the signals of its workers.
    options = replace(prepared.options.for_next_run(), rotation=rotation.pk, listens_to_signals=False)
    return replace(prepared, options=options)


def _record_failure(rotation: Rotation, database: str, error: Exception) -> None:
    """Record an error that would recur, unless another process has taken the rotation over."""
    Rotation.objects.using(database).filter(
        pk=rotation.pk,
        status__in=Rotation.UNFINISHED,
        generation=rotation.generation,
        updated_at=rotation.updated_at,
    ).update(status=Rotation.Status.FAILED, error=_reason(error), updated_at=Now())


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RotatorError) else program_error(error)


def _resume_verification(
    rotation: Rotation, database: str, observer: Observer, should_stop: ShouldStop
) -> bool:
    """Verify a rotation with a ledger, unless that has finished; return whether it has to be resumed."""
    provable = Rotation.objects.using(database).filter(pk=rotation.pk, ledger__state=Ledger.State.READY)
    if not provable.exclude(verifications__finished_at__isnull=False).exists():
        return False
    prepared = _prepare_for_worker(rotation, database)
    return bool(prepared.verify(observer, rotation.pk, repairs=False, should_stop=should_stop).error)


# A limit of the project's app would end a task in the middle of its work.
TIME_LIMIT_SECONDS: Final = 1800
# A broker delivers a message again that is not acknowledged for long: Redis after an hour, RabbitMQ after
# half an hour; RabbitMQ then also closes the worker's channel.
HAND_ON_SECONDS: Final = 1200
# Other tasks of the same queue get a process within this time.
HELP_SECONDS: Final = 60
ASK_AGAIN_SECONDS: Final = 60
PUBLISH_SECONDS: Final = 10.0
MAX_BROKER_WAIT_SECONDS: Final = 300.0

# Shared with the processes that the worker forks: Celery does not tell them of its shutdown.
_shutdown = mmap.mmap(-1, 1)


@worker_shutting_down.connect  # type: ignore[untyped-decorator] # Celery has no types
def _note_shutdown(**_: object) -> None:
    _shutdown[0] = 1


def _should_hand_on(seconds: float) -> ShouldStop:
    """Return a function that returns whether a task that begins now has to leave the rest to another task."""
    until = time.monotonic() + seconds
    return lambda: bool(_shutdown[0]) or time.monotonic() > until


_OPTIONS: Final[dict[str, Any]] = {
    # The message of a worker that dies is delivered again.
    "acks_late": True,
    "reject_on_worker_lost": True,
    "ignore_result": True,
    "time_limit": TIME_LIMIT_SECONDS,
    "soft_time_limit": TIME_LIMIT_SECONDS,
    # Celery logs these without a traceback.
    "throws": (RotatorError,),
}


@contextmanager
def _logged_errors(rotation: int) -> Iterator[None]:
    """Log the text of an error, because Celery logs expected ones only at the level INFO."""
    try:
        yield
    except RotatorError as error:
        reason = f"{type(error).__name__} {HIDDEN}" if hides_keys() else str(error)
        logging.getLogger("rotator").warning("Rotation %s: %s", rotation, reason)
        # Celery pickles it, and not every class of the errors can be pickled.
        raise RotatorError(reason) from None


@shared_task(name="rotator.help", **_OPTIONS)  # type: ignore[untyped-decorator] # Celery has no types
def help_rotation(database: str, rotation: int, message: int) -> None:
    """Help with a rotation for a while, then send the next message."""
    following: int | None = message
    while following is not None and not _shutdown[0]:
        with _logged_errors(rotation):
            following = help_with_rotation(database, rotation, following, _should_hand_on(HELP_SECONDS))
        if following is not None:
            # Where the broker cannot be reached, this task continues.
            with suppress(BrokerError):
                asyncio.run(ask_for_help(database, rotation, following))
                return


@shared_task(name="rotator.coordinate", bind=True, max_retries=None, **_OPTIONS)  # type: ignore[untyped-decorator] # Celery has no types
def coordinate(task: Task, database: str, rotation: int) -> None:
    """Plan and watch a rotation without a terminal; occupies one process of a worker until its end.

    The task sends its message again after 20 minutes and when its worker has to stop. Copies of the message
    are harmless while rows are rotated: while another task coordinates the rotation, or the server is
    unreachable, a copy is retried every minute, so that one of them can take over. Of two copies that verify
    the rotation at the same time, one may fail; the other one has the result.
    """
    observer = LogObserver(hides_keys=hides_keys())
    ask = partial(ask_for_help, database)
    with _logged_errors(rotation):
        try:
            is_left = coordinate_rotation(database, rotation, observer, ask, _should_hand_on(HAND_ON_SECONDS))
        except (OwnedElsewhereError, ServerLostError):
            _retry_later(task, seconds=ASK_AGAIN_SECONDS)
        if is_left:
            _retry_later(task, seconds=0)


def _retry_later(task: Task, *, seconds: int) -> NoReturn:
    """Retry this message after some time, and end this task."""
    try:
        raise task.retry(countdown=seconds)
    except Reject as error:
        # The new message could not be sent: the broker keeps the old one.
        raise Reject(error.reason, requeue=True) from None


async def ask_for_help(database: str, rotation: int, message: int) -> None:
    """Send a message that asks a worker for help with a rotation."""
    await _send(help_rotation, (database, rotation, message))


def hand_over(database: str, rotation: int) -> None:
    """Send a message that asks a worker to coordinate a rotation."""
    asyncio.run(_send(coordinate, (database, rotation)))


def load_app() -> None:
    """Make the project's Celery app the one that sends messages."""
    path = rotator_setting().get("CELERY_APP", "")
    if path:
        try:
            app = import_string(path)
        except ImportError as error:
            raise OptionError(f'ROTATOR["CELERY_APP"] cannot be imported: {error}.') from error
        if not isinstance(app, Celery):
            raise OptionError(f'ROTATOR["CELERY_APP"] names {path}, which is not a Celery app.')
        app.set_default()
    elif not current_app.conf.broker_url:
        raise OptionError(
            "There is no Celery app: name yours in the settings, e.g. "
            'ROTATOR = {"CELERY_APP": "shop.celery.app"}.'
        )


class BrokerCalls:
    """The calls to the broker, each in a thread, which hangs if the broker accepts connections but is silent.

    Each hanging call doubles the wait before the next one, so a broker that hangs for a day costs few
    threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.running_since = list[float]()

    def check(self) -> None:
        """Raise ``TimeoutError`` if another call would probably hang like the last one."""
        now = self._clock()
        hanging = [since for since in self.running_since.copy() if now - since >= PUBLISH_SECONDS]
        if hanging:
            wait_seconds = min(MAX_BROKER_WAIT_SECONDS, PUBLISH_SECONDS * 2.0 ** min(len(hanging), 10))
            if now - max(hanging) < wait_seconds:
                raise TimeoutError

    def tracked(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the same call, counted while it runs."""

        def work() -> Any:  # noqa: ANN401 - whatever the call returns
            since = self._clock()
            self.running_since.append(since)
            try:
                return call()
            finally:
                self.running_since.remove(since)

        return work


_calls = BrokerCalls()


async def _send(task: Task, arguments: tuple[object, ...]) -> None:
    """Send a message; where that raises BrokerError, it may have been sent all the same."""
    # Celery would add the arguments a second time, for its monitors.
    send = partial(task.apply_async, arguments, retry=False, argsrepr="", kwargsrepr="")
    # A call to an unreachable broker may never return.
    try:
        _calls.check()
        async with asyncio.timeout(PUBLISH_SECONDS):
            await run_in_daemon_thread(_calls.tracked(send))
    except Exception as error:  # noqa: BLE001 - each broker's library has errors of its own
        raise BrokerError(f"The broker cannot be reached ({type(error).__name__}).") from None
