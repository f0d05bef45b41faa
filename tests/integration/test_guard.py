"""The guard: which writes it stops, which it lets through, and how it comes and goes."""

import json
from collections.abc import Iterator
from io import StringIO
from threading import Timer
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from psycopg import errors, sql

from rotator.api import prepare
from rotator.events import Event, GuardAdded, LedgerReady, RotationStopped
from rotator.exceptions import OptionError
from rotator.models import Ledger, Rotation
from rotator.options import RunOptions
from rotator.postgres.guard import trigger_name
from tests.integration.outcomes import SHOP, EventRecorder, after_range, rotate_tickets
from tests.integration.rotation_tables import TARGET, Database

pytestmark = SHOP

ROWS = 60
OLD = "old_tickets"
STALE = f"UPDATE tickets_ticket t SET token = o.token FROM {OLD} o WHERE o.id = t.id AND t.id = %s"


@pytest.fixture
def old(database: Database) -> Iterator[None]:
    """Tickets, and a copy of them."""
    database.make_tickets(1, ROWS)
    database.execute(f"CREATE TABLE {OLD} AS SELECT * FROM tickets_ticket")
    yield
    database.execute(f"DROP TABLE {OLD}")


def _rotate(guard: str = "refuse", observer: Any = None) -> RotationStopped:  # noqa: ANN401 - an observer
    return rotate_tickets(observer, prove=True, guard=guard)


def _verified(outcome: RotationStopped) -> bool:
    return outcome.verification is not None and outcome.verification.is_verified


@pytest.mark.usefixtures("old")
def test_old_values_cannot_be_written_and_every_other_write_succeeds(database: Database) -> None:
    assert _verified(_rotate())

    with pytest.raises(errors.CheckViolation, match="was replaced by rotation") as refused:
        database.execute(STALE, (7,))
    assert refused.value.diag.constraint_name == trigger_name(Rotation.objects.get().pk)
    with pytest.raises(errors.CheckViolation):
        database.execute(
            f"INSERT INTO tickets_ticket SELECT 999, title, created_at, token FROM {OLD} WHERE id = 3"
        )
    # Of another row, too.
    with pytest.raises(errors.CheckViolation):
        database.execute(
            f"UPDATE tickets_ticket SET token = (SELECT token FROM {OLD} WHERE id = 9) WHERE id = 8"
        )
    old_values = {str(token) for (token,) in database.execute(f"SELECT token FROM {OLD}")}
    assert not any(
        value in str(refused.value) + str(refused.value.diag.message_detail) for value in old_values
    )

    database.execute("UPDATE tickets_ticket SET title = 'else', token = token WHERE id = 7")
    database.execute("UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id = 7")
    database.execute("INSERT INTO tickets_ticket SELECT 999, '', now(), gen_random_uuid()")
    assert _shown()["guard"] == "refuse"


@pytest.mark.usefixtures("old")
def test_only_the_transactions_of_its_rotation_are_exempt(database: Database) -> None:
    assert _verified(_rotate())
    rotation = Rotation.objects.get().pk

    def write_back(ticket: int, *, within: int) -> None:
        with database.connect() as connection, connection.transaction():
            connection.execute("SELECT set_config('rotator.rotation', %s, true)", (str(within),))
            connection.execute(STALE, (ticket,))

    write_back(7, within=rotation)
    with pytest.raises(errors.CheckViolation):
        write_back(8, within=rotation + 1)
    outcome = rotate_tickets(None, prove=True, guard="refuse", restart=True)
    assert _verified(outcome)


@pytest.mark.usefixtures("old")
def test_saves_of_rows_that_are_not_rotated_yet_succeed(database: Database) -> None:
    def save() -> None:
        # Every column, as save() writes them: row 55 still has its old value, row 5 has a new one.
        database.execute(
            f"UPDATE tickets_ticket t SET title = 'saved', token = o.token FROM {OLD} o"
            " WHERE o.id = t.id AND t.id = 55"
        )
        with pytest.raises(errors.CheckViolation):
            database.execute(STALE, (5,))

    outcome = rotate_tickets(after_range(1, save), prove=True, guard="refuse", concurrency=1)

    assert _verified(outcome)
    assert database.execute("SELECT title FROM tickets_ticket WHERE id = 55") == [("saved",)]


@pytest.mark.usefixtures("old")
def test_keep_keeps_the_newer_value_and_counts(database: Database) -> None:
    assert _verified(_rotate("keep"))
    before = database.values()

    for number in (7, 8):
        database.execute(
            f"UPDATE tickets_ticket t SET title = 'saved', token = o.token FROM {OLD} o"
            " WHERE o.id = t.id AND t.id = %s",
            (number,),
        )

    assert database.changed(before) == set()
    assert database.execute("SELECT count(*) FROM tickets_ticket WHERE title = 'saved'") == [(2,)]
    with pytest.raises(errors.CheckViolation):
        database.execute(
            f"INSERT INTO tickets_ticket SELECT 999, title, created_at, token FROM {OLD} WHERE id = 3"
        )
    found = _verify()
    assert (found.guard_hits, found.exit_status) == (3, 0)


