"""The tickets app against a real PostgreSQL: what its commands do at the edges, and what its admin hides."""

import io
import itertools
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from tickets import bulk
from tickets.bulk import errors_in_one_sentence
from tickets.models import Ticket

TokenDefault = Callable[[Callable[[], uuid.UUID]], None]


def run(command: str, **options: object) -> str:
    """What the command says on stdout and stderr, neither of which is a terminal."""
    said = io.StringIO()
    call_command(command, stdout=said, stderr=said, **options)
    return said.getvalue()


def sql(statement: str) -> list[tuple[object, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def token_default(monkeypatch: pytest.MonkeyPatch) -> TokenDefault:
    """Replaces the default of the model's token, where Django itself looks it up."""
    field = Ticket._meta.get_field("token")
    return lambda default: monkeypatch.setitem(vars(field), "_get_default", default)


@pytest.fixture
def referring_table(transactional_db: None) -> Iterator[str]:  # noqa: ARG001
    sql("CREATE TABLE ticket_notes (ticket_id bigint REFERENCES tickets_ticket (id))")
    yield "ticket_notes"
    sql("DROP TABLE ticket_notes")


class Answers(io.StringIO):
    """A person at a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", Answers(text))


# --- create_tickets --------------------------------------------------------------------------------


@pytest.mark.usefixtures("transactional_db")
def test_count_adds_whole_batches_and_a_rest() -> None:
    run("create_tickets", count=7, batch_size=7)
    said = run("create_tickets", count=25, batch_size=10)

    # One transaction a batch: xmin is the transaction that inserted the row.
    batches = sql("SELECT count(*) FROM tickets_ticket GROUP BY xmin ORDER BY min(id)")
    assert batches == [(7,), (10,), (10,), (5,)]
    assert "Created 25 tickets" in said


@pytest.mark.usefixtures("transactional_db")
def test_ids_come_from_the_tables_own_sequence() -> None:
    before = Ticket.objects.create(title="before")
    run("create_tickets", count=3)
    after = Ticket.objects.create(title="after")

    ids = list(Ticket.objects.order_by("id").values_list("id", flat=True))
    assert ids == [before.id, before.id + 1, before.id + 2, before.id + 3, after.id]


@pytest.mark.usefixtures("transactional_db")
def test_every_token_is_a_distinct_uuid4() -> None:
    run("create_tickets", count=500, batch_size=200)

    tokens = list(Ticket.objects.values_list("token", flat=True))
    assert len(set(tokens)) == 500
    assert all(token.version == 4 and token.variant == uuid.RFC_4122 for token in tokens)


@pytest.mark.usefixtures("transactional_db")
def test_tokens_are_made_by_the_models_default(token_default: TokenDefault) -> None:
    new_values: list[uuid.UUID] = []

    def make() -> uuid.UUID:
        new_values.append(uuid.uuid4())
        return new_values[-1]

    token_default(make)
    run("create_tickets", count=12, batch_size=5)

    assert list(Ticket.objects.order_by("id").values_list("token", flat=True)) == new_values


@pytest.mark.usefixtures("transactional_db")
def test_total_adds_what_is_missing_and_no_more() -> None:
    run("create_tickets", count=4)

    assert "Created 6 tickets" in run("create_tickets", total=10, batch_size=4)
    assert "there are 10 tickets already" in run("create_tickets", total=10)
    assert "there are 10 tickets already" in run("create_tickets", total=3)
    assert Ticket.objects.count() == 10


@pytest.mark.usefixtures("transactional_db")
def test_the_planner_and_index_only_scans_know_the_new_rows() -> None:
    pages: object = 0
    visible_pages: object = 0
    holders: object = ()
    # Autovacuum's ANALYZE of another table keeps new rows from being visible to all for a moment.
    for _ in range(20):
        run("delete_tickets", interactive=False)
        run("create_tickets", count=300)
        ((rows, pages, visible_pages),) = sql(
            "SELECT reltuples::int, relpages, relallvisible FROM pg_class"
            " WHERE oid = 'tickets_ticket'::regclass"
        )
        assert rows == 300
        if visible_pages:
            break
        holders = sql(
            "SELECT backend_type, application_name, state FROM pg_stat_activity"
            " WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid() AND datname = current_database()"
        )
        time.sleep(1)
    assert visible_pages == pages != 0, holders


@pytest.mark.usefixtures("transactional_db")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "--count must be 1 or more, not 0"),
        ({"count": -5}, "--count must be 1 or more, not -5"),
        ({"total": 0}, "--total must be 1 or more, not 0"),
        ({"count": 5, "batch_size": 0}, "--batch-size must be 1 or more, not 0"),
        ({"count": 5, "total": 5}, "either --count.* or --total"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_made(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(CommandError, match=sentence):
        run("create_tickets", **options)
    assert not Ticket.objects.exists()


@pytest.mark.usefixtures("transactional_db")
def test_verbosity_zero_says_nothing() -> None:
    assert run("create_tickets", count=5, verbosity=0) == ""
    assert Ticket.objects.count() == 5


def interrupting(*rows: int) -> Callable[[], uuid.UUID]:
    """A default that presses Ctrl-C while it makes the tokens of these rows."""
    new_values = 0

    def make() -> uuid.UUID:
        nonlocal new_values
        new_values += 1
        if new_values in rows:
            signal.raise_signal(signal.SIGINT)
        return uuid.uuid4()

    return make


@pytest.mark.usefixtures("transactional_db")
def test_ctrl_c_keeps_whole_batches(token_default: TokenDefault, capsys: pytest.CaptureFixture[str]) -> None:
    token_default(interrupting(25))

    with pytest.raises(SystemExit) as stopped:
        call_command("create_tickets", count=100, batch_size=10)

    assert stopped.value.code == 130
    assert "committed batches are kept" in capsys.readouterr().err
    assert Ticket.objects.count() == 20


@pytest.mark.usefixtures("transactional_db")
def test_a_refusal_in_the_middle_keeps_whole_batches_and_shows_no_token(token_default: TokenDefault) -> None:
    tokens = [uuid.uuid4() for _ in range(24)]
    repeating = itertools.cycle(tokens)
    token_default(lambda: next(repeating))

    with pytest.raises(CommandError, match="The 20 tickets created before that are kept") as refused:
        run("create_tickets", count=100, batch_size=10)

    assert "PostgreSQL refused: duplicate key" in str(refused.value)
    assert str(tokens[0]) not in str(refused.value)
    assert Ticket.objects.count() == 20


@pytest.mark.usefixtures("transactional_db")
def test_batches_are_not_made_inside_somebody_elses_transaction() -> None:
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic():
        run("create_tickets", count=3)
    assert not Ticket.objects.exists()


@pytest.mark.usefixtures("transactional_db")
def test_off_the_main_thread_tickets_are_made_too() -> None:
    def work() -> None:
        try:
            run("create_tickets", count=3)
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert Ticket.objects.count() == 3


@pytest.mark.usefixtures("transactional_db")
def test_djangos_query_log_works_and_holds_no_token() -> None:
    with CaptureQueriesContext(connection) as queries:
        run("create_tickets", count=2)

    log = str(queries.captured_queries)
    assert "COPY" in log
    assert not any(str(token) in log for token in Ticket.objects.values_list("token", flat=True))


# --- Errors ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("transactional_db")
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("create_tickets", {"count": 1}),
        ("create_tickets", {"total": 1}),
        ("delete_tickets", {"interactive": False}),
    ],
)
def test_a_missing_table_points_to_migrate(command: str, options: dict[str, object]) -> None:
    sql("ALTER TABLE tickets_ticket RENAME TO hidden")
    try:
        with pytest.raises(CommandError, match=r"run `manage\.py migrate --database default` first"):
            run(command, **options)
    finally:
        sql("ALTER TABLE hidden RENAME TO tickets_ticket")


def test_an_unreachable_server_is_one_line() -> None:
    with (
        pytest.raises(CommandError, match="'default' cannot be reached; check its settings") as refused,
        errors_in_one_sentence("default"),
        connection.wrap_database_errors,
    ):
        psycopg.connect(host="127.0.0.1", port=1, connect_timeout=5)
    assert "\n" not in str(refused.value)


# --- delete_tickets --------------------------------------------------------------------------------


def storage() -> object:
    """The table's file, which TRUNCATE replaces and DELETE does not."""
    return sql("SELECT pg_relation_filenode('tickets_ticket')")


@pytest.mark.usefixtures("transactional_db")
def test_delete_truncates_and_lets_the_ids_go_on() -> None:
    run("create_tickets", count=5)
    last = Ticket.objects.latest("id").id
    before = storage()

    assert "Deleted 5 tickets by TRUNCATE" in run("delete_tickets", interactive=False)

    assert storage() != before
    assert Ticket.objects.count() == 0
    assert Ticket.objects.create(title="next").id == last + 1


def test_delete_deletes_where_a_table_may_refer_to_tickets(referring_table: str) -> None:
    run("create_tickets", count=5)
    before = storage()

    said = run("delete_tickets", interactive=False)

    assert f"Deleted 5 tickets by DELETE, since {referring_table} may refer to them" in said
    assert storage() == before
    assert Ticket.objects.count() == 0


@pytest.mark.usefixtures("transactional_db")
def test_delete_truncates_where_only_tickets_refer_to_tickets() -> None:
    run("create_tickets", count=5)
    sql("ALTER TABLE tickets_ticket ADD COLUMN parent_id bigint REFERENCES tickets_ticket (id)")
    try:
        assert "Deleted 5 tickets by TRUNCATE" in run("delete_tickets", interactive=False)
    finally:
        sql("ALTER TABLE tickets_ticket DROP COLUMN parent_id")


def test_delete_names_the_table_whose_rows_refer_to_tickets(referring_table: str) -> None:
    run("create_tickets", count=5)
    sql(f"INSERT INTO {referring_table} SELECT min(id) FROM tickets_ticket")

    with pytest.raises(CommandError, match=f"Rows of the table {referring_table} refer to tickets"):
        run("delete_tickets", interactive=False)

    assert Ticket.objects.count() == 5


@pytest.mark.usefixtures("transactional_db")
def test_delete_does_not_wait_for_ever_behind_another_session(monkeypatch: pytest.MonkeyPatch) -> None:
    run("create_tickets", count=5)
    monkeypatch.setattr(bulk, "_LOCK_TIMEOUT", "50ms")
    other = connection.copy()
    other.set_autocommit(autocommit=False)
    try:
        with other.cursor() as cursor:
            cursor.execute("SELECT FROM tickets_ticket FOR SHARE")
        with pytest.raises(CommandError, match="Another session is using the table"):
            run("delete_tickets", interactive=False)
    finally:
        other.close()
    assert Ticket.objects.count() == 5


@pytest.mark.usefixtures("transactional_db")
def test_delete_refuses_to_guess_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    run("create_tickets", count=2)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))

    with pytest.raises(CommandError, match="without a terminal: use --noinput"):
        run("delete_tickets")

    assert Ticket.objects.count() == 2


