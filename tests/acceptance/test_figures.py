"""Every account of one run has the same figures: bar, lines, JSON, summary, report, commands and database."""

import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

import psycopg
import pytest
from django.contrib.admin import site
from django.db.models import Count, F, Max, Min, Sum

from rotator.admin import RotationAdmin
from rotator.api import prepare
from rotator.events import Event, Observer, RotationStarted, RotationStopped, Tick
from rotator.models import CompletedRange, Rotation
from rotator.options import RunOptions
from rotator.progress.bar import BarObserver
from rotator.progress.lines import JsonObserver, LinesObserver
from rotator.progress.summary import report, summary
from rotator.progress.text import count, duration, rate
from rotator.runner.context import AskForHelp
from tests.acceptance.audit import make_tickets
from tests.acceptance.celery_hosts import Hosts, running_hosts
from tests.acceptance.harness import MANAGE, Commands, query, url_of

ROWS = 3000
LOCKED, RETRIED, REJECTED, LATE = 200, 500, 7, 15
TICKS_OF_THE_LOCK = 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return -1

    @property
    def encoding(self) -> str:  # type: ignore[override] # a text stream's is writable
        return "utf-8"


@pytest.fixture
def _trouble(commands: Commands) -> Iterator[None]:  # noqa: ARG001 - it makes the database ready
    """Make the server reject one row always and another one twice."""
    make_tickets(ROWS)
    query("CREATE SEQUENCE figures_attempts")
    query(
        "CREATE FUNCTION figures_trouble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.id = {RETRIED} AND nextval('figures_attempts') <= 2"
        " THEN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END IF;"
        f" IF NEW.id = {REJECTED} THEN RAISE EXCEPTION USING ERRCODE = 'check_violation'; END IF;"
        " RETURN NEW; END $$"
    )
    query(
        "CREATE TRIGGER figures_trouble BEFORE UPDATE ON tickets_ticket"
        " FOR EACH ROW EXECUTE FUNCTION figures_trouble()"
    )
    try:
        yield
    finally:
        query("DROP TRIGGER figures_trouble ON tickets_ticket")
        query("DROP FUNCTION figures_trouble()")
        query("DROP SEQUENCE figures_attempts")


class Accounts:
    """An observer that passes each event to all kinds of progress."""

    def __init__(self, late: "psycopg.Connection[tuple[object, ...]]") -> None:
        self.bar, self.lines, self.json = Terminal(), io.StringIO(), io.StringIO()
        self.stopped: RotationStopped | None = None
        self._late = late
        self._ticks = 0
        self._has_started = False

    @contextmanager
    def observing(self) -> Iterator["Accounts"]:
        clock = time.monotonic

        def now() -> datetime:
            return datetime.now(UTC)

        lines = LinesObserver(self.lines, clock=clock, wall_clock=now, every_seconds=0)
        self._observers: list[Observer] = [
            lines,
            JsonObserver(self.json, clock=clock, wall_clock=now, every_seconds=0),
        ]
        with BarObserver(self.bar, clock=clock, columns=lambda: 200, refresh_seconds=0.01) as bar:
            self._bar: Observer = bar
            yield self

    def __call__(self, event: Event) -> None:
        for observer in (self._bar, *self._observers):
            observer(event)
        self._has_started = self._has_started or isinstance(event, RotationStarted)
        self._ticks += isinstance(event, Tick) and self._has_started
        if self._ticks == TICKS_OF_THE_LOCK:
            self._late.commit()
        if isinstance(event, RotationStopped):
            self.stopped = event
            for observer in self._observers:
                observer(Tick())


def _rotate(ask: AskForHelp | None = None) -> Accounts:
    """Rotate while an older transaction locks one row and has inserted two that no range can see."""
    with psycopg.connect(url_of()) as late:
        late.execute(
            "INSERT INTO tickets_ticket (id, title, created_at, token)"
            " SELECT id, 'late', now(), gen_random_uuid() FROM unnest(%s) AS id",
            [[REJECTED, LATE]],
        )
        late.execute("SELECT FROM tickets_ticket WHERE id = %s FOR UPDATE", [LOCKED])
        prepared = prepare(["tickets.Ticket.token"], "default", RunOptions(batch=100))
        with Accounts(late).observing() as accounts:
            until = time.monotonic() + 120
            outcome = prepared.rotate(accounts, ask, lambda: time.monotonic() > until)
    assert outcome.exit_status == 1
    return accounts


