"""Tables to rotate, and neighbours of the rotator on the same server."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeAlias
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from rotator.fields.generators import uuid4_block
from rotator.options import WaitLimits
from rotator.postgres.connection import Server, pooled
from rotator.postgres.fence import Lease
from rotator.postgres.owner import Owner, this_process
from rotator.postgres.rotations import Terms, begin_rotation
from rotator.postgres.table import Column, TargetTable, identifier
from rotator.postgres.values import InBulk, UuidBlock, Values, ValueSource
from rotator.postgres.writer import RangeUpdate, write_range
from rotator.ranges import Key, KeyRange, Written

# Real transactions, without the other apps' tables, whose emptying takes longer than most tests.
COMMITTING: Final = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets"])
# What a neighbour holds is waited for rather than run into.
PATIENT: Final = WaitLimits(lock_seconds=30, statement_seconds=30, transaction_seconds=60)
SCHEMA: Final = 'Rotation "tests" %s'
TARGET: Final = "tickets.Ticket.token"
TABLE_NAME: Final = "public.tickets_ticket"
TOKEN: Final = Column(name="token", type_name="uuid")
TICKETS: Final = TargetTable(
    path=("tickets_ticket",), key=(Column(name="id", type_name="int8"),), columns=(TOKEN,)
)
MONTH: Final = "FOR VALUES FROM ('2026-{0:02}-01') TO ('2026-{1:02}-01')"
_UPDATES: Final = identifier(SCHEMA, "updates")
# Only a test that fails waits so long.
PATIENCE_SECONDS: Final = 60.0
# Autovacuum holds the strongest lock for a moment, when it truncates a table.
WAITS_FOR_A_LOCK: Final = (
    "datname = current_database() AND wait_event_type = 'Lock' AND NOT EXISTS ("
    "SELECT FROM unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)"
    " JOIN pg_stat_activity AS holder USING (pid) WHERE holder.backend_type = 'autovacuum worker')"
)


PAIRS: Final = TargetTable(
    path=(SCHEMA, "pairs"),
    key=(Column(name="shop", type_name="text"), Column(name="number", type_name="int4")),
    columns=(TOKEN,),
)
ODD: Final = TargetTable(
    path=(SCHEMA, ('Odd"%s %% ' * 7)[:63]),
    key=(Column(name=('K"%(key)s ' * 7)[:63], type_name="int8"),),
    columns=(Column(name=('T"%b %% ' * 9)[:63], type_name="uuid"),),
)


END_THE_ROTATOR: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'rotator' AND datname = current_database()"
)
DROP_LEDGERS: Final = (
    "DO $$ DECLARE name text; BEGIN"
    " FOR name IN SELECT oid::regprocedure FROM pg_proc WHERE proname ~ '^rotator_guard_' LOOP"
    " EXECUTE 'DROP FUNCTION ' || name || ' CASCADE'; END LOOP;"
    " FOR name IN SELECT oid::regclass FROM pg_class WHERE relname ~ '^rotator_guard_' LOOP"
    " EXECUTE 'DROP SEQUENCE ' || name; END LOOP;"
    " FOR name IN SELECT oid::regclass FROM pg_class WHERE relname ~ '^rotator_ledger_[0-9]+$' LOOP"
    " EXECUTE 'DROP TABLE ' || name; END LOOP; END $$"
)
UPDATE: Final = "UPDATE tickets_ticket SET title = 'else' WHERE id = 3"
INSERT: Final = (
    "INSERT INTO tickets_ticket (id, title, created_at, token) VALUES (99, '', now(), gen_random_uuid())"
)


def execute_all(connection: psycopg.Connection, *statements: str) -> None:
    """Execute statements, one after the other."""
    for statement in statements:
        connection.execute(statement.encode())


def key_range(after: int | None, through: int, rows: int) -> KeyRange:
    """A range of a table whose key is one number."""
    return KeyRange(
        after=None if after is None else Key(f"[{after}]"), through=Key(f"[{through}]"), rows=rows
    )


def once_each(*spans: tuple[int, int]) -> Counter[str]:
    """What ``Database.updates`` says when each row of these spans, ends included, was updated once."""
    return Counter(f"[{number}]" for first, last in spans for number in range(first, last + 1))


async def _make_uuids(count: int) -> tuple[Values, ...]:
    return (UuidBlock(uuid4_block(count)),)


Write: TypeAlias = Callable[[KeyRange], Coroutine[Any, Any, Written]]

UUIDS: Final = InBulk(_make_uuids)
"""New values as a rotation of UUIDs makes them."""


class Database:
    """The test database as its other users see it; everything in it goes when this is closed."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        """Take the keyword arguments of a connection."""
        self.server = Server(parameters=parameters)
        self._connections = ExitStack()
        self._own = psycopg.connect(**parameters, autocommit=True)
        self._own.execute(f"SET lock_timeout = '{PATIENCE_SECONDS:.0f}s'".encode())
        self.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMA)))
        self._triggers = 0

    def close(self) -> None:
        """Close every connection, open transactions too, and drop what was made."""
        self._own.rollback()
        with self._own as last:
            self._connections.close()
            # Functions go with the schema, and triggers on other tables with their functions.
            last.execute("SET client_min_messages = warning")
            last.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(SCHEMA)))
            last.execute(DROP_LEDGERS)

    def connect(self, **parameters: Any) -> psycopg.Connection:  # noqa: ANN401 - libpq's own
        """Open one more connection, as an application that is not the rotator."""
        connection = psycopg.connect(**{**self.server.parameters, **parameters}, autocommit=True)
        self._connections.callback(connection.close)
        return connection

    @contextmanager
    def role(self) -> Iterator[sql.Identifier]:
        """Make a role that may do nothing; its name is this connection's, since roles are the server's."""
        name = sql.Identifier(f"rotator_visitor_{self._own.info.backend_pid}")
        self.execute(sql.SQL("CREATE ROLE {}").format(name))
        try:
            yield name
        finally:
            self.execute(sql.SQL("DROP OWNED BY {}").format(name))
            self.execute(sql.SQL("DROP ROLE {}").format(name))

    def execute(
        self, statement: str | sql.Composed, parameters: Mapping[str, Any] | tuple[Any, ...] | None = None
    ) -> list[tuple[Any, ...]]:
        """Execute and commit a statement, and return its rows."""
        cursor = self._own.execute(
            statement.encode() if isinstance(statement, str) else statement, parameters
        )
        return cursor.fetchall() if cursor.description else []

    def make_tickets(self, first: int, last: int) -> None:
        """Make tickets with these ids, both ends included."""
        self.execute(
            "INSERT INTO tickets_ticket (id, title, created_at, token)"
            " SELECT i, 'ticket ' || i, now(), gen_random_uuid() FROM generate_series(%s::int, %s::int) AS i",
            (first, last),
        )

    def make_table(self, table: TargetTable, *, collation: str = "C") -> None:
        """Make a table of this shape, with a title, a key and a value."""
        columns = [
            sql.SQL("{} {} {}").format(
                sql.Identifier(column.name),
                sql.Identifier("pg_catalog", column.type_name),
                sql.SQL("COLLATE {}").format(sql.Identifier(collation))
                if column.type_name == "text" and column in table.key
                else sql.SQL(""),
            )
            for column in (*table.key, *table.columns)
        ]
        self.execute(
            sql.SQL("CREATE TABLE {} ({}, title text, PRIMARY KEY ({}))").format(
                sql.Identifier(*table.path),
                sql.SQL(", ").join(columns),
                sql.SQL(", ").join(sql.Identifier(column.name) for column in table.key),
            )
        )

    def fill(self, table: TargetTable, *keys: str) -> None:
        """Insert rows; the key's columns are written as SQL over the variable ``i`` from 0 to 9."""
        self.execute(
            sql.SQL("INSERT INTO {} ({}, {}) SELECT {}, {} FROM generate_series(0, 9) AS i").format(
                sql.Identifier(*table.path),
                sql.SQL(", ").join(sql.Identifier(column.name) for column in table.key),
                sql.Identifier(table.columns[0].name),
                sql.SQL(", ").join(sql.SQL(key) for key in keys),
                sql.SQL("gen_random_uuid()" if table.columns[0].type_name == "uuid" else "'leaked ' || i"),
            )
        )

    def values(self, table: TargetTable = TICKETS) -> dict[str, Any]:
        """The rotated column's values by their rows' keys, in the key's order."""
        query = sql.SQL("SELECT {}, {} FROM {} ORDER BY {}").format(
            table.key_json(), identifier(table.columns[0].name), table.name, table.key_columns()
        )
        return dict(self.execute(query, ()))

    def changed(self, before: Mapping[str, Any], table: TargetTable = TICKETS) -> set[str]:
        """Keys of the rows whose value is not the one before."""
        return {key for key, value in self.values(table).items() if value != before[key]}

    def count_updates(self, table: TargetTable = TICKETS) -> None:
        """Have the server itself count how often it updates each row, in the updating transaction."""
        self.execute(sql.SQL("CREATE TABLE {} (key text)").format(_UPDATES), ())
        function = identifier(SCHEMA, "count updates")
        self.execute(
            sql.SQL(
                "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN"
                " INSERT INTO {} SELECT {} FROM updated; RETURN NULL; END $body$"
            ).format(function, _UPDATES, table.key_json()),
            (),
        )
        self.execute(
            sql.SQL(
                'CREATE TRIGGER "count updates" AFTER UPDATE ON {} REFERENCING NEW TABLE AS updated'
                " FOR EACH STATEMENT EXECUTE FUNCTION {}()"
            ).format(table.name, function),
            (),
        )

    def updates(self) -> Counter[str]:
        """How often each row was updated in committed transactions."""
        return Counter(key for (key,) in self.execute(sql.SQL("SELECT key FROM {}").format(_UPDATES), ()))

    def before_update(self, body: str, table: TargetTable = TICKETS) -> str:
        """Have PL/pgSQL run before each row's update, and return the trigger's quoted name."""
        self._triggers += 1
        name = sql.Identifier(f"before update {self._triggers}")
        function = sql.Identifier(SCHEMA, f"before update {self._triggers}")
        self.execute(
            sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS {}").format(
                function, sql.Literal(f"BEGIN {body} END")
            )
        )
        self.execute(
            sql.SQL("CREATE TRIGGER {} BEFORE UPDATE ON {} FOR EACH ROW EXECUTE FUNCTION {}()").format(
                name, sql.Identifier(*table.path), function
            )
        )
        return name.as_string()

    def make_trigger(
        self,
        body: str,
        table: TargetTable = TICKETS,
        *,
        timing: str = "AFTER UPDATE",
        each: str = "ROW",
        referencing: str = "",
        is_deferred: bool = False,
    ) -> str:
        """Have PL/pgSQL run at a row's or a statement's update, and return the trigger's name.

        The body runs for updates of other sessions alone, never for those of a trigger.
        """
        self._triggers += 1
        name = f"made trigger {self._triggers}"
        function = sql.Identifier(SCHEMA, name)
        self.execute(
            sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS {}").format(
                function,
                sql.Literal(
                    f"BEGIN IF pg_trigger_depth() > 1 THEN RETURN COALESCE(NEW, OLD); END IF; {body}"
                    " RETURN COALESCE(NEW, OLD); END"
                ),
            )
        )
        self.execute(
            sql.SQL(
                f"CREATE {'CONSTRAINT' if is_deferred else ''} TRIGGER {{}} {timing} ON {{}} {referencing}"
                f" {'DEFERRABLE INITIALLY DEFERRED' if is_deferred else ''} FOR EACH {each}"
                " EXECUTE FUNCTION {}()"
            ).format(sql.Identifier(name), sql.Identifier(*table.path), function)
        )
        return name

    def checkpoints(self) -> list[tuple[str | None, str, int]]:
        """All checkpoints: after, through and rows, in the order of their making."""
        return [
            (after, through, rows)
            for after, through, rows in self.execute(
                "SELECT after::text, through::text, rows FROM rotator_completedrange ORDER BY id"
            )
        ]

    def rotation(self, column: str) -> Any:  # noqa: ANN401 - whatever type the column has
        """One column of the latest rotation's row."""
        ((value,),) = self.execute(
            sql.SQL("SELECT {} FROM rotator_rotation ORDER BY id DESC LIMIT 1").format(sql.Identifier(column))
        )
        return value

    async def until(self, condition: str) -> None:
        """Wait until an SQL condition is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.execute(f"SELECT 1 WHERE {condition}"):
            assert time.monotonic() < deadline, f"in vain: {condition}"
            await asyncio.sleep(0.005)

    async def until_the_tickets_are_older(self) -> None:
        """Wait until no open transaction of any database could have written them, as controls require."""
        await self.until(
            "(SELECT bool_and(age(xmin) > age(pg_snapshot_xmin(pg_current_snapshot())::xid))"
            " FROM tickets_ticket)"
        )

    async def until_blocked(self, sessions: int = 1) -> None:
        """Wait until so many sessions of this database wait for locks."""
        await self.until(
            f"{sessions} = (SELECT count(*) FROM pg_stat_activity AS waiting WHERE {WAITS_FOR_A_LOCK})"
        )

    async def until_rotator_waits_for_a_lock(self, *, backends: int = 1) -> None:
        """Wait until so many of the rotator's own backends wait for a lock."""
        await self.until(
            f"{backends} = (SELECT count(*) FROM pg_stat_activity AS waiting"
            f" WHERE application_name = 'rotator' AND {WAITS_FOR_A_LOCK})"
        )


