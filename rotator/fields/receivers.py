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
from rotator.exceptions import ServerLostError
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
            error = answer
            for seconds in RETRY_SECONDS:
                if await _lost(error) is None:
                    break
                await asyncio.sleep(seconds)
                error = await _answer(receiver, {"signal": range_rotated, "sender": sender, **facts})
            if isinstance(error, Exception):
                report(ReceiverFailed(receiver=_name(receiver), error=type(error).__name__))

    return on_commit


async def _lost(answer: object) -> ServerLostError | None:
    if not isinstance(answer, Exception):
        return None
    # In the thread of the receivers, which has the lost connection.
    return await sync_to_async(lost_connection)(answer)


async def _answer(receiver: Callable[..., Any], named: dict[str, Any]) -> object:
    try:
        if inspect.iscoroutinefunction(receiver):
            return await receiver(**named)
        return await sync_to_async(receiver)(**named)
    except Exception as error:  # noqa: BLE001 - any error of the project's code
        return error


def _name(receiver: Callable[..., Any]) -> str:
    name = getattr(receiver, "__qualname__", type(receiver).__qualname__)
    return f"{getattr(receiver, '__module__', '?')}.{name}"
