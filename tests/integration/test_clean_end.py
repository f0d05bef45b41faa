"""The statistics and the indexes after a rotation."""

import signal
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from rotator.api import prepare
from rotator.events import (
    Analyzed,
    AnalyzeSkipped,
    Event,
    IndexRebuilt,
    ReindexSkipped,
    ReindexStarted,
)
from rotator.options import RunOptions
from rotator.postgres import maintenance
from rotator.postgres.maintenance import find_leftovers
from rotator.postgres.table import TargetTable
from rotator.progress.summary import report, summary
from rotator.runner import maintenance as runner_maintenance
from tests.integration.outcomes import (
    CODES,
    SHOP,
    EventRecorder,
    after_range,
    assert_completed,
    rotate,
    rotate_tickets,
)
from tests.integration.rotation_tables import PATIENCE_SECONDS, TARGET, TICKETS, Database

pytestmark = SHOP

OLD_VALUES = 'SELECT value FROM "Rotation ""tests"" %s".old'
WAITS_FOR_A_TRANSACTION = (
    "SELECT FROM pg_stat_activity WHERE application_name = 'rotator' AND datname = current_database()"
    " AND query LIKE '%INDEX CONCURRENTLY%' AND wait_event = 'virtualxid'"
)


def keep_old_values(database: Database, table: str, column: str) -> None:
    database.execute(
        f'CREATE TABLE "Rotation ""tests"" %s".old AS SELECT {column}::text AS value FROM {table}'
    )


def statistics_with_old_values(database: Database, prefix: str) -> set[str]:
    """The views and tables in whose statistics an old value is."""
    return {
        f"{view} {name}"
        for view, name in database.execute(
            "SELECT DISTINCT view, name FROM ("
            " SELECT 'pg_stats', tablename, s::text FROM pg_stats s"
            " UNION ALL SELECT 'pg_stats_ext', tablename, s::text FROM pg_stats_ext s"
            " UNION ALL SELECT 'pg_stats_ext_exprs', tablename, s::text FROM pg_stats_ext_exprs s"
            f") AS all_statistics (view, name, facts) JOIN ({OLD_VALUES}) AS old"
            f" ON position(old.value IN facts) > 0 WHERE name LIKE '{prefix}%'"
        )
    }


# --- ANALYZE ---------------------------------------------------------------------------------------


@pytest.fixture
def tickets(database: Database) -> Iterator[Database]:
    """Tickets that autovacuum neither vacuums nor analyzes, with a histogram of their tokens."""
    database.execute("ALTER TABLE tickets_ticket SET (autovacuum_enabled = false)")
    database.make_tickets(1, 1000)
    database.execute("ANALYZE tickets_ticket")
    keep_old_values(database, "tickets_ticket", "token")
    yield database
    database.execute("ALTER TABLE tickets_ticket RESET (autovacuum_enabled)")


@pytest.mark.parametrize("vacuum", [True, False])
def test_the_histogram_holds_no_old_value(tickets: Database, *, vacuum: bool) -> None:
    assert statistics_with_old_values(tickets, "tickets_ticket") == {"pg_stats tickets_ticket"}
    recorder = EventRecorder()

    stopped = rotate_tickets(recorder, batch=200, vacuum=vacuum)

    assert_completed(stopped, rows=1000)
    assert (recorder.of(Analyzed), recorder.of(AnalyzeSkipped), stopped.analyze_statement) == (1, 0, "")
    assert statistics_with_old_values(tickets, "tickets_ticket") == set()


def test_common_values_and_statistics_of_expressions_hold_no_old_value(
    database: Database, coded: Callable[[str], TargetTable]
) -> None:
    coded("text")
    database.execute("ALTER TABLE shop_coded SET (autovacuum_enabled = false)")
    database.execute("INSERT INTO shop_coded SELECT i, 'leaked-' || i % 5 FROM generate_series(1, 500) AS i")
    database.execute("CREATE INDEX shop_coded_lower ON shop_coded (lower(secret))")
    database.execute("CREATE STATISTICS shop_coded_mcv (mcv) ON secret, (id % 2) FROM shop_coded")
    database.execute("CREATE STATISTICS shop_coded_trimmed ON trim(secret) FROM shop_coded")
    database.execute("ANALYZE shop_coded")
    keep_old_values(database, "shop_coded", "secret")
    assert statistics_with_old_values(database, "shop_coded") == {
        "pg_stats shop_coded",
        "pg_stats shop_coded_lower",
        "pg_stats_ext shop_coded",
        "pg_stats_ext_exprs shop_coded",
    }

    assert_completed(rotate(CODES, batch=100), rows=500)

    assert statistics_with_old_values(database, "shop_coded") == set()


