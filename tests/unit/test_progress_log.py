"""Log records, as a formatter for programs gets them."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotator.events import (
    DrainStarted,
    Event,
    OutageStarted,
    RowRejected,
    StopReason,
    Throttled,
    Tick,
    VacuumSkipped,
    VerificationStarted,
)
from rotator.progress.lines import LogObserver
from rotator.ranges import Key
from tests.unit.progress_fakes import VERIFIED, Clock, completed, started, stopped

KEY = 48_151_623
KNOWN = vars(logging.makeLogRecord({}))


class JsonHandler(logging.Handler):
    """Formats each record as a JSON formatter does: the message, the level, and every field of ``extra``."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: value for name, value in vars(record).items() if name not in KNOWN}
        self.lines.append(json.dumps({"level": record.levelname, "message": record.getMessage(), **fields}))

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def handler() -> Iterator[JsonHandler]:
    logger, handler, level = logging.getLogger("rotator"), JsonHandler(), logging.getLogger("rotator").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def log(*events: Event, clock: Clock | None = None, hides_keys: bool = False) -> None:
    observer = LogObserver(clock=clock or Clock(), hides_keys=hides_keys)
    for event in events:
        observer(event)


def test_a_formatter_gets_the_fields(handler: JsonHandler) -> None:
    log(
        started(),
        Throttled(source="replica lag of r1", reason="replica lag of r1 14 s > 10 s", is_new=True),
        DrainStarted(reason=StopReason.SIGTERM),
        VacuumSkipped(reason="the table is busy", is_once=True),
    )
    first, throttled, drained, skipped = handler.records
    assert first["message"].startswith("rotation 7 of tickets.Ticket.token starts: 1,000,000 rows")
    assert [first[name] for name in ("level", "event", "rotation", "target", "reason", "rows_done")] == [
        *("INFO", "started", 7, "tickets.Ticket.token", "", 0)
    ]
    assert throttled["event"] == "throttled"
    assert throttled["reason"] == "replica lag of r1 14 s > 10 s"
    assert throttled["state"] == "throttled"
    assert (drained["event"], drained["reason"]) == ("drain_started", "SIGTERM")
    assert (skipped["event"], skipped["reason"]) == ("vacuum_skipped", "the table is busy")


def test_figures_come_every_thirty_seconds(handler: JsonHandler) -> None:
    clock = Clock()
    observer = LogObserver(clock=clock, hides_keys=False)
    observer(started())
    for step in range(1, 201):
        clock.now = step / 2
        observer(completed(rows=2000, seconds=0.5))
        observer(Tick())
    figures = [record for record in handler.records if record["event"] == "progress"]
    assert [record["rows_done"] for record in figures] == [120_000, 240_000, 360_000]
    assert figures[-1]["rows_per_second"] == pytest.approx(4000, rel=0.1)
    assert figures[-1]["eta_seconds"] == pytest.approx(160, rel=0.1)
    assert (figures[-1]["level"], figures[-1]["percent"]) == ("INFO", 36)
    assert figures[-1]["message"].startswith("360,000 of 1,000,000 rows (36%), 4,000 rows/s, ETA 2 min")


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (OutageStarted(reason="connection refused", budget_seconds=300), "WARNING"),
        (RowRejected(key=Key("[42]"), reason="check_violation"), "WARNING"),
        (stopped(status="failed", error="The disk is full."), "WARNING"),
        (stopped(), "INFO"),
        (stopped(verification=VERIFIED), "INFO"),
        (stopped(verification=replace(VERIFIED, survivors=2)), "WARNING"),
        (stopped(status="interrupted", stop_reason=StopReason.STOP_AFTER), "INFO"),
        (stopped(status="interrupted", stop_reason=StopReason.SIGINT), "WARNING"),
        (VERIFIED, "INFO"),
        (replace(VERIFIED, survivors=2), "WARNING"),
    ],
)
def test_what_needs_attention_is_a_warning(handler: JsonHandler, event: Event, level: str) -> None:
    log(event)
    (record,) = handler.records
    assert record["level"] == level


def test_the_end_has_its_reason(handler: JsonHandler) -> None:
    log(stopped(status="failed", error="The disk is full."), stopped(stop_reason=None))
    failed, finished = handler.records
    assert failed["message"].endswith("have a new value. The disk is full.")
    assert (failed["event"], failed["reason"]) == ("stopped", "The disk is full.")
    assert finished["message"].startswith("Completed: ")


def test_the_result_of_a_resumed_verification_has_its_rotation(handler: JsonHandler) -> None:
    log(VerificationStarted(rows_total=1_000, rows=500, repairs=False), VERIFIED)
    record = handler.records[-1]
    assert record["message"] == "Verified: no row of shop.Order.api_key has an old value of rotation 7."
    assert [record[name] for name in ("event", "rotation", "target", "reason")] == [
        *("verified", 7, "shop.Order.api_key", "")
    ]


def test_keys_can_be_hidden(handler: JsonHandler) -> None:
    events = (
        started(),
        RowRejected(key=Key(f"[{KEY}]"), reason="check_violation"),
        stopped(status="failed", error=f"The range ({KEY}, {KEY}] was not changed."),
        replace(VERIFIED, error=f"The row {KEY} is locked."),
    )
    log(*events)
    assert "".join(handler.lines).count(str(KEY)) >= 4
    handler.lines.clear()
    log(*events, hides_keys=True)
    assert str(KEY) not in "".join(handler.lines)
    assert [record["reason"] for record in handler.records] == [
        *("", "check_violation", "(hidden: it can contain keys)", "(hidden: it can contain keys)")
    ]


def test_the_docs_have_every_field(handler: JsonHandler) -> None:
    log(started())
    docs = Path("docs/output.md").read_text()
    section = docs.split("## Log records")[1].split("\n## ")[0]
    (record,) = handler.records
    named = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    assert set(record) - {"level", "message"} == set(re.findall(r"`(\w+)`", "".join(named)))
