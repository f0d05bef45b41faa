"""``--dry-run`` shows the preflight and leaves every row as it was."""

from django.db import connection

from tests.acceptance.audit import audited_tickets
from tests.acceptance.harness import Commands, query

_TABLES = (
    "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') ORDER BY 1"
)
_DIGEST = "SELECT md5(COALESCE(string_agg(t::text, ',' ORDER BY t::text), '')) FROM {} AS t"


def everything() -> dict[str, str]:
    """A digest of the contents of every table of the database, and of where its sequences are."""
    with connection.cursor() as cursor:
        cursor.execute(_TABLES)
        tables = [name for (name,) in cursor.fetchall()]
        digests = {}
        for name in [*tables, "pg_sequences"]:
            cursor.execute(_DIGEST.format(name))
            (digests[name],) = cursor.fetchone()
    return digests


def test_a_dry_run_changes_nothing(commands: Commands) -> None:
    audited_tickets(20_000)
    before = everything()

    finished = commands.run("--dry-run", "--batch", "50")

    assert (finished.status, finished.err) == (0, "")
    assert everything() == before
    assert len(before) > 5
    first, *lines = finished.summary
    assert first == "Before the first write to tickets.Ticket.token in the database 'default':"
    assert "  rows         20,000 counted" in lines
    (time,) = (line for line in lines if line.startswith("  time "))
    assert "rows were rewritten at " in time
    assert "  - Old values cannot be restored" in finished.out


_VERSIONS = "SELECT sum(xmax::text::bigint)::text, count(DISTINCT xmax::text) FROM tickets_ticket"


def test_without_a_sample_no_row_is_touched(commands: Commands) -> None:
    audited_tickets(20_000)
    before = query(_VERSIONS)

    finished = commands.run("--dry-run", "--no-sample", "--batch", "50")

    assert (finished.status, finished.err) == (0, "")
    assert "not measured; --dry-run without --no-sample measures it" in finished.out
    assert query(_VERSIONS) == before == [("0", 1)]
    assert commands.run("--dry-run", "--batch", "50").status == 0
    assert query(_VERSIONS) != before


def test_without_a_preflight(commands: Commands) -> None:
    audited_tickets(100)
    finished = commands.run("--no-preflight")
    assert finished.status == 0
    assert "Before the first write" not in finished.err
