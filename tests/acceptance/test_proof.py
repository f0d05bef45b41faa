"""Stale saves of an application, through a whole rotation with the real commands."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.db import IntegrityError, connections

from rotator.models import Ledger, Rotation
from tests.acceptance.audit import make_tickets, slow_down, speed_up
from tests.acceptance.harness import (
    MANAGE,
    Commands,
    Finished,
    checkpoints,
    number,
    query,
    wait_for_checkpoints,
)
from tests.integration.rotation_tables import DROP_LEDGERS
from tickets.models import Ticket

ROWS = 6000
OLD = "acceptance_leaked"
VERIFY = (*MANAGE, "verify_rotation")


@pytest.fixture(autouse=True)
def _clean(transactional_db: None) -> Iterator[None]:  # noqa: ARG001
    yield
    speed_up()
    query(f"DROP TABLE IF EXISTS {OLD}")
    query(DROP_LEDGERS.replace("%", "%%"))


class StaleSaves:
    """An application that saves objects which it loaded before their rotation, many a second."""

    def __init__(self, saves: int = 300, pause_seconds: float = 0.005) -> None:
        self.saved = 0
        self.refused = 0
        self.updated = 0
        loaded = list(Ticket.objects.order_by("pk").iterator())
        self._loaded = loaded[:: len(loaded) // saves]
        self._pause_seconds = pause_seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def running(self) -> Iterator["StaleSaves"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            self._thread.join()

    def _run(self) -> None:
        *tickets, last = self._loaded
        try:
            for ticket in tickets:
                if self._is_over.wait(self._pause_seconds):
                    break
                self._save(ticket)
            # However slow the rotation is, one save comes after that of its row.
            self._is_over.wait()
            self._save(last)
        finally:
            connections.close_all()

    def _save(self, ticket: Ticket) -> None:
        ticket.title = f"saved {ticket.pk}"
        try:
            ticket.save()
            self.saved += 1
        except IntegrityError:
            self.refused += 1
            # What an application does then: it reads the row again.
            ticket.refresh_from_db()
            ticket.title = f"updated {ticket.pk}"
            ticket.save()
            self.updated += 1


def _prepare(rows: int = ROWS) -> None:
    make_tickets(rows)
    query(f"CREATE TABLE {OLD} AS SELECT id, token FROM tickets_ticket")
    query(f"CREATE INDEX ON {OLD} (token)")
    slow_down(0.02)


def _with_leaked_tokens() -> set[str]:
    """Ask a copy of the old tokens, and not the ledger."""
    found = query(f"SELECT t.id FROM tickets_ticket t JOIN {OLD} o ON o.token = t.token")
    return {f"[{key}]" for (key,) in found}


def _verify(commands: Commands, *options: str) -> Finished:
    return commands.start(str(Rotation.objects.latest("pk").pk), *options, program=VERIFY).wait()


def _assert_nothing_secret(*finished: Finished) -> None:
    """No old or new token, no digest and no salt is in the output of any of them."""
    text = "".join(each.out + each.err for each in finished)
    ledger = Ledger.objects.latest("pk")
    secrets = {str(token) for (token,) in query("SELECT token FROM tickets_ticket")}
    secrets |= {str(token) for (token,) in query(f"SELECT token FROM {OLD}")}
    secrets |= {str(digest) for (digest,) in query(f"SELECT digest FROM rotator_ledger_{ledger.rotation_id}")}
    secrets |= {bytes(ledger.salt).hex()}
    shown = set(re.findall(r"-?[0-9a-f]{8,}(?:-[0-9a-f]{4}){0,3}(?:-[0-9a-f]{12})?", text))
    assert shown & secrets == set()


@pytest.mark.parametrize(
    ("rows", "saves", "pause_seconds", "batch"),
    # The second: at most 100 saves a second through the whole rotation.
    [(ROWS, 300, 0.005, 100), pytest.param(200_000, 4000, 0.01, 500, marks=pytest.mark.slow)],
)
def test_stale_saves_are_found_exactly_and_repaired(
    commands: Commands, tmp_path: Path, rows: int, saves: int, pause_seconds: float, batch: int
) -> None:
    _prepare(rows)
    with StaleSaves(saves, pause_seconds).running() as application:
        rotated = commands.run("--prove", "--batch", str(batch), "--report", str(tmp_path / "report"))
    speed_up()

    assert application.refused == 0
    expected = _with_leaked_tokens()
    verified = _verify(commands, "--json")
    facts = json.loads(verified.out)
    assert expected
    assert (verified.status, set(facts["survivor_keys"])) == (1, expected)
    assert facts["controls"]["have_passed"] is True
    # While the application still wrote, the verification of the run saw what was there then.
    report = json.loads((tmp_path / "report").read_text())
    assert (rotated.status == 0) == report["verification"]["is_verified"]

    repaired = _verify(commands, "--repair")
    assert (repaired.status, _with_leaked_tokens()) == (0, set())
    assert repaired.out.startswith("Verified: no row of tickets.Ticket.token has an old value")
    assert f"repaired     {len(expected)} row" in repaired.out
    evidence = commands.start(
        str(Rotation.objects.get().pk),
        "--evidence",
        str(tmp_path / "evidence"),
        program=(*MANAGE, "rotations"),
    ).wait()
    assert evidence.status == 0, evidence.err
    written = Finished(status=0, out=(tmp_path / "evidence").read_text(), err="")
    _assert_nothing_secret(rotated, verified, repaired, evidence, written)


def test_with_the_guard_none_comes_back_and_other_writes_succeed(commands: Commands) -> None:
    _prepare()
    with StaleSaves().running() as application:
        rotated = commands.run("--prove", "--guard", "--batch", "100", "--progress", "json")

    assert rotated.status == 0, rotated.err
    assert _with_leaked_tokens() == set()
    assert application.refused == application.updated > 0
    assert application.saved > 0
    assert number("SELECT count(*) FROM tickets_ticket WHERE title LIKE 'updated %%'") == application.updated
    _assert_nothing_secret(rotated)


@pytest.mark.slow
def test_a_rotation_that_is_killed_while_it_proves_misses_nothing(commands: Commands) -> None:
    _prepare()
    running = commands.start("--prove", "--batch", "100")
    wait_for_checkpoints(5)
    running.kill()
    assert checkpoints() < ROWS // 100
    speed_up()

    finished = commands.run("--prove", "--batch", "100")

    assert finished.status == 0, finished.err
    ledger = Ledger.objects.get()
    missing = number(
        f"SELECT count(*) FROM {OLD} o WHERE NOT EXISTS (SELECT FROM rotator_ledger_{ledger.rotation_id} l"
        " WHERE l.digest = ('x' || encode(substr(sha256((SELECT salt FROM rotator_ledger)"
        " || convert_to(o.token::text, 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint)"
    )
    assert (missing, ledger.entries) == (0, ROWS + 1)
