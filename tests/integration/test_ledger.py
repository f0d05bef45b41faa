"""The ledger: what enters it, when, and which columns cannot have one."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from rotator.api import prepare
from rotator.events import (
    Event,
    LateCommitsAwaited,
    LedgerProgressed,
    LedgerReady,
    RangeCompleted,
    RotationStopped,
)
from rotator.exceptions import TargetError
from rotator.models import Ledger, Rotation
from rotator.options import RunOptions, Selection
from rotator.postgres.ledger import digest_of
from rotator.postgres.table import TargetTable
from rotator.runner import proof
from tests.integration.killed import kill_itself, until_killed
from tests.integration.outcomes import CODES, SHOP, EventRecorder, after_range, rotate, rotate_tickets
from tests.integration.rotation_tables import TARGET, Database, execute_all
from tests.shop import models

pytestmark = SHOP

ROWS = 60
LONG = "md5(i::text) || md5('more' || i)"


def _entries(database: Database) -> set[int]:
    """The digests of the latest ledger, except the first entry, which every ledger has."""
    number, salt = _ledger(database)
    entries = [digest for (digest,) in database.execute(f"SELECT digest FROM rotator_ledger_{number}")]
    known = digest_of("The first entry of a ledger.", salt)
    assert entries.count(known) == 1
    return set(entries) - {known}


def _ledger(database: Database) -> tuple[int, bytes]:
    """The rotation and the salt of the latest ledger."""
    ((number, salt),) = database.execute(
        "SELECT rotation_id, salt FROM rotator_ledger ORDER BY id DESC LIMIT 1"
    )
    return number, bytes(salt)


def _expected(database: Database, *values: str | bytes) -> set[int]:
    _, salt = _ledger(database)
    return {digest_of(value, salt) for value in values}


def _assert_verified(outcome: RotationStopped) -> None:
    assert outcome.status == "completed", outcome.error
    assert outcome.verification is not None
    assert outcome.verification.is_verified, outcome.verification
    assert outcome.exit_status == 0


def test_every_old_value_is_in_it_before_the_first_row_is_rotated(database: Database) -> None:
    database.make_tickets(1, ROWS)
    asyncio.run(database.until_the_tickets_are_older())
    before = database.values()
    entered = list[set[int]]()

    recorder = EventRecorder(after_range(1, lambda: entered.append(_entries(database))))
    outcome = rotate_tickets(recorder, prove=True)

    _assert_verified(outcome)
    assert entered == [_expected(database, *map(str, before.values()))]
    events = [type(event) for event in recorder.events]
    assert events.index(LedgerReady) < events.index(RangeCompleted)
    ledger = Ledger.objects.get()
    assert (ledger.state, ledger.entries, ledger.control_rows) == ("ready", ROWS + 1, ROWS)


def test_without_the_option_there_is_none(database: Database) -> None:
    database.make_tickets(1, ROWS)
    assert rotate_tickets().verification is None
    assert not Ledger.objects.exists()


@pytest.mark.parametrize(
    ("type_name", "value"),
    [("text", LONG), ("varchar(80)", f"'é' || {LONG}"), ("char(80)", LONG)],
)
def test_a_digest_is_of_the_stored_text(
    database: Database, coded: Callable[[str], TargetTable], type_name: str, value: str
) -> None:
    coded(type_name)
    database.execute(f"INSERT INTO shop_coded SELECT i, {value} FROM generate_series(1, 40) AS i")
    before = [str(found).rstrip(" ") for (found,) in database.execute("SELECT secret FROM shop_coded")]

    _assert_verified(rotate(CODES, prove=True))

    assert _entries(database) == _expected(database, *before)


def test_rows_that_share_a_planted_value_are_no_survivors(
    database: Database, coded: Callable[[str], TargetTable]
) -> None:
    coded("text")
    database.execute(f"INSERT INTO shop_coded SELECT i, {LONG} FROM generate_series(1, 40) AS i")
    ((leaked,),) = database.execute("SELECT secret FROM shop_coded WHERE id = 7")
    _assert_verified(rotate(CODES, prove=True))
    database.execute("UPDATE shop_coded SET secret = CASE WHEN id = 9 THEN %s ELSE 'the same' END", (leaked,))
    number, _ = _ledger(database)

    found = prepare([CODES], "default", RunOptions(), Selection()).verify(
        EventRecorder(), number, repairs=False
    )

    assert found.survivor_keys == ("[9]",)
    assert found.controls is not None
    assert (found.controls.planted, found.controls.planted_found) == (3, 3)


def test_a_table_may_have_a_column_named_like_one_of_the_query(
    database: Database, coded: Callable[[str], TargetTable]
) -> None:
    coded("text")
    database.execute("ALTER TABLE shop_coded ADD digest text, ADD is_rotated text")
    database.execute(f"INSERT INTO shop_coded SELECT i, {LONG} FROM generate_series(1, 40) AS i")

    _assert_verified(rotate(CODES, prove=True))


def test_a_digest_is_of_the_stored_bytes(database: Database) -> None:
    models.ByBigInteger.objects.bulk_create(models.ByBigInteger() for _ in range(40))
    before = [bytes(found) for (found,) in database.execute("SELECT as_bytes FROM shop_bybiginteger")]

    _assert_verified(rotate("shop.ByBigInteger.as_bytes", prove=True))

    assert _entries(database) == _expected(database, *before)


def test_each_rotated_column_has_its_own_entries_and_a_null_has_none(database: Database) -> None:
    database.execute(
        "INSERT INTO shop_order (id, created_at, status, is_paid, api_key, webhook_secret)"
        f" SELECT i, now(), 'active', false, {LONG}, CASE WHEN i > 5 THEN 'hook ' || {LONG} ELSE '' END"
        " FROM generate_series(1, 20) AS i"
    )
    before = database.execute("SELECT api_key, webhook_secret FROM shop_order")
    columns = ["shop.Order.api_key", "shop.Order.webhook_secret"]
    generator = "tests.integration.test_ledger.both_keys"

    outcome = rotate(columns, prove=True, selection=Selection(generator=generator))

    _assert_verified(outcome)
    assert _entries(database) == _expected(database, *(value for row in before for value in row if value))
    assert outcome.verification is not None
    assert outcome.verification.coverage is not None
    assert outcome.verification.coverage.blank_rows == 5


def both_keys() -> dict[str, str]:
    """New values of both keys, for the test above."""
    from tests.shop.generators import token  # noqa: PLC0415 - named by its path

    return {"api_key": token(), "webhook_secret": token()}


def test_a_killed_run_resumes_the_ledger_where_it_stopped(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_tickets(1, ROWS)
    before = database.values()

    until_killed(_load_until_killed, str(database.server.parameters["dbname"]), 3)

    ledger = Ledger.objects.get()
    assert (ledger.state, ledger.loaded_through, ledger.entries) == ("loading", [21], 22)
    assert database.changed(before) == set()
    monkeypatch.setattr(proof, "LOAD_ROWS", 7)
    # The ledger belongs to the rotation, whatever the options of the run that resumes it.
    recorder = EventRecorder()
    _assert_verified(rotate_tickets(recorder, take_over=True))
    assert _entries(database) == _expected(database, *map(str, before.values()))
    assert Ledger.objects.get().entries == ROWS + 1
    assert recorder.of(LedgerProgressed) == 6


def _load_until_killed(database: str, ranges: int) -> None:
    from django.conf import settings  # noqa: PLC0415 - another process

    settings.DATABASES["default"]["NAME"] = database
    proof.LOAD_ROWS = 7  # type: ignore[misc] # for this process alone
    left = ranges

    def observer(event: Event) -> None:
        nonlocal left
        left -= isinstance(event, LedgerProgressed)
        if not left:
            kill_itself()

    prepare([TARGET], "default", RunOptions(prove=True)).rotate(observer)


def test_a_stop_while_it_is_loaded_rotates_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "LOAD_ROWS", 7)
    database.make_tickets(1, ROWS)
    before = database.values()

    stopped = rotate_tickets(prove=True, stop_after_seconds=0.001)

    assert (stopped.status, stopped.exit_status) == ("interrupted", 0)
    assert database.changed(before) == set()
    _assert_verified(rotate_tickets(prove=True))
    assert _entries(database) == _expected(database, *map(str, before.values()))


def test_a_late_row_enters_it_before_the_row_is_rotated(database: Database) -> None:
    database.make_tickets(1, ROWS)
    older = database.connect()
    # Its id is older than the rotation, and its first write to the tickets is not.
    execute_all(older, "BEGIN", "CREATE TEMPORARY TABLE other ON COMMIT DROP AS SELECT 1")
    late = [str(database.execute("SELECT gen_random_uuid()")[0][0]) for _ in range(3)]

    def insert() -> None:
        for number, token in enumerate(late, ROWS + 1):
            older.execute(
                b"INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (%s, '', now(), %s)",
                (number, token),
            )
        older.execute("COMMIT")

    outcome = rotate_tickets(after_range(1, insert), prove=True)

    _assert_verified(outcome)
    assert outcome.late_rows == len(late)
    assert _entries(database) >= _expected(database, *late)
    assert Ledger.objects.get().entries == ROWS + 1 + len(late)


def test_its_index_waits_for_autovacuum(database: Database) -> None:
    database.make_tickets(1, ROWS)
    autovacuum, locked = database.connect(), threading.Event()

    def lock(event: Event) -> None:
        if isinstance(event, LedgerProgressed) and not locked.is_set():
            number, _ = _ledger(database)
            execute_all(
                autovacuum, "BEGIN", f"LOCK TABLE rotator_ledger_{number} IN SHARE UPDATE EXCLUSIVE MODE"
            )
            threading.Timer(0.3, autovacuum.rollback).start()
            locked.set()

    _assert_verified(rotate_tickets(lock, prove=True))
    assert locked.is_set()


def test_it_is_loaded_after_older_transactions_have_ended(database: Database) -> None:
    database.make_tickets(1, ROWS)
    older = database.connect()
    execute_all(
        older,
        "BEGIN",
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " VALUES (0, '', now(), '00000000-0000-4000-8000-00000000ffff')",
    )

    awaited = 0

    def react(event: Event) -> None:
        nonlocal awaited
        awaited += isinstance(event, LateCommitsAwaited)
        if awaited == 4 and isinstance(event, LateCommitsAwaited):
            assert database.execute("SELECT 1 FROM rotator_ledger") == []
            older.execute("COMMIT")

    _assert_verified(rotate_tickets(react, prove=True))
    assert _entries(database) >= _expected(database, "00000000-0000-4000-8000-00000000ffff")


def test_its_control_has_rows_while_an_older_transaction_is_open_elsewhere(database: Database) -> None:
    older = database.connect()
    execute_all(older, "BEGIN", "SELECT pg_current_xact_id()")
    database.make_tickets(1, ROWS)

    outcome = rotate_tickets(prove=True)

    _assert_verified(outcome)
    assert outcome.verification is not None
    assert outcome.verification.controls is not None
    assert outcome.verification.controls.sampled == ROWS


def test_its_control_leaves_out_a_row_that_an_older_transaction_inserts_after_loading(
    database: Database,
) -> None:
    database.make_tickets(1, ROWS)
    older = database.connect()
    execute_all(older, "BEGIN", "SELECT pg_current_xact_id()")
    late = "00000000-0000-4000-8000-00000000ffff"

    def react(event: Event) -> None:
        if isinstance(event, LedgerProgressed):
            execute_all(
                older,
                f"INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (0, '', now(), '{late}')",
                "COMMIT",
            )

    outcome = rotate_tickets(react, prove=True)

    _assert_verified(outcome)
    assert outcome.verification is not None
    assert outcome.verification.controls is not None
    assert outcome.verification.controls.sampled == ROWS
    assert _entries(database) >= _expected(database, late)


def test_a_rotation_that_has_begun_cannot_get_one(database: Database) -> None:
    database.make_tickets(1, ROWS)
    assert rotate_tickets(stop_after_rows=20).status == "interrupted"

    refused = rotate_tickets(prove=True)

    assert refused.exit_status == 1
    assert "has rotated rows without a ledger" in refused.error
    assert "Resume it without --prove, or begin again with --restart." in refused.error
    assert not Ledger.objects.exists()
    assert rotate_tickets().status == "completed"


@pytest.mark.parametrize(
    ("type_name", "value", "reason"),
    [
        ("integer", "i", "its type int4 has too few possible values"),
        ("bigint", "i", "its type int8 has too few possible values"),
        ("text", "lpad(i::text, 4, '0')", "300 of 300 sampled values are so short"),
        ("text", "md5((i % 3)::text) || md5('x')", "repeat another one"),
        ("text", "'sk_live_a_long_constant_prefix_' || lpad(i::text, 6, '0')", "differ so little"),
    ],
)
def test_values_that_can_be_guessed_are_refused(
    database: Database, coded: Callable[[str], TargetTable], type_name: str, value: str, reason: str
) -> None:
    coded(type_name)
    database.execute(f"INSERT INTO shop_coded SELECT i, {value} FROM generate_series(1, 300) AS i")

    with pytest.raises(TargetError, match=rf"(?s){reason}.*Rotate it without --prove") as refused:
        rotate(CODES, prove=True)

    assert "sk_live" not in str(refused.value)
    assert not Rotation.objects.exists()
    if type_name == "text":
        assert rotate(CODES).status == "completed"


def test_few_rows_of_long_values_are_not_refused(
    database: Database, coded: Callable[[str], TargetTable]
) -> None:
    coded("text")
    database.execute(f"INSERT INTO shop_coded SELECT i, {LONG} FROM generate_series(1, 3) AS i")
    _assert_verified(rotate(CODES, prove=True))


def test_randomised_encryption_is_refused(database: Database) -> None:
    database.execute(
        "INSERT INTO shop_client (secret, tag, once, encrypted) VALUES ('', '', '', 'stored form')"
    )
    with pytest.raises(TargetError, match=r"RandomlyEncryptedField stores the same value in another form"):
        rotate(
            "shop.Client.encrypted",
            prove=True,
            selection=Selection(generator="tests.shop.generators.token"),
        )
    assert not Rotation.objects.exists()