@pytest.fixture
def days(database: Database) -> Iterator[Database]:
    """A partitioned table with statistics of the partitions and of the whole."""
    database.execute(
        "CREATE TABLE shop_partitioned (day date, number integer, secret varchar(40) NOT NULL,"
        " PRIMARY KEY (day, number)) PARTITION BY RANGE (day)"
    )
    for month in (1, 2):
        database.execute(
            f"CREATE TABLE shop_partitioned_{month} PARTITION OF shop_partitioned"
            f" FOR VALUES FROM ('2026-0{month}-01') TO ('2026-0{month + 1}-01')"
            " WITH (autovacuum_enabled = false)"
        )
    database.execute(
        "INSERT INTO shop_partitioned SELECT '2026-01-01'::date + i / 4, i, 'leaked-' || i"
        " FROM generate_series(1, 200) AS i"
    )
    database.execute("ANALYZE shop_partitioned")
    keep_old_values(database, "shop_partitioned", "secret")
    yield database
    database.execute("DROP TABLE shop_partitioned")


def test_the_statistics_of_a_partitioned_table_hold_no_old_value(days: Database) -> None:
    assert len(statistics_with_old_values(days, "shop_partitioned")) == 3
    stopped = rotate("shop.Partitioned.secret", batch=50, reindex=True)
    assert_completed(stopped, rows=200)
    assert statistics_with_old_values(days, "shop_partitioned") == set()
    assert stopped.reindex_statements == ()


def test_a_column_that_is_not_analyzed_is_reported(
    database: Database, coded: Callable[[str], TargetTable]
) -> None:
    coded("text")
    database.execute("INSERT INTO shop_coded SELECT i, 'leaked-' || i FROM generate_series(1, 100) AS i")
    database.execute("ANALYZE shop_coded")
    database.execute("ALTER TABLE shop_coded ALTER COLUMN secret SET STATISTICS 0")
    recorder = EventRecorder()

    stopped = rotate(CODES, recorder, batch=100)

    assert_completed(stopped, rows=100)
    (skipped,) = (event for event in recorder.events if isinstance(event, AnalyzeSkipped))
    assert skipped.reason.endswith("columns with the statistics target 0: secret")
    database.execute(stopped.analyze_statement)


def test_a_locked_table_is_reported_with_the_statement_to_run(
    tickets: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_maintenance, "FINAL_DELAYS_SECONDS", (0.01,))
    neighbour = tickets.connect()
    locked = b"BEGIN; LOCK TABLE tickets_ticket IN SHARE UPDATE EXCLUSIVE MODE"
    recorder = EventRecorder(after_range(1, lambda: neighbour.execute(locked)))

    stopped = rotate_tickets(recorder, batch=200)

    assert_completed(stopped, rows=1000)
    (skipped,) = (event for event in recorder.events if isinstance(event, AnalyzeSkipped))
    assert skipped.reason == "the table is busy"
    assert stopped.analyze_statement == skipped.statement == 'ANALYZE "public"."tickets_ticket";'
    assert report(stopped)["analyze_statement"] == stopped.analyze_statement
    assert summary(stopped).splitlines()[-1] == (
        'The statistics in pg_stats may still hold old values. Run: ANALYZE "public"."tickets_ticket";'
    )
    neighbour.execute(b"ROLLBACK")
    tickets.execute(stopped.analyze_statement)
    assert statistics_with_old_values(tickets, "tickets_ticket") == set()


# --- REINDEX ---------------------------------------------------------------------------------------


@pytest.fixture
def indexed(tickets: Database) -> Iterator[Database]:
    """Tickets with two more indexes, one of them with a quote in its name."""
    tickets.execute("CREATE UNIQUE INDEX tickets_token ON tickets_ticket (token)")
    tickets.execute('CREATE INDEX "tickets_odd""name" ON tickets_ticket (lower(title))')
    tickets.execute("REINDEX TABLE tickets_ticket")
    yield tickets
    for name in ("tickets_token", '"tickets_odd""name"'):
        tickets.execute(f"DROP INDEX IF EXISTS {name}")


def valid_indexes(database: Database) -> dict[str, int]:
    return dict(
        database.execute(
            "SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) FROM pg_index"
            " WHERE indrelid = 'tickets_ticket'::regclass AND indisvalid"
        )
    )


