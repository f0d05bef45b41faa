"""A range is written once, with its checkpoint, or not at all."""

import asyncio
import re
import time
import traceback
from collections import Counter

import psycopg
import pytest

from rotator.exceptions import (
    RangeRejectedError,
    RotatorError,
    RowsLockedError,
    ServerLostError,
    SupersededError,
)
from rotator.postgres import writer as writing_module
from rotator.postgres.errors import SUPPRESSED
from rotator.postgres.fence import Lease
from rotator.postgres.rotations import Figures, abandon, stop
from rotator.postgres.table import Column, TargetTable
from rotator.postgres.values import InBulk, ValueSource
from rotator.ranges import Key, KeyRange
from tests.integration.rotation_tables import (
    COMMITTING,
    ODD,
    PAIRS,
    PATIENCE_SECONDS,
    PATIENT,
    SCHEMA,
    TICKETS,
    TOKEN,
    UUIDS,
    Database,
    Write,
    assert_new_uuid4s,
    key_range,
    once_each,
    writing,
)
from tests.pairs import all_pairs, quick

pytestmark = COMMITTING

NUMBER = Column(name="id", type_name="int8")
WORDS = TargetTable(path=(SCHEMA, "words"), key=(Column(name="word", type_name="text"),), columns=(TOKEN,))
SECRETS = TargetTable(
    path=(SCHEMA, "secrets"), key=(NUMBER,), columns=(Column(name="secret", type_name="text"),)
)
BYTES = TargetTable(
    path=(SCHEMA, "bytes"), key=(NUMBER,), columns=(Column(name="secret", type_name="bytea"),)
)


async def _refused(database: Database, lease: Lease, tried: KeyRange, kind: type[RotatorError]) -> str:
    """The sentence of the error that a range ends with, which has to leave everything as it was."""
    before, checkpoints = database.values(), database.checkpoints()
    async with writing(database, lease) as writer:
        with pytest.raises(kind) as caught:
            await writer(tried)
    assert database.values() == before
    assert database.checkpoints() == checkpoints
    said = "".join(traceback.format_exception(caught.value))
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", said)
    return str(caught.value)


async def test_each_row_of_the_range_changes_once_and_no_other(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 30)
    database.count_updates()
    before = database.values()
    async with writing(database, lease) as writer:
        assert (await writer(key_range(10, 20, 10))).rows == 10
    assert database.updates() == once_each((11, 20))
    assert database.changed(before) == set(once_each((11, 20)))
    assert_new_uuid4s(before, {key: database.values()[key] for key in once_each((11, 20))})
    assert database.checkpoints() == [("[10]", "[20]", 10)]


async def test_row_and_checkpoint_are_of_one_transaction(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 3)
    async with writing(database, lease) as writer:
        await writer(key_range(None, 3, 3))
    transactions = database.execute(
        "SELECT xmin FROM tickets_ticket UNION SELECT xmin FROM rotator_completedrange"
    )
    assert len(transactions) == 1


async def test_the_first_range_begins_with_the_table(database: Database, lease: Lease) -> None:
    database.make_tickets(-5, 5)
    before = database.values()
    async with writing(database, lease) as writer:
        assert (await writer(key_range(None, 0, 6))).rows == 6
    assert database.changed(before) == set(once_each((-5, 0)))
    assert database.checkpoints() == [(None, "[0]", 6)]


async def _texts(count: int) -> tuple[list[str]]:
    return ([f"new {number}" for number in range(count)],)


async def _blobs(count: int) -> tuple[list[bytes]]:
    return ([bytes([number]) for number in range(count)],)


@pytest.mark.parametrize(
    ("table", "source"),
    [(TICKETS, UUIDS), (SECRETS, InBulk(_texts)), (BYTES, InBulk(_blobs))],
    ids=["uuid", "text", "bytea"],
)
async def test_a_range_without_rows_is_checkpointed(
    database: Database, lease: Lease, table: TargetTable, source: ValueSource
) -> None:
    if table is not TICKETS:
        database.make_table(table)
    async with writing(database, lease, table, source=source) as writer:
        assert (await writer(key_range(20, 25, 0))).rows == 0
    assert database.checkpoints() == [("[20]", "[25]", 0)]


