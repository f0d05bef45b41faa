"""The same rotation on Celery: the tasks, and what publishes them.

Imported by workers, and by the command with ``--celery``; nothing else of this package knows Celery.
"""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any, Final

from celery import Celery, current_app, shared_task
from django.conf import settings
from django.utils.module_loading import import_string
from kombu.exceptions import OperationalError

from rotator.errors import BrokerError, OptionError, OwnedElsewhereError
from rotator.postgres.transaction import Claim
from rotator.run.distribution import SPANS_OUTSTANDING
from rotator.run.options import RunOptions
from rotator.selection import Selection
from rotator.service import prepare, rotate_span_of

# Well below the hour after which Redis hands a message to another worker.
TIME_LIMIT_SECONDS: Final = 1800
PUBLISH_SECONDS: Final = 10.0


@shared_task(
    name="rotator.rotate_span",
    # A worker that dies has not done it.
    acks_late=True,
    reject_on_worker_lost=True,
    ignore_result=True,
    time_limit=TIME_LIMIT_SECONDS,
)  # type: ignore[untyped-decorator] # Celery has no types
def rotate_span(database: str, rotation: int, generation: int, span: int) -> None:
    """Rewrite what is left of a span; harmless however often and late it is delivered."""
    rotate_span_of(database, Claim(rotation=rotation, generation=generation), span)


@shared_task(name="rotator.coordinate", acks_late=True, reject_on_worker_lost=True, ignore_result=True)  # type: ignore[untyped-decorator] # Celery has no types
def coordinate(labels: list[str], database: str, selection: dict[str, Any], options: dict[str, Any]) -> None:
    """Plan and watch a rotation without a terminal; takes one of the workers' places until its end."""
    prepared = prepare(labels, database, RunOptions.read(options), Selection.read(selection))
    # Delivered again while the first delivery is alive, it leaves the rotation to that.
    with suppress(OwnedElsewhereError):
        prepared.rotate(lambda _event: None, CeleryPublisher(database))


class CeleryPublisher:
    """Publishes spans as tasks of the project's Celery app."""

    def __init__(self, database: str) -> None:
        """Take Django's alias of the database that the rotation is in."""
        self._database = database
        self._published: deque[str] = deque(maxlen=2 * SPANS_OUTSTANDING)

    async def publish(self, claim: Claim, span: int) -> None:
        """Have some worker rotate a span.

        Raises:
            BrokerError: The broker cannot be reached; the span was perhaps published all the same.
        """
        arguments = (self._database, claim.rotation, claim.generation, span)
        self._published.append(await _published(rotate_span, arguments))

    async def revoke(self) -> None:
        """Take back what no worker has begun; what one has begun, the fence ends."""
        with suppress(BrokerError):
            await _in_time(current_app.control.revoke, list(self._published))


def hand_over(labels: list[str], database: str, selection: Selection, options: RunOptions) -> None:
    """Have a worker coordinate the rotation.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    arguments = (labels, database, selection.saved(), options.saved())
    asyncio.run(_published(coordinate, arguments))


def load_app() -> None:
    """Make the project's Celery app the one that tasks are published with.

    Raises:
        OptionError: There is none.
    """
    path = getattr(settings, "ROTATOR", {}).get("CELERY_APP", "")
    if path:
        try:
            app = import_string(path)
        except ImportError as error:
            raise OptionError(f'ROTATOR["CELERY_APP"] cannot be imported: {error}.') from error
        if not isinstance(app, Celery):
            raise OptionError(f'ROTATOR["CELERY_APP"] names {path}, which is no Celery app.')
        app.set_default()
    elif not current_app.conf.broker_url:
        raise OptionError(
            "There is no Celery app: name yours in the settings, e.g. "
            'ROTATOR = {"CELERY_APP": "shop.celery.app"}.'
        )


async def _published(task: Any, arguments: tuple[object, ...]) -> str:  # noqa: ANN401 - Celery has no types
    # What Celery would write of the arguments beside the arguments is for people who watch it.
    result = await _in_time(task.apply_async, arguments, retry=False, argsrepr="", kwargsrepr="")
    return str(result.id)


async def _in_time(call: Any, *arguments: object, **options: object) -> Any:  # noqa: ANN401 - Celery has no types
    try:
        async with asyncio.timeout(PUBLISH_SECONDS):
            return await asyncio.to_thread(call, *arguments, **options)
    except (OperationalError, OSError, TimeoutError) as error:
        raise BrokerError(f"The broker cannot be reached ({type(error).__name__}).") from None