def _assert_agreement(accounts: Accounts, commands: Commands) -> RotationStopped:
    stopped = accounts.stopped
    assert stopped is not None
    account, rotation = report(stopped), Rotation.objects.get()

    # The database.
    ranges = CompletedRange.objects.aggregate(
        rows=Sum("rows"), ranges=Count("pk"), begin=Min(F("committed_at")), end=Max("committed_at")
    )
    assert rotation.status == stopped.status == "failed"
    assert (rotation.late_rows, ranges["rows"]) == (1, ROWS)
    assert stopped.rows == stopped.rows_this_run == rotation.rows_done == ROWS + rotation.late_rows
    assert stopped.rows_total == rotation.rows_total == ROWS
    assert stopped.late_rows == rotation.late_rows
    assert stopped.ranges == ranges["ranges"]
    assert [key for key, _ in stopped.rejected_keys] == [f"[{REJECTED}]"]
    assert stopped.seconds == stopped.seconds_total == pytest.approx(rotation.active_seconds)
    written_seconds = (ranges["end"] - ranges["begin"]).total_seconds()
    assert ROWS / stopped.rows_per_second == pytest.approx(written_seconds, abs=3)

    # JSON lines.
    *_, ended, progress = map(json.loads, accounts.json.getvalue().splitlines())
    assert {name: ended[name] for name in account} == json.loads(json.dumps(account))
    assert progress["event"] == "progress"
    assert (progress["rows_done"], progress["late_rows"]) == (stopped.rows, 1)
    assert (progress["deferrals"], progress["retries"]) == (stopped.deferrals, stopped.retries)
    assert progress["rejected_rows"] == len(stopped.rejected_keys)

    # Summary.
    said = dict(re.findall(r"^  (\w+) {2,}(.*)$", summary(stopped), re.MULTILINE))
    assert said["rows"] == f"{count(stopped.rows)}; 1 late row among them"
    assert said["ranges"].startswith(f"{count(stopped.ranges)} of ")
    assert (said["deferrals"], said["retries"]) == (count(stopped.deferrals), count(stopped.retries))
    assert said["rate"] == f"{rate(stopped.rows_per_second)} rows/s while writing"
    assert said["time"] == duration(stopped.seconds)
    assert "1 row rejected by the server:" in summary(stopped)
    of_total = f"{ROWS:,} of {ROWS:,}"
    assert f"{of_total} rows have a new value." in summary(stopped)

    # Bar and lines.
    receipt = accounts.bar.getvalue().rsplit("\r", 1)[-1]
    assert f"{of_total} rows  100%  failed after {duration(stopped.seconds)}" in receipt
    shown = re.findall(r"(\d+) deferral", accounts.bar.getvalue())
    assert int([0, *shown][-1]) == stopped.deferrals
    line = accounts.lines.getvalue().splitlines()[-1]
    assert f" {of_total} rows (100%)" in line
    counts = {noun: int(number) for number, noun in re.findall(r"(\d+) (deferral|retr|rejected)", line)}
    assert counts.get("deferral", 0) == stopped.deferrals
    assert (counts["retr"], counts["rejected"]) == (stopped.retries, 1)

    # The command and the admin.
    listed = commands.start(str(rotation.pk), "--json", program=(*MANAGE, "rotations")).wait().out
    facts = json.loads(listed)
    for name in ("rotation", "status", "rows", "rows_total", "rows_total_is_exact", "late_rows", "error"):
        assert facts[name] == account[name]
    for name in ("deferrals", "retries"):
        assert facts[name] == account[name] == getattr(rotation, name)
    assert (facts["percent"], facts["seconds_total"]) == (100, account["seconds_total"])
    details = commands.start(str(rotation.pk), program=(*MANAGE, "rotations")).wait().out
    assert f"  rows       {of_total} (100%)" in details
    assert f"  time       {duration(stopped.seconds)} over all runs" in details
    assert f"  deferrals  {count(stopped.deferrals)}\n  retries    {count(stopped.retries)}\n" in details
    assert RotationAdmin(Rotation, site).rows(rotation) == of_total
    return stopped


@pytest.mark.usefixtures("_trouble")
def test_the_accounts_of_a_local_run_agree(commands: Commands) -> None:
    stopped = _assert_agreement(_rotate(), commands)
    assert stopped.deferrals >= 3
    # Twice for the deadlock, and once for the two late rows, one of which is rejected.
    assert stopped.retries == 3


@pytest.fixture
def hosts(commands: Commands) -> Iterator[Hosts]:
    yield from running_hosts(commands)


@pytest.mark.usefixtures("_trouble")
def test_the_accounts_of_a_run_by_celery_workers_agree(
    hosts: Hosts, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rotator.tasks import ask_for_help  # noqa: PLC0415 - of an extra

    hosts.send_from_this_process(monkeypatch)
    hosts.worker()
    stopped = _assert_agreement(_rotate(partial(ask_for_help, "default")), commands)
    assert stopped.deferrals >= 3
    assert stopped.retries == 3