async def try_to_begin(
    control: psycopg.AsyncConnection,
    owner: Owner,
    *,
    target: str = TARGET,
    table_name: str = TABLE_NAME,
    database: str = "default",
    repeats: bool = True,
) -> Lease | None:
    """Begin a rotation for an owner."""
    terms = Terms(
        target=target,
        table_name=table_name,
        database=database,
        options={},
        selection={},
        identity={},
    )
    return await begin_rotation(control, terms, owner, repeats=repeats)


async def begin(control: psycopg.AsyncConnection) -> Lease:
    """Begin the tickets' rotation, as this process's."""
    begun = await try_to_begin(control, this_process())
    assert begun is not None
    return begun


@asynccontextmanager
async def writing(
    database: Database,
    lease: Lease,
    table: TargetTable = TICKETS,
    *,
    source: ValueSource = UUIDS,
    limits: WaitLimits | None = None,
) -> AsyncIterator[Write]:
    """A writer with one connection of its own."""
    async with pooled(database.server, 1) as pool:
        update = RangeUpdate(table, source, limits or WaitLimits())
        yield partial(write_range, pool, update, lease, None)


def assert_new_uuid4s(before: Mapping[str, UUID], after: Mapping[str, UUID]) -> None:
    """All values are distinct random UUIDs, none of which was there before."""
    assert len({*before.values(), *after.values()}) == len(before) + len(after)
    assert {value.version for value in after.values()} <= {4}


def fill(database: Database, table: str, first: str, prefix: str = "leaked", rows: int = 20) -> None:
    database.execute(
        f"INSERT INTO {table} SELECT '{first}'::date + i, i, '{prefix} ' || '{first} ' || i"
        f" FROM generate_series(0, {rows - 1}) AS i"
    )
