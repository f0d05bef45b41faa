"""Progress as log records, for processes that nobody watches."""

import logging
from collections.abc import Callable
from typing import Final

from rotator.events import (
    BrokerAway,
    Event,
    OutageStarted,
    ReceiverFailed,
    RotationStopped,
    RowFailed,
    ServerLogShowsValues,
    WorkersSilent,
)
from rotator.progress.summary import verdict
from rotator.progress.tally import Tally
from rotator.progress.wording import notice

_WARNINGS: Final = (BrokerAway, OutageStarted, ReceiverFailed, RowFailed, ServerLogShowsValues, WorkersSilent)


class LogObserver:
    """Logs what is notable, and how it ended; the figures are in the database."""

    def __init__(self, logger: logging.Logger, *, clock: Callable[[], float]) -> None:
        """Log to this logger.

        Args:
            logger: The process's own way to whoever reads its logs.
            clock: Returns monotonic seconds.
        """
        self._logger = logger
        self._clock = clock
        self._tally = Tally()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        line = verdict(event) if isinstance(event, RotationStopped) else notice(event, self._tally)
        self._tally.take(event, self._clock())
        if line:
            self._logger.log(logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO, "%s", line)
