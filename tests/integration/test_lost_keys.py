"""Rows that the key's index does not find, which are rotated by where they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from rotator.options import Selection
from rotator.postgres.table import TargetTable
from rotator.runner import retry
from tests.integration.outcomes import CODES, SHOP, EventRecorder, assert_unconfirmed, rotate
from tests.integration.rotation_tables import TARGET, Database

pytestmark = SHOP

ROWS = 20
SOURCES = {
    "in bulk": Selection(),
    "from rows": Selection(generator="tests.shop.generators.uuid_for_row"),
}


def skip_without_superuser(database: Database) -> None:
    ((is_superuser,),) = database.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    if not is_superuser:
        pytest.skip("only a superuser may change the catalogue")


@contextmanager
def index_misses_rows(database: Database, index: str) -> Iterator[None]:
    """Leave rows that are inserted during the test out of an index, as a damaged one does."""
    skip_without_superuser(database)
    # The test's own queries must not use it either.
    for scan in ("indexscan", "indexonlyscan", "bitmapscan"):
        database.execute(f"SET enable_{scan} = off")
    change = f"UPDATE pg_index SET indisready = %s WHERE indexrelid = '{index}'::regclass"
    database.execute(change, (False,))
    yield
    database.execute(change, (True,))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch", [3, 50])
def test_rows_that_the_index_lacks_are_rotated(database: Database, batch: int, source: str) -> None:
    database.make_tickets(1, ROWS)
    with index_misses_rows(database, "tickets_ticket_pkey"):
        database.make_tickets(100, 107)
        database.make_tickets(-3, -3)
    before, recorder = database.values(), EventRecorder()
    lacked = {key for key in before if key == "[-3]" or len(key) == len("[100]")}

    outcome = rotate(TARGET, recorder, batch=batch, selection=SOURCES[source])

    assert_unconfirmed(outcome, 0)
    assert outcome.late_rows == len(lacked) == 9
    assert recorder.counted() == (ROWS + 9, 0)
    assert database.changed(before) == before.keys()
    database.execute("REINDEX TABLE tickets_ticket")


@pytest.mark.parametrize("source", SOURCES)
def test_a_second_row_with_a_key_is_refused_by_its_key(
    database: Database, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Any update of it would be, until one of them is deleted."""
    monkeypatch.setattr(retry, "backoff_seconds", lambda *_attempt, **_limits: 0.0)
    database.make_tickets(1, ROWS)
    with index_misses_rows(database, "tickets_ticket_pkey"):
        database.make_tickets(7, 7)
    tokens = database.execute("SELECT token FROM tickets_ticket")

    outcome = rotate(TARGET, selection=SOURCES[source])

    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    ((key, reason),) = outcome.rejected_keys
    assert key == "[7]"
    assert reason == "unique_violation (23505) of tickets_ticket_pkey"
    left = {*database.execute("SELECT token FROM tickets_ticket")} & {*tokens}
    assert len(left) == 1
    database.execute("DELETE FROM tickets_ticket WHERE token = %s", left.pop())
    assert_unconfirmed(rotate(TARGET, selection=SOURCES[source]), 0)


def test_rows_that_the_index_lacks_are_rotated_where_a_filter_matches(database: Database) -> None:
    database.make_tickets(1, ROWS)
    with index_misses_rows(database, "tickets_ticket_pkey"):
        database.make_tickets(100, 107)
    database.execute("UPDATE tickets_ticket SET title = 'matches' WHERE id % 2 = 0 OR id = 101")
    before = database.values()
    rotate(TARGET, selection=Selection(filters=("title=matches",)))
    # The update of the title has put some of them into the index, at another place.
    changed = database.execute("SELECT id FROM tickets_ticket WHERE title = 'matches'")
    assert database.changed(before) == {f"[{number}]" for (number,) in changed}
    database.execute("REINDEX TABLE tickets_ticket")


@pytest.mark.parametrize("source", ["", "tests.shop.generators.token_for_row"])
def test_rows_are_rotated_although_the_index_is_out_of_order(
    database: Database, coded: Callable[[str], TargetTable], source: str
) -> None:
    """As after an upgrade of the operating system, which sorts in another way from then on."""
    skip_without_superuser(database)
    table = coded("text")
    database.execute("ALTER TABLE shop_coded DROP CONSTRAINT shop_coded_pkey")
    database.execute("ALTER TABLE shop_coded ALTER id SET NOT NULL")
    database.execute("INSERT INTO shop_coded SELECT i, 'leaked ' || i FROM generate_series(1, 60) AS i")
    database.execute("CREATE UNIQUE INDEX shop_coded_by_id ON shop_coded (id DESC)")
    before = database.values(table)
    # From now on the server takes its entries to ascend.
    database.execute("UPDATE pg_index SET indoption = '0' WHERE indexrelid = 'shop_coded_by_id'::regclass")

    outcome = rotate(CODES, batch=7, selection=Selection(generator=source))

    assert_unconfirmed(outcome, 0)
    assert outcome.late_rows > 0
    now = database.execute("SELECT secret FROM shop_coded")
    assert len(now) == 60
    assert {secret for (secret,) in now}.isdisjoint(before.values())
