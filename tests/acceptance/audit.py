"""An account of the table that owes nothing to the code under test: plain SQL over copies of its own."""

from rotator.models import Rotation
from tests.acceptance.harness import number, query

_OLD = "acceptance_old"
_WRITES = "acceptance_writes"
_SLOWNESS = "acceptance_slowness"
# RFC 9562: the version is the first digit of the third group, the variant that of the fourth.
_VERSION_4 = "^.{8}-.{4}-4.{3}-[89ab].{3}-.{12}$"


class Audit:
    """Remembers the tokens as they were, and every committed update since."""

    def __init__(self, *, counts_writes: bool = True) -> None:
        self._counts_writes = counts_writes
        query(f"CREATE UNLOGGED TABLE {_OLD} AS SELECT id, token FROM tickets_ticket")
        query(f"CREATE UNIQUE INDEX ON {_OLD} (id)")
        query(f"CREATE INDEX ON {_OLD} (token)")
        query(f"ANALYZE {_OLD}")
        if not counts_writes:
            return
        query(f"CREATE UNLOGGED TABLE {_WRITES} (id bigint NOT NULL)")
        query(
            f"CREATE FUNCTION {_WRITES}() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN INSERT INTO {_WRITES} VALUES (NEW.id); RETURN NULL; END $$"
        )
        query(
            f"CREATE TRIGGER {_WRITES} AFTER UPDATE ON tickets_ticket"
            f" FOR EACH ROW EXECUTE FUNCTION {_WRITES}()"
        )

    @staticmethod
    def clear() -> None:
        """Remove all that an audit, or ``slow_down``, has put into the database."""
        speed_up()
        query(f"DROP TRIGGER IF EXISTS {_WRITES} ON tickets_ticket")
        query(f"DROP FUNCTION IF EXISTS {_WRITES}()")
        query(f"DROP TABLE IF EXISTS {_WRITES}")
        query(f"DROP TABLE IF EXISTS {_OLD}")

    def changed(self) -> int:
        """Count the rows whose token is another one."""
        return number(f"SELECT count(*) FROM tickets_ticket JOIN {_OLD} o USING (id) WHERE {_CHANGED}")

    def assert_untouched(self) -> None:
        assert self.changed() == 0
        if self._counts_writes:
            assert number(f"SELECT count(*) FROM {_WRITES}") == 0

    def assert_checkpoints_and_tokens_agree(self) -> int:
        """What a run left that did not complete: a row is new exactly where a checkpoint covers it.

        Returns:
            How many rows are new.
        """
        covered, covered_twice, wrong = query(
            "WITH spans AS (SELECT COALESCE((after ->> 0)::bigint, 0) AS after,"
            " (through ->> 0)::bigint AS through FROM rotator_completedrange r"
            " JOIN rotator_rotation o ON o.id = r.rotation_id AND o.status <> 'abandoned'),"
            " covered AS (SELECT t.id FROM spans JOIN tickets_ticket t"
            " ON t.id > spans.after AND t.id <= spans.through),"
            " once AS (SELECT DISTINCT id FROM covered)"
            " SELECT (SELECT count(*) FROM covered),"
            " (SELECT count(*) FROM covered) - (SELECT count(*) FROM once),"
            f" (SELECT count(*) FROM tickets_ticket JOIN {_OLD} o USING (id) LEFT JOIN once USING (id)"
            f" WHERE ({_CHANGED}) <> (once.id IS NOT NULL))"
        )[0]
        assert (covered_twice, wrong) == (0, 0)
        if self._counts_writes:
            assert self._rows_not_written(times=1) + self.changed() == self._rows()
        assert isinstance(covered, int)
        return covered

    def assert_rotated(self) -> None:
        """Every row has a new token, and the checkpoints say so, without a gap and without an overlap."""
        faults = {
            "rows that came or went": self._rows() - number(f"SELECT count(*) FROM {_OLD}"),
            "rows with their old token": self._rows() - self.changed(),
            "tokens that another row had before": number(
                f"SELECT count(*) FROM tickets_ticket t JOIN {_OLD} o ON o.token = t.token"
            ),
            "tokens that two rows share": number(
                "SELECT count(*) FROM (SELECT FROM tickets_ticket GROUP BY token HAVING count(*) > 1) AS t"
            ),
            "tokens that are no UUID of version 4": number(
                f"SELECT count(*) FROM tickets_ticket WHERE token::text COLLATE \"C\" !~ '{_VERSION_4}'"
            ),
        }
        if self._counts_writes:
            faults["rows not written exactly once"] = self._rows_not_written(times=1)
        assert {name: count for name, count in faults.items() if count} == {}
        self._assert_checkpoints_tile()

    def _assert_checkpoints_tile(self) -> None:
        rotation = Rotation.objects.latest("pk")
        assert rotation.status == "completed"
        assert rotation.rows_done == self._rows()
        seams, miscounted, last, rows = query(
            "WITH spans AS (SELECT (after ->> 0)::bigint AS after, (through ->> 0)::bigint AS through, rows"
            " FROM rotator_completedrange WHERE rotation_id = %s),"
            " ordered AS (SELECT *, lag(through) OVER (ORDER BY through) AS before FROM spans)"
            " SELECT count(*) FILTER (WHERE after IS DISTINCT FROM before),"
            " count(*) FILTER (WHERE rows <> (SELECT count(*) FROM tickets_ticket t"
            " WHERE t.id > COALESCE(after, 0) AND t.id <= through)),"
            " max(through), sum(rows)::bigint FROM ordered",
            [rotation.pk],
        )[0]
        assert (seams, miscounted) == (0, 0)
        assert rotation.bound == [last]
        assert last == number("SELECT max(id) FROM tickets_ticket")
        assert rows == self._rows()

    @staticmethod
    def _rows() -> int:
        return number("SELECT count(*) FROM tickets_ticket")

    @staticmethod
    def _rows_not_written(*, times: int) -> int:
        return number(
            "SELECT count(*) FROM tickets_ticket LEFT JOIN"
            f" (SELECT id, count(*) AS times FROM {_WRITES} GROUP BY id) AS written USING (id)"
            " WHERE COALESCE(times, 0) <> %s",
            [times],
        )


_CHANGED = "tickets_ticket.token <> o.token"


def audited_tickets(rows: int) -> Audit:
    """Make tickets, and an audit of what becomes of them."""
    make_tickets(rows)
    return Audit()


def make_tickets(rows: int) -> None:
    """Fill the table quickly; every eighth id is missing."""
    query(
        "INSERT INTO tickets_ticket (id, title, created_at, token)"
        " SELECT n + n / 7, 'Ticket ' || n, now(), gen_random_uuid() FROM generate_series(1, %s) AS n",
        [rows],
    )
    query("ANALYZE tickets_ticket")


def slow_down(seconds: float) -> None:
    """Make every update of the table take longer, whatever it updates."""
    query(
        f"CREATE FUNCTION {_SLOWNESS}() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$"
    )
    query(
        f"CREATE TRIGGER {_SLOWNESS} BEFORE UPDATE ON tickets_ticket"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {_SLOWNESS}()"
    )


def speed_up() -> None:
    query(f"DROP TRIGGER IF EXISTS {_SLOWNESS} ON tickets_ticket")
    query(f"DROP FUNCTION IF EXISTS {_SLOWNESS}()")