def invalid_indexes(database: Database) -> int:
    ((number,),) = database.execute(
        "SELECT count(*) FROM pg_index WHERE indrelid = 'tickets_ticket'::regclass AND NOT indisvalid"
    )
    return int(number)


def until(is_true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.005)


class Neighbour:
    """Works in a thread of its own, from the moment at which the indexes are about to be rebuilt."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run)
        self._work = work
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._error = error

    def __call__(self, event: Event) -> None:
        if isinstance(event, ReindexStarted):
            self._thread.start()

    def join(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


def skipped(recorder: EventRecorder) -> list[tuple[str, str]]:
    return [(event.name, event.reason) for event in recorder.events if isinstance(event, ReindexSkipped)]


def rebuild(rotation: int, recorder: EventRecorder) -> tuple[str, ...]:
    """Do what the command does after a completed rotation."""
    return prepare([TARGET], "default", RunOptions(reindex=True)).reindex(recorder, rotation)


def test_indexes_are_as_small_as_before(indexed: Database) -> None:
    before = valid_indexes(indexed)
    recorder = EventRecorder()

    stopped = rotate_tickets(recorder, batch=200, reindex=True)

    assert_completed(stopped, rows=1000)
    after = valid_indexes(indexed)
    assert after.keys() == before.keys()
    assert all(after[name] <= 1.1 * before[name] for name in before), (before, after)
    rebuilt = [event for event in recorder.events if isinstance(event, IndexRebuilt)]
    assert len(rebuilt) == len(before)
    assert any(event.bytes_before > 1.5 * event.bytes_now for event in rebuilt)
    assert (skipped(recorder), stopped.reindex_statements) == ([], ())
    # Statistics of expressions belong to an index, and the new one has them.
    assert statistics_with_old_values(indexed, "tickets_") == set()


def test_without_the_option_the_statements_are_shown(
    indexed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_maintenance, "MIN_GROWTH_BYTES", 1)

    stopped = rotate_tickets(batch=200)

    statement = "REINDEX INDEX CONCURRENTLY public.tickets_token;"
    assert statement in stopped.reindex_statements
    (line,) = (line for line in summary(stopped).splitlines() if statement in line)
    assert line.startswith(f"  {statement} -- ")
    assert line.endswith("%)")
    facts = report(stopped)
    assert facts["reindex_statements"] == list(stopped.reindex_statements)
    assert isinstance(facts["indexes"], list)
    (sizes,) = (index for index in facts["indexes"] if index["name"] == "public.tickets_token")
    assert 0 < sizes["bytes_before"] < sizes["bytes"]
    for each in stopped.reindex_statements:
        indexed.execute(each)
    # The command has nothing left to do for them.
    assert rebuild(stopped.rotation, EventRecorder()) == ()


def test_a_writer_commits_while_an_index_is_rebuilt(indexed: Database) -> None:
    holder, writer = indexed.connect(), indexed.connect()
    locks = list[str]()

    def work() -> None:
        holder.execute(b"BEGIN; UPDATE tickets_ticket SET title = title WHERE id = 1")
        until(lambda: writer.execute(WAITS_FOR_A_TRANSACTION.encode()).fetchall(), "REINDEX waits")
        writer.execute(b"SET lock_timeout = '1s'")
        writer.execute(b"UPDATE tickets_ticket SET title = 'another' WHERE id = 2")
        writer.execute(
            b"INSERT INTO tickets_ticket (id, title, created_at, token)"
            b" VALUES (9999, '', now(), gen_random_uuid())"
        )
        rows = writer.execute(
            b"SELECT DISTINCT l.mode FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            b" WHERE a.application_name = 'rotator' AND l.locktype = 'relation'"
            b" AND l.relation = 'tickets_ticket'::regclass AND a.datname = current_database()"
        )
        locks.extend(mode for (mode,) in rows)
        holder.execute(b"COMMIT")

    neighbour = Neighbour(work)
    recorder = EventRecorder(neighbour)
    assert_completed(rotate_tickets(recorder, batch=200, reindex=True), rows=1000)
    neighbour.join()
    assert locks == ["ShareUpdateExclusiveLock"]
    assert skipped(recorder) == []
    assert indexed.execute("SELECT count(*) FROM tickets_ticket WHERE title = 'another'") == [(1,)]


def test_it_yields_to_ddl_and_tries_again(indexed: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_maintenance, "INDEX_DELAYS_SECONDS", (0.2, 0.2, 0.2))
    holder, changer = indexed.connect(), indexed.connect()
    reader = indexed.connect()

    def work() -> None:
        # A snapshot alone: REINDEX waits for it, and ALTER TABLE does not.
        holder.execute(b"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM rotator_rotation")
        until(lambda: reader.execute(WAITS_FOR_A_TRANSACTION.encode()).fetchall(), "REINDEX waits")
        changer.execute(b"SET lock_timeout = '20s'")
        changer.execute(b"ALTER TABLE tickets_ticket ALTER COLUMN title SET STATISTICS 50")
        holder.execute(b"COMMIT")

    neighbour = Neighbour(work)
    recorder = EventRecorder(neighbour)
    assert_completed(rotate_tickets(recorder, batch=200, reindex=True), rows=1000)
    neighbour.join()
    assert (skipped(recorder), invalid_indexes(indexed)) == ([], 0)


def test_an_old_transaction_ends_it_and_the_same_command_resumes(
    indexed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "INDEX_LOCK_SECONDS", 0.5)
    monkeypatch.setattr(maintenance, "DROP_LOCK_SECONDS", 0.2)
    holder = indexed.connect()

    def hold(event: Event) -> None:
        if isinstance(event, ReindexStarted):
            holder.execute(b"BEGIN; UPDATE tickets_ticket SET title = title WHERE id = 1")

    recorder = EventRecorder(hold)
    stopped = rotate_tickets(recorder, batch=200, reindex=True)

    assert_completed(stopped, rows=1000)
    number = len(valid_indexes(indexed))
    reasons = {reason for _, reason in skipped(recorder)}
    assert "transactions of other sessions did not end within 0.5 s" in reasons
    assert len([each for each in stopped.reindex_statements if each.startswith("REINDEX")]) == number
    assert any(each.startswith("DROP INDEX CONCURRENTLY") for each in stopped.reindex_statements)
    assert invalid_indexes(indexed) > 0

    holder.execute(b"COMMIT")
    again = EventRecorder()
    assert rebuild(stopped.rotation, again) == ()
    assert (again.of(IndexRebuilt), skipped(again), invalid_indexes(indexed)) == (number, [], 0)
    # Nothing is rebuilt twice.
    once_more = EventRecorder()
    assert rebuild(stopped.rotation, once_more) == ()
    assert once_more.events == []


def test_a_stop_cancels_it_and_drops_what_is_left(indexed: Database) -> None:
    holder, reader = indexed.connect(), indexed.connect()

    def work() -> None:
        holder.execute(b"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM rotator_rotation")
        until(lambda: reader.execute(WAITS_FOR_A_TRANSACTION.encode()).fetchall(), "REINDEX waits")
        signal.raise_signal(signal.SIGINT)

    neighbour = Neighbour(work)
    recorder = EventRecorder(neighbour)
    stopped = rotate_tickets(recorder, batch=200, reindex=True)
    neighbour.join()
    holder.execute(b"COMMIT")

    assert_completed(stopped, rows=1000)
    assert stopped.stop_reason is None
    assert [reason for _, reason in skipped(recorder)] == ["a stop was requested"]
    assert invalid_indexes(indexed) == 0
    assert len(stopped.reindex_statements) == len(valid_indexes(indexed)) - recorder.of(IndexRebuilt)


async def test_only_leftovers_of_reindex_are_found(
    indexed: Database, control: psycopg.AsyncConnection
) -> None:
    long_name = "tickets_" + "é" * 27
    indexed.execute(f'CREATE INDEX "{long_name}" ON tickets_ticket (title)')
    leftovers = {
        "tickets_token_ccnew": True,
        "tickets_token_ccold1": True,
        "tickets_token_other_ccnew": False,
        "tickets_token_ccnew_kept": False,
        "tickets_ccnew": False,
        f"tickets_{'é' * 24}_ccnew": True,
    }
    for name in leftovers:
        indexed.execute(f'CREATE INDEX "{name}" ON tickets_ticket (created_at)')
    try:
        assert await find_leftovers(control, TICKETS) == ()
        for name in leftovers:
            indexed.execute(
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", (f'"{name}"',)
            )
        found = {name.split(".")[1].strip('"') for name in await find_leftovers(control, TICKETS)}
        assert found == {name for name, is_leftover in leftovers.items() if is_leftover}
    finally:
        for name in (*leftovers, long_name):
            indexed.execute(f'DROP INDEX "{name}"')