@pytest.mark.usefixtures("transactional_db")
@pytest.mark.parametrize(("text", "left"), [("yes\n", 0), ("y\n", 2), ("no\n", 2), ("\n", 2), ("", 2)])
def test_delete_asks_first(
    answer: Callable[[str], None], capsys: pytest.CaptureFixture[str], text: str, left: int
) -> None:
    run("create_tickets", count=2)
    answer(text)

    said = run("delete_tickets")

    assert "Delete all 2 tickets" in capsys.readouterr().out
    assert ("Nothing was deleted" in said) is (left == 2)
    assert Ticket.objects.count() == left


@pytest.mark.usefixtures("transactional_db")
def test_delete_asks_nothing_about_an_empty_table(answer: Callable[[str], None]) -> None:
    answer("")

    assert "there are no tickets" in run("delete_tickets")


@pytest.mark.usefixtures("transactional_db")
def test_ctrl_c_at_the_question_deletes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_prompt: str) -> str:
        raise KeyboardInterrupt

    run("create_tickets", count=2)
    monkeypatch.setattr("sys.stdin", Answers())
    monkeypatch.setattr("builtins.input", interrupt)

    with pytest.raises(SystemExit) as stopped:
        run("delete_tickets")

    assert stopped.value.code == 130
    assert Ticket.objects.count() == 2


