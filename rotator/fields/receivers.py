"""The ``range_rotated`` signal: its sending, and the reports of receivers that fail."""

import asyncio
import inspect
import json
import logging
from collections.abc import Callable
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.db.models import Model

from rotator.events import Observer, OnCommit, ReceiverFailed, RowsRotated
from rotator.fields.connections import lost_connection
from rotator.signals import range_rotated

# The waits before a receiver that lost Django's connection is called again.
RETRY_SECONDS: Final = (0.0, 0.2, 1.0, 3.0)


def commit_callback(sender: type[Model], database: str, observer: Observer | None) -> OnCommit | None:
    """Return a callback that sends the signal; None if it has no receivers.

    It calls the observer when a receiver fails, or logs that if there is none.
    """
    if not range_rotated.has_listeners(sender):
        return None
    reported = set[ReceiverFailed]()

    def report(failed: ReceiverFailed) -> None:
        if failed in reported:
            return
        reported.add(failed)
        if observer is not None:
            observer(failed)
        else:
            logging.getLogger(__name__).warning("The receiver %s raised %s.", failed.receiver, failed.error)

    async def on_commit(rotated: RowsRotated) -> None:
        facts = {
            "rotation": rotated.rotation,
            "database": database,
            "after": None if rotated.after is None else json.loads(rotated.after),
            "through": None if rotated.through is None else json.loads(rotated.through),
            "keys": [json.loads(key) for key in rotated.keys],
            "rows": rotated.rows,
        }
        for receiver, answer in await range_rotated.asend_robust(sender, **facts):
            for seconds in RETRY_SECONDS:
                # In the thread of the receivers, which has the lost connection.
                if not isinstance(answer, Exception) or not await sync_to_async(lost_connection)(answer):
                    break
                await asyncio.sleep(seconds)
                answer = await _answer(receiver, signal=range_rotated, sender=sender, **facts)  # noqa: PLW2901
            if isinstance(answer, Exception):
                name = getattr(receiver, "__qualname__", type(receiver).__qualname__)
                module = getattr(receiver, "__module__", "?")
                report(ReceiverFailed(receiver=f"{module}.{name}", error=type(answer).__name__))

    return on_commit


async def _answer(receiver: Callable[..., Any], **named: object) -> object:
    try:
        if inspect.iscoroutinefunction(receiver):
            return await receiver(**named)
        return await sync_to_async(receiver)(**named)
    except Exception as error:  # noqa: BLE001 - any error of the project's code
        return error
