"""What every part of a run shares."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from rotator.events import Observer, RowsRotated
from rotator.postgres.connections import Server
from rotator.process import Owner
from rotator.run.distribution import SpanPublisher
from rotator.run.figures import Figures
from rotator.run.options import RunOptions, RunTarget
from rotator.run.stopping import StopRequests

Announce: TypeAlias = Callable[[RowsRotated], Awaitable[None]]
"""Tells whoever acts upon rotated rows; whoever waits for it writes no more rows meanwhile."""

ShouldStop: TypeAlias = Callable[[], bool]
"""Says whether whoever this is done for has to stop; called now and then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """One run's surroundings.

    Attributes:
        server: Where the target is.
        target: What is rotated.
        options: How.
        owner: This process.
        requests: What has been asked of the run.
        figures: What it has done so far.
        notify: Tells observers, after the run itself has taken note.
        announce: Is awaited after each commit of rows; None where nobody asked for that.
        publisher: Has the ranges rewritten elsewhere; None where this process does it.
    """

    server: Server
    target: RunTarget
    options: RunOptions
    owner: Owner
    requests: StopRequests
    figures: Figures
    notify: Observer
    announce: Announce | None
    publisher: SpanPublisher | None