# --- The admin -------------------------------------------------------------------------------------


@pytest.fixture
def ticket(db: None) -> Ticket:  # noqa: ARG001
    return Ticket.objects.create(title="Printer on fire")


@pytest.fixture
def staff(client: Client, ticket: Ticket) -> Client:  # noqa: ARG001
    # Without a password there is none to hash, which is most of what logging in would cost.
    client.force_login(User.objects.create_superuser("root"))
    return client


def assert_no_token(text: str, ticket: Ticket) -> None:
    assert str(ticket.token) not in text.lower()
    assert ticket.token.hex not in text.lower()


@pytest.mark.parametrize("page", ["changelist", "change", "history", "delete"])
def test_the_admin_shows_the_ticket_but_not_its_token(staff: Client, ticket: Ticket, page: str) -> None:
    response = staff.get(
        reverse(f"admin:tickets_ticket_{page}", args=[] if page == "changelist" else [ticket.pk])
    )

    assert response.status_code == 200
    text = response.content.decode()
    assert ticket.title in text
    assert_no_token(text, ticket)


def test_saving_in_the_admin_leaves_the_token_alone_and_out_of_the_history(
    staff: Client, ticket: Ticket
) -> None:
    change = reverse("admin:tickets_ticket_change", args=[ticket.pk])
    form = {
        "title": "Printer is fine",
        "created_at_0": "2026-01-01",
        "created_at_1": "12:00:00",
        "token": str(uuid.uuid4()),
    }

    response = staff.post(change, form, follow=True)

    saved = Ticket.objects.get(pk=ticket.pk)
    assert (saved.title, saved.token) == ("Printer is fine", ticket.token)
    history = staff.get(reverse("admin:tickets_ticket_history", args=[ticket.pk]))
    assert "Changed Title" in history.content.decode()
    for page in (response, history):
        assert_no_token(page.content.decode(), ticket)


def test_the_admin_search_does_not_find_by_token(staff: Client, ticket: Ticket) -> None:
    changelist = reverse("admin:tickets_ticket_changelist")

    found = staff.get(changelist, {"q": "printer"}).content.decode()
    not_found = staff.get(changelist, {"q": str(ticket.token)}).content.decode()

    assert ticket.title in found
    assert ticket.title not in not_found


@pytest.mark.parametrize("lookup", ["token", "token__startswith", "token__gte"])
def test_the_admin_answers_no_guesses_at_a_token(staff: Client, ticket: Ticket, lookup: str) -> None:
    changelist = reverse("admin:tickets_ticket_changelist")

    assert staff.get(changelist, {lookup: str(ticket.token)}).status_code == 400
    assert staff.get(changelist, {"title__startswith": "Printer"}).status_code == 200


def test_a_ticket_prints_without_its_token(ticket: Ticket) -> None:
    assert str(ticket) == "Printer on fire"
    assert_no_token(f"{ticket!s} {ticket!r}", ticket)
