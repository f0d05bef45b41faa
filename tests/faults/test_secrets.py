"""No token, old or new, is to be found anywhere but in the table, whatever fails."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from core.own_server import OwnServer
from core.proxy import At, Proxy
from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import RANGE, Rotations, assert_completed

ROWS = 6000
REFUSED = 4000
_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}")
_SAMPLE_SECONDS = 0.005


def _found(tokens: list[str], text: str) -> set[str]:
    known = {token.replace("-", "") for token in tokens}
    return known & {shown.replace("-", "") for shown in _UUID.findall(text.lower())}


@contextmanager
def _activity(database: Database) -> Iterator[set[str]]:
    """Everything that others could see of the run in pg_stat_activity."""
    seen: set[str] = set()
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            # The server is crashed on purpose.
            with suppress(psycopg.OperationalError):
                seen.update(
                    text
                    for (text,) in watcher.query(
                        "SELECT a::text FROM pg_stat_activity a WHERE datname = current_database()"
                    )
                )
        watcher.close()

    watcher = Database(database.server, database.name)
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _rotators_tables(database: Database) -> str:
    return "\n".join(
        text
        for (text,) in database.query(
            "SELECT r::text FROM rotator_rotation r UNION ALL SELECT c::text FROM rotator_completedrange c"
            " UNION ALL SELECT a::text FROM rotator_action a"
            " UNION ALL SELECT m::text FROM rotator_measurement m"
        )
    )


def test_failures_of_every_kind_show_no_token(
    server: OwnServer, database: Database, rotations: Rotations, proxy: Proxy, tmp_path: Path
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, 0.1)
    database.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'not this one'; END $$;"
        " CREATE TRIGGER refuse BEFORE UPDATE ON tickets_ticket FOR EACH ROW"
        f" WHEN (OLD.id = {REFUSED}) EXECUTE FUNCTION refuse()"
    )
    options = ("--batch=50", "-v3", "--traceback", f"--report={tmp_path / 'report'}")
    url = database.url(port=proxy.port)
    tokens = database.tokens()
    said = []
    log_before = len(server.log())
    with _activity(database) as seen, closing(database.connect()) as neighbour:
        neighbour.execute("BEGIN")
        neighbour.execute("SELECT FROM tickets_ticket WHERE id = 2000 FOR UPDATE")
        killed = rotations.rotate(url, *options)
        wait_until(lambda: database.checkpoints() > 5, "some checkpoints")
        tokens += database.tokens()
        killed.send(signal.SIGKILL)
        said.append(killed.wait())

        running = rotations.rotate(url, *options)
        done = database.checkpoints()
        wait_until(lambda: database.checkpoints() > done + 5, "more checkpoints")
        proxy.cut_at_commit(At.AFTER, containing=RANGE)
        wait_until(lambda: proxy.commits_cut == 1, "a commit is cut")
        database.query(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'rotator'"
        )
        wait_until(lambda: "the server is reachable again" in running.err, "it goes on")
        proxy.cut()
        tokens += database.tokens()
        server.restart("immediate")
        speed_up(database)
        said.append(running.wait())
        database.query("DROP TRIGGER refuse ON tickets_ticket")
        last = rotations.rotated(url, *options)
        said.append(last)

    assert said[1].status == 1
    assert f"row [{REFUSED}] is rejected" in said[1].err
    assert_completed(last)
    tokens += database.tokens()
    log = server.log()[log_before:]
    assert "not this one" in log
    assert "rotator_completedrange" in "\n".join(seen)
    everything = {
        "output": "\n".join(finished.out + finished.err for finished in said),
        "report": (tmp_path / "report").read_text(),
        "tables": _rotators_tables(database),
        "activity": "\n".join(seen),
        "log": log,
    }
    assert {where: _found(tokens, text) for where, text in everything.items() if _found(tokens, text)} == {}
    assert server.password not in "".join(everything.values())
    audit.assert_rotated_once()


@pytest.fixture
def talkative(server: OwnServer) -> Iterator[OwnServer]:
    """A server that logs every statement, and every duration."""
    with server.configured(log_statement="all", log_min_duration_statement="0"):
        yield server


def test_a_superuser_keeps_the_tokens_out_of_the_log(
    talkative: OwnServer, database: Database, rotations: Rotations
) -> None:
    make_tickets(database, 1000)
    before = len(talkative.log())

    finished = rotations.rotated(database.url(), "--batch=100")
    log = talkative.log()[before:]

    assert_completed(finished)
    assert "warning" not in finished.err
    assert "UPDATE" in log
    assert "rotator_row" in log
    assert _found(database.tokens(), log) == set()


def test_anybody_else_is_warned(talkative: OwnServer, database: Database, rotations: Rotations) -> None:
    make_tickets(database, 1000)
    grant = "GRANT ALL ON ALL TABLES IN SCHEMA public TO ordinary"
    with new_role(database, "ordinary", grant) as url:
        before = len(talkative.log())
        finished = rotations.rotated(url, "--batch=100")
        assert_completed(finished)
        shown = _found(database.tokens(), talkative.log()[before:])
        # What the warning advises.
        database.query("ALTER ROLE ordinary SET log_parameter_max_length = 0")
        before = len(talkative.log())
        quiet = rotations.rotated(url, "--batch=100", "--restart")

    warning = (
        "warning: the server will log the new values, because of log_min_duration_statement = 0, "
        "log_statement = all: set log_parameter_max_length = 0 for this role"
    )
    assert warning in finished.err
    assert shown, "the warning was not even true"
    assert_completed(quiet)
    assert "warning" not in quiet.err
    assert _found(database.tokens(), talkative.log()[before:]) == set()


def test_leaked_values_are_not_sent_to_the_server(
    talkative: OwnServer, database: Database, rotations: Rotations, tmp_path: Path
) -> None:
    make_tickets(database, 1000)
    tokens = database.tokens()
    (tmp_path / "leaked").write_text("\n".join(tokens[:600]))
    before = len(talkative.log())
    with _activity(database) as seen:
        finished = rotations.rotated(database.url(), f"--leaked={tmp_path / 'leaked'}")
    log = talkative.log()[before:]

    assert_completed(finished)
    assert "600 of 600 leaked values found in rows (line 1-600)" in finished.out
    assert "COPY pg_temp.rotator_leaked FROM STDIN" in log
    assert _found(tokens + database.tokens(), log + "\n".join(seen) + finished.out + finished.err) == set()


def test_the_password_of_the_server_is_not_shown_either(database: Database, rotations: Rotations) -> None:
    password = database.server.password
    finished = rotations.rotated(database.url().replace(password, "s3cret-and-wrong"), "--traceback")

    assert finished.status == 1
    assert "password authentication failed" in finished.err
    assert "s3cret-and-wrong" not in finished.out + finished.err
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(database.url().replace(password, "s3cret-and-wrong"))
