"""A rotation from beginning to end, on tables of every size."""

import json
from pathlib import Path

import psycopg
import pytest

from rotator.models import CompletedRange, Rotation
from tests.acceptance.audit import Audit, audited_tickets
from tests.acceptance.harness import (
    MANAGE,
    Commands,
    backends,
    number,
    query,
    url_of,
    wait_for_the_backends_to_go,
    wait_until,
)

MILLION = 1_000_000
MOST_MEMORY_BYTES = 150_000_000


@pytest.mark.slow
def test_a_million_rows_get_new_tokens(commands: Commands, tmp_path: Path) -> None:
    new_values = commands.start("--count", str(MILLION), program=(*MANAGE, "create_tickets")).wait(120)
    assert new_values.status == 0, new_values.err
    audit = Audit(counts_writes=False)

    finished = commands.run("--report", str(tmp_path / "report"), seconds=180)

    assert finished.status == 0, finished.err
    assert finished.summary[0].endswith(" gave 1,000,000 rows of tickets.Ticket.token a new value.")
    audit.assert_rotated()
    report = json.loads((tmp_path / "report").read_text())
    assert (report["rows"], report["ranges"]) == (MILLION, 500)
    assert 0 < report["peak_memory_bytes"] < MOST_MEMORY_BYTES


@pytest.mark.parametrize(("rows", "said"), [(0, "0 rows"), pytest.param(1, "1 row", marks=pytest.mark.slow)])
def test_small_tables_complete(commands: Commands, rows: int, said: str) -> None:
    audit = audited_tickets(rows)

    finished = commands.run()

    assert (finished.status, finished.summary[0]) == (
        0,
        f"Completed: rotation {Rotation.objects.get().pk} gave {said} of tickets.Ticket.token a new value.",
    )
    assert CompletedRange.objects.count() == min(rows, 1)
    if rows:
        audit.assert_rotated()


def test_a_heartbeat_while_the_rotation_is_being_completed_does_no_harm(commands: Commands) -> None:
    audit = audited_tickets(100)
    query(
        "CREATE FUNCTION acceptance_lingering() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(2.5); RETURN NULL; END $$"
    )
    query(
        "CREATE TRIGGER lingering AFTER UPDATE ON rotator_rotation FOR EACH ROW"
        " WHEN (NEW.status = 'completed') EXECUTE FUNCTION acceptance_lingering()"
    )
    try:
        finished = commands.run()
    finally:
        query("DROP FUNCTION acceptance_lingering() CASCADE")

    assert finished.status == 0, finished.out
    audit.assert_rotated()


def test_reindex_after_completion_and_again_after_a_kill(commands: Commands) -> None:
    audited_tickets(5000)
    query("CREATE INDEX tickets_token ON tickets_ticket (token)")
    try:
        size = "SELECT pg_relation_size('tickets_token')::integer"
        before = number(size)
        # REINDEX waits for the snapshot of another session, and the rotation does not.
        with psycopg.connect(url_of()) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT FROM rotator_rotation")
            running = commands.start("--reindex")
            wait_until(
                lambda: backends("query LIKE 'REINDEX%%' AND wait_event = 'virtualxid'"), "REINDEX waits"
            )
            running.kill()
            holder.rollback()
        wait_for_the_backends_to_go()
        query("VACUUM tickets_ticket")

        finished = commands.run("--reindex")

        assert finished.status == 0, finished.err
        rotation = Rotation.objects.get()
        assert finished.summary == [
            f"Rotation {rotation.pk} of tickets.Ticket.token is completed, and its indexes are rebuilt."
        ]
        assert number(size) <= 1.1 * before
        assert number("SELECT count(*)::integer FROM pg_index WHERE NOT indisvalid") == 0
    finally:
        query("DROP INDEX tickets_token")


def _tokens() -> list[str]:
    return [str(token) for (token,) in query("SELECT token::text FROM tickets_ticket")]


def _rotator_tables() -> str:
    return "\n".join(
        str(text)
        for (text,) in query(
            "SELECT r::text FROM rotator_rotation r UNION ALL SELECT c::text FROM rotator_completedrange c"
        )
    )


@pytest.mark.parametrize("progress", ["lines", "json", "bar"])
def test_no_token_is_ever_shown(commands: Commands, tmp_path: Path, progress: str) -> None:
    audited_tickets(1000)
    # The server's own message quotes the new token and the row that holds it.
    query("ALTER TABLE tickets_ticket ADD CONSTRAINT seldom CHECK (token::text !~ '0$') NOT VALID")
    try:
        canaries = _tokens()
        finished = commands.run(
            "--batch", "50", "--progress", progress, "--report", str(tmp_path / "report"), "--traceback"
        )
        canaries += _tokens()
    finally:
        query("ALTER TABLE tickets_ticket DROP CONSTRAINT seldom")

    assert finished.status in (0, 1)
    said = "\n".join(
        (finished.out, finished.err, (tmp_path / "report").read_text(), _rotator_tables())
    ).lower()
    assert "tickets.ticket.token" in said
    shown = [token for token in canaries if token in said or token.replace("-", "") in said]
    assert shown == []


def test_a_trigger_that_quotes_the_token_does_not_show_it_either(commands: Commands, tmp_path: Path) -> None:
    audited_tickets(60)
    query(
        "CREATE FUNCTION acceptance_telltale() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'from % to %', OLD.token, NEW.token USING DETAIL = NEW.token,"
        " HINT = OLD.token; END $$"
    )
    query(
        "CREATE TRIGGER telltale BEFORE UPDATE ON tickets_ticket FOR EACH ROW WHEN (OLD.id = 10)"
        " EXECUTE FUNCTION acceptance_telltale()"
    )
    try:
        canaries = _tokens()
        finished = commands.run("--report", str(tmp_path / "report"), "--traceback")
        canaries += _tokens()
    finally:
        query("DROP FUNCTION acceptance_telltale() CASCADE")

    assert finished.status == 1
    assert "1 row rejected by the server:" in finished.out
    assert number("SELECT count(*) FROM rotator_rotation WHERE status = 'failed'") == 1
    said = "\n".join((finished.out, finished.err, (tmp_path / "report").read_text(), _rotator_tables()))
    assert [token for token in canaries if token in said or token.replace("-", "") in said] == []
