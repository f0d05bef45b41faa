"""What the tests of progress share; nothing in here is a test."""

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from rotator.events import (
    Controls,
    Coverage,
    RangeCompleted,
    RotationStarted,
    RotationStopped,
    RunFacts,
    Verified,
)
from rotator.options import Selection

STOPPED_AT = datetime(2026, 3, 1, 12, 3, 5, tzinfo=UTC)

COVERAGE = Coverage(
    status="completed",
    gaps=(),
    gap_rows=0,
    confirmed_rows=1_000,
    unconfirmed_rows=0,
    older_rows=0,
    unknown="",
    rejected_keys=(),
    table_rows=1_000,
    excluded_rows=0,
    null_rows=0,
    blank_rows=0,
)
CONTROLS = Controls(
    sampled=1_000, entries=1_001, entries_found=1_001, is_salt_right=True, planted=3, planted_found=3
)
AT = datetime(2026, 11, 27, 12, tzinfo=UTC)
RUN = RunFacts(
    started_at=AT,
    ended_at=AT,
    user="app",
    host="db1",
    server_name="app@db1:5432/shop",
    table_name="public.tickets_ticket",
    selection=Selection(),
)
VERIFIED = Verified(
    rotation=7,
    target="shop.Order.api_key",
    number=9,
    started_at=AT,
    ended_at=AT,
    rows=1_000,
    survivors=0,
    coverage=COVERAGE,
    controls=CONTROLS,
)


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Says that it is a terminal but cannot be asked for its width."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return -1

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class Gone(io.StringIO):
    """A pipe whose reader went away after ``lines`` writes."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.left = lines

    def write(self, text: str) -> int:
        if not self.left:
            raise BrokenPipeError
        self.left -= 1
        return super().write(text)


def started(**facts: Any) -> RotationStarted:  # noqa: ANN401 - any of the event's facts
    event = RotationStarted(
        rotation=7,
        target="tickets.Ticket.token",
        rows_total=1_000_000,
        rows_total_is_exact=True,
        rows_done=0,
        late_rows=0,
        seconds_before=0.0,
        stopped_at=None,
        concurrency=4,
        batch=2000,
    )
    return replace(event, **facts)


def resumed(**facts: Any) -> RotationStarted:  # noqa: ANN401 - any of the event's facts
    return started(**({"rows_done": 412_000, "seconds_before": 18.2, "stopped_at": STOPPED_AT} | facts))


def completed(rows: int = 2000, seconds: float = 0.1) -> RangeCompleted:
    return RangeCompleted(rows=rows, seconds=seconds)


def stopped(**facts: Any) -> RotationStopped:  # noqa: ANN401 - any of the event's facts
    event = RotationStopped(
        rotation=7,
        target="tickets.Ticket.token",
        status="completed",
        rows=1_000_000,
        rows_total=1_000_000,
        rows_total_is_exact=True,
        rows_this_run=1_000_000,
        late_rows=0,
        ranges=500,
        seconds=39.7,
        seconds_total=39.7,
        rows_per_second=25_143.2,
        deferrals=0,
        retries=0,
        outage_seconds=0.0,
        peak_memory_bytes=52_300_000,
        concurrency=4,
        batch=2000,
        resumed=False,
        run=RUN,
    )
    return replace(event, **facts)
