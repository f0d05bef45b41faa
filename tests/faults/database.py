"""A database of a test's own, and an account of its tickets that owes nothing to the code under test."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import sql

from core.own_server import OwnReplica, OwnServer
from tests.acceptance.harness import wait_until

TABLE: Final = "tickets_ticket"
_OLD: Final = "audit_old"
_WRITES: Final = "audit_writes"
_SLOWNESS: Final = "audit_slowness"
# RFC 9562: the version is the first digit of the third group, the variant that of the fourth.
_VERSION_4: Final = "^.{8}-.{4}-4.{3}-[89ab].{3}-.{12}$"


class Database:
    """One database of the tests' own server; its administrator goes past every proxy."""

    def __init__(self, server: OwnServer, name: str) -> None:
        self.server = server
        self.name = name
        self._connection: psycopg.Connection | None = None

    def url(self, *, port: int | None = None, user: str = "postgres", **options: str) -> str:
        """Return what DATABASE_URL has to be."""
        return self.server.url(self.name, port=port, user=user, **options)

    def connect(self) -> psycopg.Connection:
        """Open a connection of the administrator's, in autocommit mode."""
        return self.server.connect(self.name)

    def query(self, statement: str, parameters: Sequence[object] | None = None) -> list[tuple[Any, ...]]:
        """Execute a statement of the test's own, after a restart of the server as well."""
        try:
            return self._query(statement, parameters)
        except psycopg.OperationalError:
            if self._connection is not None and not self._connection.closed:
                raise
            return self._query(statement, parameters)

    def number(self, statement: str, parameters: Sequence[object] | None = None) -> int:
        """Return the one number that a query finds."""
        found = self.query(statement, parameters)[0][0]
        assert isinstance(found, int), f"{found!r} is no number"
        return found

    def checkpoints(self) -> int:
        """Return how many ranges are completed."""
        return self.number("SELECT count(*) FROM rotator_completedrange")

    def status(self) -> str:
        """Return the status of the latest rotation."""
        return str(self.query("SELECT status FROM rotator_rotation ORDER BY id DESC LIMIT 1")[0][0])

    def backends(self) -> int:
        """Return how many connections of rotations the server still has, dead clients' included."""
        return self.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND application_name <> 'tests'"
        )

    def tokens(self) -> list[str]:
        """Return all tokens as they are now."""
        return [str(token) for (token,) in self.query(f"SELECT token::text FROM {TABLE}")]

    def close(self) -> None:
        """Close the administrator's connection."""
        if self._connection is not None:
            self._connection.close()

    def _query(self, statement: str, parameters: Sequence[object] | None) -> list[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._connection = self.connect()
        cursor = self._connection.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


class Audit:
    """Remembers the tokens as they were, and counts every committed change of one.

    The counts are rows of an ordinary table, written by a trigger: a commit that a crash of the server loses
    takes them along.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        for statement in (
            f"CREATE TABLE {_OLD} AS SELECT id, token FROM {TABLE}",
            f"CREATE UNIQUE INDEX ON {_OLD} (id)",
            f"CREATE TABLE {_WRITES} (id bigint NOT NULL, application text NOT NULL)",
            f"GRANT INSERT ON {_WRITES} TO PUBLIC",
            (
                f"CREATE FUNCTION {_WRITES}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                f" INSERT INTO public.{_WRITES} VALUES (NEW.id, current_setting('application_name'));"
                " RETURN NULL; END $$"
            ),
            (
                f"CREATE TRIGGER {_WRITES} AFTER UPDATE ON {TABLE} FOR EACH ROW"
                f" WHEN (OLD.token IS DISTINCT FROM NEW.token) EXECUTE FUNCTION {_WRITES}()"
            ),
            f"ANALYZE {_OLD}",
        ):
            database.query(statement)

    def begin_again(self) -> None:
        """Take the tokens as they are now for those that were there before, and forget all changes."""
        self._database.query(f"TRUNCATE {_OLD}, {_WRITES}")
        self._database.query(f"INSERT INTO {_OLD} SELECT id, token FROM {TABLE}")
        self._database.query(f"ANALYZE {_OLD}")

    def changed(self) -> int:
        """Count the rows that were there before and have another token now."""
        return self._number(
            f"SELECT count(*) FROM {TABLE} t JOIN {_OLD} o USING (id) WHERE t.token <> o.token"
        )

    def written(self, *, by: str = "%") -> int:
        """Count the changes of tokens that were committed, by applications with names like this."""
        return self._number(f"SELECT count(*) FROM {_WRITES} WHERE application LIKE %s", [by])

    def old_tokens(self) -> list[str]:
        """Return the tokens as they were."""
        return [str(token) for (token,) in self._database.query(f"SELECT token::text FROM {_OLD}")]

    def faults(self) -> dict[str, int]:
        """Return what is wrong with the tickets, if they are all to have been rotated: nothing, mostly."""
        # Joins of millions of rows that are planned for a few take minutes.
        self._database.query(f"ANALYZE {TABLE}, {_WRITES}")
        found = {
            "rows with a token that another row had before": self._number(
                f"SELECT count(*) FROM {TABLE} t JOIN {_OLD} o ON o.token = t.token"
            ),
            "tokens that two rows share": self._number(
                f"SELECT count(*) FROM (SELECT FROM {TABLE} GROUP BY token HAVING count(*) > 1) AS t"
            ),
            "tokens that are no UUID of version 4": self._number(
                f"SELECT count(*) FROM {TABLE} WHERE token::text COLLATE \"C\" !~ '{_VERSION_4}'"
            ),
            "rows that were there and are not": self._number(
                f"SELECT count(*) FROM {_OLD} LEFT JOIN {TABLE} t USING (id) WHERE t.id IS NULL"
            ),
            "rows never written": self._number(
                f"SELECT count(*) FROM {_OLD} o WHERE NOT EXISTS (SELECT FROM {_WRITES} w WHERE w.id = o.id)"
            ),
            "rows written more than once": self._number(
                f"SELECT count(*) FROM (SELECT FROM {_WRITES} GROUP BY id HAVING count(*) > 1) AS w"
            ),
        }
        return {what: rows for what, rows in found.items() if rows}

    def assert_rotated_once(self) -> None:
        """Every ticket has a new token, and got it in one committed change; and the rotation says so."""
        faults = self.faults()
        assert faults == {}, faults
        assert self._database.status() == "completed"

    def assert_each_row_written_at_most_once(self) -> None:
        """What is done so far was done once."""
        assert self._number(f"SELECT count(*) - count(DISTINCT id) FROM {_WRITES}") == 0
        assert self.changed() == self._number(f"SELECT count(*) FROM {_WRITES} JOIN {_OLD} USING (id)")

    def _number(self, statement: str, parameters: Sequence[object] | None = None) -> int:
        return self._database.number(statement, parameters)


@contextmanager
def new_database(server: OwnServer, template: str) -> Iterator[Database]:
    """Make a database as a copy of another one, and drop it in the end."""
    name = f"tests_{secrets.token_hex(4)}"
    with server.connect() as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        )
    database = Database(server, name)
    try:
        yield database
    finally:
        database.close()
        with server.connect() as admin:
            drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            admin.execute(drop)


@contextmanager
def new_role(database: Database, name: str, *grants: str) -> Iterator[str]:
    """Make a role that may log in, with these grants and no others; yields its DATABASE_URL."""
    role = sql.Identifier(name)
    password = sql.Literal(database.server.password)
    with database.server.connect(database.name) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, password))
        try:
            for grant in grants:
                admin.execute(grant.encode())
            yield database.url(user=name)
        finally:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [name])
            admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


def make_tickets(database: Database, rows: int) -> Audit:
    """Fill the table quickly, with every eighth id missing, and begin an audit of it."""
    database.query(
        f"INSERT INTO {TABLE} (id, title, created_at, token)"
        " SELECT n + n / 7, 'Ticket ' || n, now(), gen_random_uuid() FROM generate_series(1, %s) AS n",
        [rows],
    )
    database.query(f"SELECT setval(pg_get_serial_sequence('{TABLE}', 'id'), (SELECT max(id) FROM {TABLE}))")
    database.query(f"ANALYZE {TABLE}")
    return Audit(database)


def slow_down(database: Database, seconds: float) -> None:
    """Make every statement that updates tickets take longer, however many rows it updates."""
    speed_up(database, seconds)
    database.query(
        f"CREATE TRIGGER {_SLOWNESS} BEFORE UPDATE ON {TABLE}"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {_SLOWNESS}()"
    )


def speed_up(database: Database, seconds: float = 0.0) -> None:
    """Undo ``slow_down``, or most of it, without waiting for those who hold locks on the table."""
    database.query(
        f"CREATE OR REPLACE FUNCTION {_SLOWNESS}() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$"
    )


def wait_for_replay(database: Database, replica: OwnReplica) -> None:
    """Wait until the replica has the test's own database."""
    ((position,),) = database.query("SELECT pg_current_wal_lsn()::text")
    replayed = b"SELECT 1 WHERE pg_last_wal_replay_lsn() >= %s::pg_lsn"
    with replica.connect() as standby:
        wait_until(lambda: standby.execute(replayed, [position]).fetchall(), "the replica replays")