async def test_values_of_other_types_travel_too(database: Database, lease: Lease) -> None:
    database.make_table(SECRETS)
    database.fill(SECRETS, "i")
    async with writing(database, lease, SECRETS, source=InBulk(_texts)) as writer:
        assert (await writer(key_range(None, 9, 10))).rows == 10
    assert database.values(SECRETS) == {f"[{number}]": f"new {number}" for number in range(10)}


@pytest.mark.parametrize("slice_rows", quick(7, 30, slow=[1, 10, 29]))
async def test_a_range_of_several_slices_writes_each_row_once(
    database: Database, lease: Lease, monkeypatch: pytest.MonkeyPatch, slice_rows: int
) -> None:
    monkeypatch.setattr(writing_module, "SLICE_ROWS", slice_rows)
    database.make_tickets(1, 40)
    database.count_updates()
    before = database.values()
    async with writing(database, lease) as writer:
        assert (await writer(key_range(5, 35, 30))).rows == 30
    assert database.updates() == once_each((6, 35))
    assert_new_uuid4s(before, {key: database.values()[key] for key in once_each((6, 35))})
    assert database.checkpoints() == [("[5]", "[35]", 30)]


@pytest.mark.parametrize(
    ("deleted", "slice_rows"), all_pairs(["= 1", "= 20", "BETWEEN 5 AND 16", "> 0"], [7, 2000])
)
async def test_rows_that_were_deleted_since_they_were_planned_are_not_missed(
    database: Database, lease: Lease, monkeypatch: pytest.MonkeyPatch, deleted: str, slice_rows: int
) -> None:
    monkeypatch.setattr(writing_module, "SLICE_ROWS", slice_rows)
    database.make_tickets(1, 20)
    database.count_updates()
    database.execute(f"DELETE FROM tickets_ticket WHERE id {deleted}")
    left = database.values()
    async with writing(database, lease) as writer:
        assert (await writer(key_range(None, 20, 20))).rows == len(left)
    assert database.updates() == Counter(left.keys())
    assert database.checkpoints() == [(None, "[20]", len(left))]


@pytest.mark.parametrize(
    ("inserted", "slice_rows"), all_pairs([(1, 1), (15, 15), (10, 30), (15, 30)], [7, 2000])
)
async def test_rows_that_were_inserted_since_the_others_were_planned_are_written_too(
    database: Database,
    lease: Lease,
    monkeypatch: pytest.MonkeyPatch,
    inserted: tuple[int, int],
    slice_rows: int,
) -> None:
    first, last = inserted
    monkeypatch.setattr(writing_module, "SLICE_ROWS", slice_rows)
    database.make_tickets(1, 30)
    database.execute(f"DELETE FROM tickets_ticket WHERE id BETWEEN {first} AND {last}")
    planned = len(database.values())
    database.make_tickets(first, last)
    database.count_updates()
    before = database.values()
    async with writing(database, lease) as writer:
        assert (await writer(key_range(None, 30, planned))).rows == 30
    assert database.updates() == once_each((1, 30))
    assert_new_uuid4s(before, database.values())
    assert database.checkpoints() == [(None, "[30]", 30)]


@pytest.mark.parametrize("suppressed", quick(9, slow=[1, 20]))
async def test_a_suppressed_update_is_no_rotation(
    database: Database, lease: Lease, monkeypatch: pytest.MonkeyPatch, suppressed: int
) -> None:
    monkeypatch.setattr(writing_module, "SLICE_ROWS", 10)
    database.make_tickets(1, 20)
    database.before_update(f"IF OLD.id = {suppressed} THEN RETURN NULL; END IF; RETURN NEW;")
    assert await _refused(database, lease, key_range(None, 20, 20), RangeRejectedError)


