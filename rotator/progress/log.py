"""Progress as log records of stdlib ``logging``, with fields for programs."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from rotator.events import (
    AnalyzeSkipped,
    BrokerUnreachable,
    Event,
    OutageStarted,
    Preflighted,
    RangeCompleted,
    ReceiverFailed,
    ReindexSkipped,
    RotationStarted,
    RotationStopped,
    RowRejected,
    ServerLogShowsValues,
    Tick,
    VerificationProgressed,
    WorkersProgressed,
    WorkersSilent,
)
from rotator.progress import jsonlines
from rotator.progress.lines import FIGURES_SECONDS, NotableEvents
from rotator.progress.summary import verdict
from rotator.progress.text import HIDDEN, one_line, stopped_by
from rotator.ranges import Key

LOGGER: Final = "rotator"

_WARNINGS: Final = (
    AnalyzeSkipped,
    BrokerUnreachable,
    OutageStarted,
    ReceiverFailed,
    ReindexSkipped,
    RowRejected,
    ServerLogShowsValues,
    WorkersSilent,
)


class LogObserver(NotableEvents):
    """Logs notable events, the figures and the result, each with the fields of ``docs/output.md``.

    Args:
        hides_keys: Whether the records contain no keys of rows.
        clock: Returns monotonic seconds.
    """

    def __init__(self, *, hides_keys: bool, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock=clock, every_seconds=FIGURES_SECONDS)
        self._logger = logging.getLogger(LOGGER)
        self._hides_keys = hides_keys
        self._target = ""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, RotationStarted):
            self._target = event.target
        if self._hides_keys and isinstance(event, RowRejected):
            event = replace(event, key=Key("…"))
        if self._hides_keys and isinstance(event, RotationStopped) and event.error:
            event = replace(event, error=HIDDEN)
        super().__call__(event)

    def write(self, text: str, event: Event) -> None:
        """Log one record."""
        is_failed = isinstance(event, RotationStopped) and event.status == "failed"
        self._logger.log(
            logging.WARNING if is_failed or isinstance(event, _WARNINGS) else logging.INFO,
            "%s",
            text,
            extra={
                "event": _name(event),
                "rotation": self._stats.rotation,
                "target": self._target,
                "reason": _reason(event),
                **jsonlines.figures(self._stats),
            },
        )

    def ended(self, event: RotationStopped) -> str:
        """Return the result with its reason, since no summary follows."""
        return f"{verdict(event)} {one_line(_reason(event))}".rstrip()


def _name(event: Event) -> str:
    """Return the name of the event as it is in JSON."""
    match event:
        case RangeCompleted() | WorkersProgressed() | Tick() | VerificationProgressed():
            return "progress"
        case Preflighted():
            return "preflight"
        case RotationStarted():
            return "started"
        case RotationStopped():
            return "stopped"
        case _:
            return jsonlines.event_name(type(event))


def _reason(event: Event) -> str:
    if isinstance(event, RotationStopped):
        return event.error or stopped_by(event.stop_reason, event.cancelled_by)
    return str(getattr(event, "reason", ""))