@pytest.mark.usefixtures("old")
def test_it_fires_after_every_other_trigger(database: Database) -> None:
    assert _verified(_rotate())
    database.execute(
        "CREATE FUNCTION pg_temp.restore() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN NEW.token := (SELECT token FROM {OLD} WHERE id = NEW.id); RETURN NEW; END $$"
    )
    database.execute(
        "CREATE TRIGGER zzz_restore BEFORE UPDATE OF token ON tickets_ticket"
        " FOR EACH ROW EXECUTE FUNCTION pg_temp.restore()"
    )
    try:
        with pytest.raises(errors.CheckViolation):
            database.execute("UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id = 7")
    finally:
        database.execute("DROP TRIGGER zzz_restore ON tickets_ticket")


@pytest.mark.usefixtures("old")
def test_the_application_needs_no_privilege_on_the_ledger(database: Database) -> None:
    assert _verified(_rotate())
    number = Rotation.objects.get().pk
    with database.role() as role:
        database.execute(
            sql.SQL("GRANT SELECT, UPDATE ON tickets_ticket, {} TO {}").format(sql.Identifier(OLD), role)
        )
        application = database.connect()
        application.execute(sql.SQL("SET ROLE {}").format(role))
        application.execute("UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id = 7")
        with pytest.raises(errors.CheckViolation):
            application.execute(STALE.encode(), (7,))
        for table in (f"rotator_ledger_{number}", "rotator_ledger"):
            with pytest.raises(errors.InsufficientPrivilege):
                application.execute(f"SELECT * FROM {table}".encode())
        # A trigger of its own would tell whether a value is in the ledger.
        application.execute("CREATE TEMPORARY TABLE mine (token uuid)")
        with pytest.raises(errors.InsufficientPrivilege):
            application.execute(
                "CREATE TRIGGER mine BEFORE INSERT ON mine FOR EACH ROW"
                f" EXECUTE FUNCTION rotator_guard_{number}()".encode()
            )
        application.close()


@pytest.mark.usefixtures("old")
def test_survivors_are_repaired_while_it_is_there(database: Database) -> None:
    assert _verified(_rotate())
    replica = database.connect()
    # Triggers do not fire for a replication role.
    replica.execute("SET session_replication_role = replica")
    replica.execute(STALE.encode(), (7,))

    found = _verify(repairs=True)

    assert (found.repaired, found.exit_status) == (1, 0)


@pytest.mark.usefixtures("old")
def test_it_waits_for_locks_only_for_moments(database: Database) -> None:
    other = database.connect()
    timer = Timer(0.5, lambda: other.execute("COMMIT"))

    def hold_lock(event: Event) -> None:
        # Younger than the rotation, which does not wait for its end.
        if isinstance(event, LedgerReady):
            other.execute("BEGIN")
            other.execute("UPDATE tickets_ticket SET title = 'open' WHERE id = 1")
            timer.start()

    recorder = EventRecorder(hold_lock)
    outcome = _rotate(observer=recorder)

    timer.join()
    assert _verified(outcome)
    assert recorder.of(GuardAdded) == 1


@pytest.mark.usefixtures("old")
def test_unguard_and_forget_remove_it(database: Database) -> None:
    assert _verified(_rotate())
    number, out = Rotation.objects.get().pk, StringIO()
    with pytest.raises(errors.CheckViolation):
        database.execute(STALE, (7,))

    call_command("rotations", number, "--unguard", stdout=out)

    database.execute(STALE, (7,))
    assert _verify().guard_hits == 1
    assert _verify(repairs=True).is_verified
    # The same command adds it again, with a completed rotation it has no effect.
    call_command("rotations", number, "--forget", stdout=out)
    call_command("rotations", number, "--forget", stdout=out)
    call_command("rotations", number, "--unguard", stdout=out)
    assert out.getvalue().splitlines() == [
        f"The guard of rotation {number} is removed.",
        f"The ledger of rotation {number} is dropped.",
        f"rotation {number} has no ledger.",
        f"rotation {number} has no guard.",
    ]
    ledger = Ledger.objects.get()
    assert (ledger.state, bytes(ledger.salt), ledger.guard_hits) == ("forgotten", b"", 1)
    left = database.execute("SELECT relname FROM pg_class WHERE relname ~ '^rotator_(ledger|guard)_[0-9]'")
    assert left == []
    assert _verify().survivors is None


@pytest.mark.usefixtures("old")
def test_forget_removes_the_guard_too_but_not_from_an_unfinished_rotation(database: Database) -> None:
    rotate_tickets(prove=True, guard="refuse", stop_after_rows=20)
    number = Rotation.objects.get().pk
    with pytest.raises(CommandError, match="is unfinished and needs it"):
        call_command("rotations", number, "--forget")
    assert _verified(_rotate())
    call_command("rotations", number, "--forget", stdout=StringIO())
    database.execute(STALE, (7,))


def test_it_needs_a_ledger() -> None:
    with pytest.raises(OptionError, match="Use it with --prove"):
        RunOptions.checked(guard="refuse")
    with pytest.raises(OptionError, match="--guard must be refuse or keep, not 'drop'"):
        RunOptions.checked(guard="drop", prove=True)


def _verify(*, repairs: bool = False) -> Any:  # noqa: ANN401 - the result
    rotation = Rotation.objects.latest("pk")
    prepared = prepare([TARGET], "default", RunOptions())
    return prepared.verify(EventRecorder(), rotation.pk, repairs=repairs)


def _shown() -> dict[str, Any]:
    out = StringIO()
    call_command("rotations", Rotation.objects.latest("pk").pk, "--json", stdout=out)
    facts: dict[str, Any] = json.loads(out.getvalue())
    return facts
