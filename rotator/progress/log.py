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
    ReceiverFailed,
    ReindexSkipped,
    RotationStarted,
    RotationStopped,
    RowRejected,
    ServerLogShowsValues,
    Verified,
    WorkersSilent,
)
from rotator.progress import jsonlines
from rotator.progress.lines import FIGURES_SECONDS, NotableEvents
from rotator.progress.summary import verdict
from rotator.progress.text import HIDDEN, one_line, stopped_by
from rotator.progress.verification import verification_verdict
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
        if self._hides_keys and isinstance(event, RotationStopped | Verified) and event.error:
            event = replace(event, error=HIDDEN)
        super().__call__(event)
        if isinstance(event, Verified):
            self.write(verification_verdict(event), event)

    def write(self, text: str, event: Event) -> None:
        """Log one record."""
        is_failed = isinstance(event, RotationStopped | Verified) and event.exit_status != 0
        self._logger.log(
            logging.WARNING if is_failed or isinstance(event, _WARNINGS) else logging.INFO,
            "%s",
            text,
            extra={
                "event": jsonlines.event_name(type(event)),
                # A verification that is resumed has no start of a rotation.
                "rotation": self._stats.rotation or getattr(event, "rotation", None),
                "target": self._target or getattr(event, "target", ""),
                "reason": _reason(event),
                **jsonlines.figures(self._stats),
            },
        )

    def ended(self, event: RotationStopped) -> str:
        """Return the result with its reason, since no summary follows."""
        return f"{verdict(event)} {one_line(_reason(event))}".rstrip()


def _reason(event: Event) -> str:
    if isinstance(event, RotationStopped):
        return event.error or stopped_by(event.stop_reason, event.cancelled_by)
    if isinstance(event, Verified):
        return event.error
    return str(getattr(event, "reason", ""))