async def test_a_suppressed_update_is_not_hidden_by_an_inserted_row(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    database.before_update("IF OLD.id = 5 THEN RETURN NULL; END IF; RETURN NEW;")
    said = await _refused(database, lease, key_range(None, 20, 19), RangeRejectedError)
    assert SUPPRESSED in said


@pytest.mark.parametrize("lock", ["FOR UPDATE", "FOR NO KEY UPDATE", "FOR SHARE"])
async def test_locked_rows_are_not_waited_for_long(database: Database, lease: Lease, lock: str) -> None:
    database.make_tickets(1, 20)
    neighbour = database.connect()
    neighbour.execute("BEGIN")
    neighbour.execute(f"SELECT FROM tickets_ticket WHERE id = 7 {lock}".encode())
    started = time.monotonic()
    await _refused(database, lease, key_range(None, 20, 20), RowsLockedError)
    # The limit for the wait alone; a machine can be busy.
    assert 0.1 <= time.monotonic() - started < PATIENCE_SECONDS


@pytest.mark.parametrize(
    ("neighbour_statement", "rows"),
    [
        ("UPDATE tickets_ticket SET title = 'else' WHERE id = 7", 20),
        ("UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id = 7", 20),
        ("DELETE FROM tickets_ticket WHERE id = 7", 19),
        ("UPDATE tickets_ticket SET id = 700 WHERE id = 7", 19),
    ],
)
async def test_what_a_neighbour_does_to_a_row_that_is_waited_for(
    database: Database, lease: Lease, neighbour_statement: str, rows: int
) -> None:
    database.make_tickets(1, 20)
    neighbour = database.connect()
    neighbour.execute("BEGIN")
    neighbour.execute(neighbour_statement.encode())
    async with writing(database, lease, limits=PATIENT) as writer, asyncio.TaskGroup() as tasks:
        rewriting = tasks.create_task(writer(key_range(None, 20, 20)))
        await database.until_rotator_waits_for_a_lock()
        neighbour.execute("COMMIT")
        # The neighbour's version is what is rotated.
        committed = database.values()
        assert (await rewriting).rows == rows
    changed = database.changed(committed)
    assert len(changed) == rows
    assert changed <= set(once_each((1, 20)))
    assert database.checkpoints() == [(None, "[20]", rows)]


async def test_a_row_that_is_put_in_another_s_place_is_tried_again(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    neighbour = database.connect()
    neighbour.execute("BEGIN")
    neighbour.execute("DELETE FROM tickets_ticket WHERE id = 7")
    neighbour.execute(
        "INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (7, '', now(), gen_random_uuid())"
    )
    async with writing(database, lease, limits=PATIENT) as writer:
        async with asyncio.TaskGroup() as tasks:
            rewriting = tasks.create_task(_outcome(writer, key_range(None, 20, 20)))
            await database.until_rotator_waits_for_a_lock()
            neighbour.execute("COMMIT")
            refused = await rewriting
        assert isinstance(refused, RangeRejectedError)
        assert refused.retryable
        assert database.checkpoints() == []
        assert (await writer(key_range(None, 20, 20))).rows == 20


async def _outcome(writer: Write, tried: KeyRange) -> int | RotatorError:
    try:
        return (await writer(tried)).rows
    except RotatorError as error:
        return error


async def test_a_violated_constraint_is_named_without_a_value(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    database.execute("ALTER TABLE tickets_ticket ADD CONSTRAINT sober CHECK (token IS NULL) NOT VALID")
    try:
        said = await _refused(database, lease, key_range(None, 20, 20), RangeRejectedError)
    finally:
        database.execute("ALTER TABLE tickets_ticket DROP CONSTRAINT sober")
    assert said == "The server rejected a range: check_violation (23514) of sober."


async def test_what_a_trigger_says_is_not_repeated(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    database.before_update(
        "RAISE EXCEPTION 'not %', NEW.token USING DETAIL = NEW.token, HINT = 'instead of ' || OLD.token;"
    )
    said = await _refused(database, lease, key_range(None, 20, 20), RangeRejectedError)
    assert said == "The server rejected a range: raise_exception (P0001)."


async def test_a_deferred_constraint_is_refused_at_the_commit(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    database.execute(
        f"CREATE FUNCTION {_quoted('deferred')}() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN RAISE EXCEPTION ''not %'', NEW.token; END'"
    )
    database.execute(
        "CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON tickets_ticket DEFERRABLE INITIALLY DEFERRED"
        f" FOR EACH ROW EXECUTE FUNCTION {_quoted('deferred')}()"
    )
    await _refused(database, lease, key_range(None, 20, 20), RangeRejectedError)


def _quoted(name: str) -> str:
    return psycopg.sql.Identifier(SCHEMA, name).as_string()


@pytest.mark.parametrize(
    ("body", "retryable"),
    [
        ("RAISE EXCEPTION 'no';", False),
        ("RAISE unique_violation;", True),
        ("RAISE serialization_failure;", True),
    ],
)
async def test_only_some_refusals_are_worth_another_attempt(
    database: Database, lease: Lease, body: str, *, retryable: bool
) -> None:
    database.make_tickets(1, 3)
    database.before_update(body)
    async with writing(database, lease) as writer:
        refused = await _outcome(writer, key_range(None, 3, 3))
    assert isinstance(refused, RangeRejectedError)
    assert refused.retryable is retryable


async def test_an_older_generation_writes_nothing(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    database.execute("UPDATE rotator_rotation SET generation = generation + 1")
    await _refused(database, lease, key_range(None, 20, 20), SupersededError)


async def test_a_generation_to_come_writes_nothing(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    ahead = Lease(rotation=lease.rotation, generation=lease.generation + 1)
    await _refused(database, ahead, key_range(None, 20, 20), SupersededError)


async def test_a_rotation_that_was_stopped_is_not_written_for(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    await stop(control, lease, status="interrupted", error="", figures=Figures(active_seconds=0))
    await _refused(database, lease, key_range(None, 20, 20), SupersededError)


async def test_a_rotation_that_was_abandoned_is_not_written_for(
    database: Database, control: psycopg.AsyncConnection, lease: Lease
) -> None:
    database.make_tickets(1, 20)
    await abandon(control, lease)
    await _refused(database, lease, key_range(None, 20, 20), SupersededError)


async def test_a_writer_is_as_good_as_new_after_each_kind_of_error(database: Database, lease: Lease) -> None:
    database.make_tickets(1, 20)
    trigger = database.before_update("RAISE EXCEPTION 'no';")
    neighbour = database.connect()
    async with writing(database, lease) as writer:
        with pytest.raises(RangeRejectedError):
            await writer(key_range(None, 20, 20))
        database.execute(f"DROP TRIGGER {trigger} ON tickets_ticket")
        neighbour.execute("BEGIN")
        neighbour.execute("DELETE FROM tickets_ticket WHERE id = 3")
        with pytest.raises(RowsLockedError):
            await writer(key_range(None, 20, 20))
        neighbour.execute("ROLLBACK")
        assert (await writer(key_range(None, 20, 3))).rows == 20


@pytest.mark.parametrize(
    ("after", "through"), [(None, 20), (None, 10), (10, 20)], ids=["the same", "same start", "same end"]
)
async def test_a_range_that_is_checkpointed_already_is_not_written_again(
    database: Database, lease: Lease, after: int | None, through: int
) -> None:
    database.make_tickets(1, 20)
    async with writing(database, lease) as writer:
        await writer(key_range(None, 20, 20))
    await _refused(database, lease, key_range(after, through, 20), ServerLostError)


@pytest.mark.parametrize(
    ("table", "keys", "after", "through", "expected"),
    [
        (ODD, ["i * 1000"], "[1000]", "[5000]", {f"[{number}]" for number in (2000, 3000, 4000, 5000)}),
        (
            PAIRS,
            ["chr(97 + i / 5)", "i % 5"],
            '["a", 3]',
            '["b", 1]',
            {'["a", 4]', '["b", 0]', '["b", 1]'},
        ),
        (
            WORDS,
            ["(ARRAY['', 'A', 'B', 'a', 'b', 'é', '\"', '%s', '\\', chr(128512)])[i + 1]"],
            '["B"]',
            '["b"]',
            {'["\\\\"]', '["a"]', '["b"]'},
        ),
    ],
    ids=["odd names", "composite key", "text key"],
)
async def test_tables_keys_and_columns_of_any_name_and_shape(
    database: Database,
    lease: Lease,
    table: TargetTable,
    keys: list[str],
    after: str,
    through: str,
    expected: set[str],
) -> None:
    database.make_table(table)
    database.fill(table, *keys)
    database.count_updates(table)
    before = database.values(table)
    assert len(before) == 10
    async with writing(database, lease, table) as writer:
        tried = KeyRange(after=Key(after), through=Key(through), rows=len(expected))
        assert (await writer(tried)).rows == len(expected)
    assert database.changed(before, table) == expected
    assert database.updates() == Counter(expected)
    assert database.checkpoints() == [(after, through, len(expected))]
