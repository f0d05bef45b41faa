"""A table, the sessions that change it while it is rotated, and a list of old values of the test's own.

Nothing here reads what the rotator records of rows. Two tables are kept by the test's own SQL: ``old`` has
every value that was in the table before the rotation's start; ``touched`` has the numbers of the rows that
other sessions have written since.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import errors, sql

from rotator.events import (
    ConfirmationStarted,
    Event,
    LateCommitsAwaited,
    LateRowsRotated,
    RangeCompleted,
    RangeDeferred,
    RotationStarted,
    RotationStopped,
    RowsConfirmed,
)
from rotator.exceptions import TargetError
from rotator.options import RunOptions
from rotator.postgres.connection import Server
from rotator.runner.context import RunTarget
from tests.integration.property_runs import rotate, rotate_until_killed, value_source
from tests.integration.property_scenarios import PARTITIONS, During, Edit, Kind, Late, Rotate, Scenario

SCHEMA: Final = "property"
LABEL: Final = "shop.Property.secret"
_TARGET: Final = sql.SQL("property.target")
# Edits block the run's event loop, so the run's own transactions cannot end during an edit.
_LOCK_SECONDS: Final = 0.05
_RUNS_AT_MOST: Final = 10
# Upon these an edit may be done.
_MOMENTS: Final = (RotationStarted, RangeCompleted, LateRowsRotated, ConfirmationStarted)
_REFUSED: Final = "Cannot continue rotation"
# Errors that an edit may meet next to a run; its transaction is rolled back.
_STATEMENT_SECONDS: Final = 10.0
_LOST: Final = (
    errors.LockNotAvailable,
    errors.QueryCanceled,
    errors.DeadlockDetected,
    errors.SerializationFailure,
    errors.UniqueViolation,
    # No partition for the key.
    errors.CheckViolation,
    # It was dropped during the run.
    errors.UndefinedTable,
)

# With the last one, a table of which other sessions have written every row looks rewritten.
_REWRITES: Final = {Kind.REWRITE, Kind.REPLACE, Kind.TRUNCATE, Kind.TRUNCATE_LEAF, Kind.VACUUM_FULL}


def _query(text: str, **parts: sql.Composable) -> sql.Composed:
    # All of it is written in this module.
    return sql.SQL(text).format(target=_TARGET, **parts)


@dataclass(slots=True)
class _LateTransaction:
    late: Late
    connection: psycopg.Connection
    is_changed_since: bool = False


@dataclass(slots=True)
class _Leaves:
    """The partitions by their numbers: attached, or detached."""

    attached: dict[int, str] = field(default_factory=dict)
    detached: dict[int, str] = field(default_factory=dict)
    made: int = 0


class World:
    """One scenario's table, and all that happens to it."""

    def __init__(self, server: Server, scenario: Scenario) -> None:
        """Make the table."""
        self._server = server
        self._scenario = scenario
        self._connections = ExitStack()
        self._own = self._connect()
        self._editor = self._connect(lock_seconds=_LOCK_SECONDS)
        # One edit at a time; what is concurrent with them is the run.
        self._editing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._failures: list[Exception] = []
        self._leaves = _Leaves()
        self._late: _LateTransaction | None = None
        self._had_late = False
        self._has_begun = False
        self._events = 0
        self._is_refused = False
        self._may_be_refused = False
        self._confirmed: RowsConfirmed | None = None
        self.completed = 0
        self.done = Counter[str]()
        try:
            self._make()
        except psycopg.Error:
            self._connections.close()
            raise
        self._target = RunTarget(
            label=LABEL,
            database="default",
            model="shop.Property",
            path=(SCHEMA, "target"),
            key=tuple(f"k{at}" for at in range(len(scenario.key_types))),
            columns=("secret",),
            source=value_source(scenario.value_type, from_rows=scenario.from_rows),
        )

    def close(self) -> None:
        """Drop the tables and close all connections."""
        for thread in self._threads:
            thread.join()
        if self._late is not None:
            self._late.connection.close()
        # A run that failed may have left locks.
        with suppress(psycopg.Error):
            self._own.execute("DROP SCHEMA property CASCADE")
        self._connections.close()

    # --- The table -------------------------------------------------------------------------------------

    def _connect(self, *, lock_seconds: float = 5) -> psycopg.Connection:
        connection = psycopg.connect(**self._server.parameters, autocommit=True)
        self._connections.callback(connection.close)
        connection.execute(
            "SELECT set_config('lock_timeout', %s, false),"
            # VACUUM waits for a page that a session of this process has pinned, and that is no lock.
            " set_config('statement_timeout', %s, false),"
            " set_config('client_min_messages', 'warning', false)",
            (f"{lock_seconds * 1000:.0f}ms", f"{_STATEMENT_SECONDS * 1000:.0f}ms"),
        )
        return connection

    def _make(self) -> None:
        scenario, run = self._scenario, self._own.execute
        run("DROP SCHEMA IF EXISTS property CASCADE")
        for table in ("action", "measurement", "latetransaction", "completedrange", "span", "rotation"):
            run(_query("DELETE FROM {}".replace("{}", f"rotator_{table}")))
        run("CREATE SCHEMA property")
        run("CREATE SEQUENCE property.uids")
        key = ", ".join(f"k{at} {self._key_type(at)}" for at in range(len(scenario.key_types)))
        run(
            _query(
                f"CREATE TABLE {{target}} ({key}, uid bigint NOT NULL, note text NOT NULL DEFAULT '',"
                f" secret {scenario.value_type}{'' if scenario.nullable else ' NOT NULL'},"
                f" PRIMARY KEY ({self._key_names}))"
                + (f" PARTITION BY {scenario.partitioning} (k0)" if scenario.partitioning else "")
            )
        )
        run(_query(f"CREATE TABLE property.old (uid bigint, value {scenario.value_type})"))
        run("CREATE TABLE property.touched (uid bigint)")
        if scenario.partitioning:
            for leaf in range(self._leaf_count):
                self._attach(self._own, leaf, self._make_leaf(self._own, leaf))
        with self._own.transaction():
            self._own.cursor().executemany(
                self._insert("ON CONFLICT DO NOTHING"), [[*row, ""] for row in scenario.rows]
            )
            if scenario.nullable:
                run(_query("UPDATE {target} SET secret = NULL WHERE uid % 4 = 0"))
        if scenario.partitioning and scenario.is_apart:
            name = self._leaves.detached[0] = self._leaves.attached.pop(0)
            run(_query(f"ALTER TABLE {{target}} DETACH PARTITION {name}"))

    def _key_type(self, at: int) -> str:
        key_type = self._scenario.key_types[at]
        if "en_US" in key_type:
            found = self._own.execute("SELECT FROM pg_collation WHERE collname = 'en_US'").fetchone()
            # A server without locales has the default.
            return key_type if found is not None else "text"
        return key_type

    @property
    def _key_names(self) -> str:
        return ", ".join(f"k{at}" for at in range(len(self._scenario.key_types)))

    def _fresh(self) -> str:
        """SQL for a value that was not there before."""
        if self._scenario.value_type == "uuid":
            return "gen_random_uuid()"
        return f"('made ' || gen_random_uuid())::{self._scenario.value_type}"

    def _insert(self, more: str, *, table: str = "property.target", value: str = "") -> sql.Composed:
        """An insert of one row; takes its key, and a remark."""
        key = ", ".join(f"%s::{self._key_type(at)}" for at in range(len(self._scenario.key_types)))
        return _query(
            f"INSERT INTO {table} ({self._key_names}, note, uid, secret)"
            f" VALUES ({key}, %s, nextval('property.uids'), {value or self._fresh()}) {more}"
        )

    # --- Partitions ------------------------------------------------------------------------------------

    @property
    def _leaf_count(self) -> int:
        return {"hash": PARTITIONS, "range": 2}[self._scenario.partitioning]

    def _bounds(self, leaf: int) -> sql.Composable:
        if self._scenario.partitioning == "hash":
            return _query(f"WITH (MODULUS {PARTITIONS}, REMAINDER {leaf})")
        pivot = sql.Literal(self._scenario.pivot[0])
        return _query(
            "FROM ({}) TO ({})".format(*(("MINVALUE", "{pivot}") if not leaf else ("{pivot}", "MAXVALUE"))),
            pivot=pivot,
        )

    def _belongs(self, leaf: int) -> sql.Composable:
        if self._scenario.partitioning == "hash":
            return _query(f"satisfies_hash_partition('{{target}}'::regclass, {PARTITIONS}, {leaf}, k0)")
        pivot = sql.Literal(self._scenario.pivot[0])
        return _query(f"k0 {'>=' if leaf else '<'} {{pivot}}::{self._key_type(0)}", pivot=pivot)

    def _make_leaf(self, connection: psycopg.Connection, leaf: int) -> str:
        self._leaves.made += 1
        name = f"property.leaf_{leaf}_{self._leaves.made}"
        connection.execute(_query(f"CREATE TABLE {name} (LIKE {{target}} INCLUDING ALL)"))
        self._leaves.detached[leaf] = name
        return name

    def _attach(self, connection: psycopg.Connection, leaf: int, name: str) -> None:
        connection.execute(
            _query(
                f"ALTER TABLE {{target}} ATTACH PARTITION {name} FOR VALUES {{bounds}}",
                bounds=self._bounds(leaf),
            )
        )
        self._leaves.attached[leaf] = self._leaves.detached.pop(leaf)

    # --- Edits -----------------------------------------------------------------------------------------

    def edit(self, edit: Edit) -> None:
        """Do what another session does, in a transaction of its own; perhaps in vain."""
        with self._editing:
            self._edit(self._editor, edit)

    def _edit(self, connection: psycopg.Connection, edit: Edit, *, open_seconds: float = 0) -> None:
        with suppress(*_LOST):
            match edit.kind:
                case Kind.VACUUM_FREEZE:
                    connection.execute("VACUUM (FREEZE) property.target")
                case Kind.VACUUM_FULL:
                    connection.execute("VACUUM (FULL) property.target")
                case Kind.ATTACH:
                    self._attach_filled(connection, edit)
                case _:
                    with self._transaction(connection):
                        self._act(connection, edit)
                        time.sleep(open_seconds)
            self._may_be_refused |= edit.kind in _REWRITES
            self.done[edit.kind.name] += 1

    @contextmanager
    def _transaction(self, connection: psycopg.Connection) -> Iterator[None]:
        """A transaction; what is said of the partitions is as it was if it is rolled back."""
        attached, detached = dict(self._leaves.attached), dict(self._leaves.detached)
        try:
            with connection.transaction():
                yield
        except psycopg.Error:
            self._leaves.attached, self._leaves.detached = attached, detached
            raise

    def _act(self, connection: psycopg.Connection, edit: Edit) -> None:
        match edit.kind:
            case Kind.TRUNCATE:
                connection.execute("TRUNCATE property.target")
            case Kind.TRUNCATE_LEAF:
                if name := self._leaves.attached.get(edit.leaf):
                    connection.execute(_query(f"TRUNCATE {name}"))
            case Kind.REWRITE:
                connection.execute("ALTER TABLE property.target ALTER note TYPE text USING note || ''")
                connection.execute("INSERT INTO property.touched SELECT uid FROM property.target")
            case Kind.REPLACE:
                self._replace(connection)
            case Kind.DETACH | Kind.DROP_LEAF:
                self._detach(connection, edit)
            case _:
                with connection.transaction() if edit.nested else nullcontext():
                    self._change(connection, edit, is_older=False)

    def _replace(self, connection: psycopg.Connection) -> None:
        for statement in (
            "LOCK TABLE {target}",
            "CREATE TABLE property.copy (LIKE {target} INCLUDING ALL)",
            "INSERT INTO property.copy SELECT * FROM {target}",
            "DROP TABLE {target}",
            "ALTER TABLE property.copy RENAME TO target",
            "INSERT INTO property.touched SELECT uid FROM {target}",
        ):
            connection.execute(_query(statement))

    def _detach(self, connection: psycopg.Connection, edit: Edit) -> None:
        if name := self._leaves.attached.pop(edit.leaf, None):
            connection.execute(_query(f"ALTER TABLE {{target}} DETACH PARTITION {name}"))
            if edit.kind is Kind.DROP_LEAF:
                connection.execute(_query(f"DROP TABLE {name}"))
            else:
                self._leaves.detached[edit.leaf] = name

    def _attach_filled(self, connection: psycopg.Connection, edit: Edit) -> None:
        """Attach a table of rows with old values, or one that was detached before."""
        leaves = [(edit.leaf + more) % self._leaf_count for more in range(self._leaf_count)]
        leaf = next((leaf for leaf in leaves if leaf not in self._leaves.attached), None)
        if leaf is None:
            return
        with ExitStack() as stack:
            if edit.nested:
                stack.enter_context(self._transaction(connection))
            with self._transaction(connection):
                name = self._leaves.detached.get(leaf) or self._make_leaf(connection, leaf)
                self._fill(connection, edit, leaf, name)
            with self._transaction(connection):
                self._attach(connection, leaf, name)
                # Rows written before the attachment have to be rotated, as those written before the start.
                connection.execute(
                    _query(f"DELETE FROM property.touched WHERE uid IN (SELECT uid FROM {name})")
                )

    def _fill(self, connection: psycopg.Connection, edit: Edit, leaf: int, name: str) -> None:
        """Insert rows with old values into a table that is no partition yet, and bring values back."""
        for key in edit.keys:
            columns = [
                _query(f"{{column}}::{self._key_type(at)}", column=sql.Literal(column))
                for at, column in enumerate(key)
            ]
            connection.execute(
                _query(
                    f"WITH filled AS (INSERT INTO {name} ({self._key_names}, uid, secret)"
                    f" SELECT row.*, nextval('property.uids'), {self._fresh()}"
                    f" FROM (SELECT {{columns}}) AS row ({self._key_names})"
                    " WHERE {belongs} ON CONFLICT DO NOTHING RETURNING uid, secret)"
                    " INSERT INTO property.old SELECT * FROM filled",
                    columns=sql.SQL(", ").join(columns),
                    belongs=self._belongs(leaf),
                )
            )
        connection.execute(
            _query(
                f"UPDATE {name} AS t SET secret = o.value FROM property.old o WHERE o.uid = t.uid"
                f" AND o.value IS NOT NULL AND t.uid % {edit.modulus} = {edit.remainder}"
            )
        )

    def _change(self, connection: psycopg.Connection, edit: Edit, *, is_older: bool) -> None:
        """Change rows, and note that.

        Args:
            connection: In a transaction.
            edit: The edit.
            is_older: Whether the transaction is older than the rotation: what it writes is to be rotated.
        """
        account = (
            "INSERT INTO property.old SELECT uid, secret FROM edited"
            if is_older
            else "INSERT INTO property.touched SELECT uid FROM edited"
        )

        def change(statement: str | sql.Composed, parameters: Sequence[Any] = ()) -> None:
            tracked = _query(
                f"WITH edited AS ({{statement}} RETURNING uid, secret) {account}",
                statement=_query(statement) if isinstance(statement, str) else statement,
            )
            connection.execute(tracked, parameters)

        rows = f"uid %% {edit.modulus} = {edit.remainder}"
        match edit.kind:
            case Kind.INSERT:
                stale = "(SELECT value FROM property.old WHERE value IS NOT NULL LIMIT 1)"
                value = f"COALESCE({stale}, {self._fresh()})" if edit.stale else ""
                for key in edit.keys:
                    change(self._insert("ON CONFLICT DO NOTHING", value=value), [*key, ""])
            case Kind.DELETE:
                connection.execute(_query(f"DELETE FROM {{target}} WHERE {rows}"), ())
            case Kind.MOVE:
                found = connection.execute(_query(f"SELECT uid FROM {{target}} WHERE {rows} LIMIT 4"), ())
                columns = ", ".join(f"k{at} = %s::{self._key_type(at)}" for at in range(len(edit.keys[0])))
                for (uid,), key in zip(found.fetchall(), edit.keys, strict=False):
                    change(f"UPDATE {{target}} SET {columns} WHERE uid = %s", [*key, uid])
            case Kind.SAVE_STALE:
                connection.execute(
                    _query(
                        "WITH edited AS (UPDATE {target} AS t SET secret = o.value FROM property.old o"
                        f" WHERE o.uid = t.uid AND o.value IS NOT NULL AND t.{rows}"
                        f" RETURNING t.uid, t.secret) {account}"
                    ),
                    (),
                )
            case Kind.SAVE_FRESH:
                change(f"UPDATE {{target}} SET secret = {self._fresh()} WHERE {rows} AND secret IS NOT NULL")
            case Kind.TOUCH:
                change(f"UPDATE {{target}} SET note = note || '.' WHERE {rows}")
            case _:
                raise AssertionError(edit.kind)

    # --- The transaction that is open when the rotation starts ------------------------------------------

    def _open_late(self) -> None:
        late = self._scenario.late
        if late is None or self._had_late:
            return
        self._had_late = True
        connection = self._connect(lock_seconds=_LOCK_SECONDS)
        connection.execute("BEGIN")
        # It has an id, and has written to the table, whatever its changes do.
        connection.execute("SELECT pg_current_xact_id()")
        self._late = _LateTransaction(late, connection)
        connection.execute("UPDATE property.target SET note = note WHERE false")
        for edit in late.before:
            with suppress(*_LOST), connection.transaction():
                self._change(connection, edit, is_older=True)

    def _change_late(self) -> None:
        """Let it do what it does after the start."""
        opened = self._late
        if opened is None or opened.is_changed_since:
            return
        opened.is_changed_since = True
        for edit in opened.late.after:
            if edit.nested:
                # A subtransaction's id is newer than the rotation.
                with suppress(*_LOST), opened.connection.transaction():
                    self._change(opened.connection, edit, is_older=False)
                continue
            try:
                self._change(opened.connection, edit, is_older=True)
            except _LOST:
                self._end_late()
                return

    def _end_late(self) -> None:
        if self._late is not None:
            opened, self._late = self._late, None
            opened.connection.execute("COMMIT" if opened.late.commits else "ROLLBACK")
            opened.connection.close()

    # --- Runs ------------------------------------------------------------------------------------------

    def run(self, step: Rotate) -> None:
        """Rotate until the run ends, and check its report if the rotation is completed."""
        # A rotation that is refused is abandoned, and one that was completed is repeated.
        is_restarted = self._is_refused or not self._is_unfinished()
        if is_restarted:
            self._note_old_values()
            self._open_late()
        options = RunOptions(
            batch=step.batch,
            concurrency=step.concurrency,
            stop_after_rows=step.stop_after,
            restart=is_restarted,
            vacuum=False,
            listens_to_signals=False,
        )
        slice_rows = self._scenario.slice_rows
        if step.kill_after is not None:
            rotate_until_killed(
                self._server, self._target, options, slice_rows=slice_rows, events=step.kill_after
            )
            self.done["killed"] += 1
            return
        self._confirmed = None
        stopped: RotationStopped | None = None
        try:
            stopped = rotate(self._server, self._target, options, self._observer(step), slice_rows=slice_rows)
        except TargetError as error:
            self._refused(str(error))
        finally:
            self._join()
        if stopped is None:
            return
        self._is_refused = False
        if stopped.status == "completed":
            self._check(stopped)
        elif _REFUSED in stopped.error:
            self._refused(stopped.error)

    def _refused(self, reason: str) -> None:
        assert self._may_be_refused, reason
        assert self._latest("status") != "completed"
        self._is_refused = True
        self.done["refused"] += 1

    def finish(self) -> None:
        """Rotate until it is completed."""
        completed = self.completed
        for _ in range(_RUNS_AT_MOST):
            self.run(
                Rotate(stop_after=None, kill_after=None, lost_at=None, during=(), batch=7, concurrency=2)
            )
            if self.completed > completed:
                return
        pytest_fail = f"not completed: {self._latest('status')}, {self._latest('error')}"
        raise AssertionError(pytest_fail)

    def _observer(self, step: Rotate) -> Callable[[Event], None]:
        count = deferrals = 0

        def observer(event: Event) -> None:
            nonlocal count, deferrals
            self.done[type(event).__name__] += 1
            if isinstance(event, RowsConfirmed):
                self._confirmed = event
                self.done["unconfirmed rows"] += event.unconfirmed
            if isinstance(event, ConfirmationStarted):
                # Writes after the rows have been counted are not in the report.
                self._join()
            deferrals += isinstance(event, RangeDeferred)
            if isinstance(event, _MOMENTS):
                count += 1
                self._events += 1
                self._change_late()
                for during in step.during:
                    if during.at == count:
                        self._edit_during(
                            during, in_thread=isinstance(event, RotationStarted | RangeCompleted)
                        )
                if count == step.lost_at:
                    self._end_connections()
            late = self._late
            if late is not None and (
                self._events >= late.late.end_at or deferrals > 2 or isinstance(event, LateCommitsAwaited)
            ):
                self._end_late()

        return observer

    def _edit_during(self, during: During, *, in_thread: bool) -> None:
        if not (in_thread and during.in_thread):
            self.edit(during.edit)
            return
        thread = threading.Thread(target=self._edit_in_thread, args=(during,))
        self._threads.append(thread)
        thread.start()

    def _edit_in_thread(self, during: During) -> None:
        try:
            with self._editing, psycopg.connect(**self._server.parameters, autocommit=True) as connection:
                # Here the run goes on, so its transactions do end.
                connection.execute("SET lock_timeout = '1s'")
                self._edit(connection, during.edit, open_seconds=during.open_seconds)
        except Exception as error:  # noqa: BLE001 - for the test's own thread
            self._failures.append(error)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for failure in self._failures:
            raise failure

    def _end_connections(self) -> None:
        self._own.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'rotator' AND datname = current_database()"
        )

    # --- The account -----------------------------------------------------------------------------------

    def _latest(self, column: str) -> Any:  # noqa: ANN401 - whatever type the column has
        row = self._own.execute(
            _query(
                "SELECT {column} FROM rotator_rotation ORDER BY id DESC LIMIT 1",
                column=sql.Identifier(column),
            )
        ).fetchone()
        return row[0] if row else None

    def _is_unfinished(self) -> bool:
        return self._latest("status") in ("running", "interrupted", "failed")

    def _note_old_values(self) -> None:
        """Note all values that there are, also in tables that may be attached later."""
        self._may_be_refused = False
        for table in ("old", "touched"):
            self._own.execute(_query(f"DELETE FROM property.{table}"))
        for table in ("property.target", *self._leaves.detached.values()):
            self._own.execute(_query(f"INSERT INTO property.old SELECT uid, secret FROM {table}"))

    def _count(self, condition: str, what: str = "*") -> int:
        found = self._own.execute(_query(f"SELECT count({what}) FROM {{target}} AS t WHERE {condition}"))
        return sum(count for (count,) in found)

    def _check(self, stopped: RotationStopped) -> None:
        """Compare what the rotation reports with the list of old values."""
        self.completed += 1
        # The run has waited for it, unless it wrote nothing.
        self._end_late()
        unconfirmed, confirmed = stopped.unconfirmed_rows, self._confirmed
        assert confirmed is not None
        assert unconfirmed == confirmed.unconfirmed == self._latest("unconfirmed_rows")
        assert self._latest("status") == "completed"
        is_old = "secret IN (SELECT value FROM property.old)"
        is_touched = "uid IN (SELECT uid FROM property.touched)"
        # No row that no other session has written has its old value.
        assert self._count(f"{is_old} AND NOT {is_touched}") == 0
        assert self._count(is_old) <= unconfirmed
        # No row is reported that no other session has written.
        assert unconfirmed <= self._count(f"secret IS NOT NULL AND {is_touched}")
        assert confirmed.confirmed + confirmed.unconfirmed == self._count("secret IS NOT NULL")
        new = f"secret IS NOT NULL AND NOT {is_old}"
        assert self._count(new) == self._count(new, "DISTINCT secret")
        # NULL stays NULL.
        assert (
            self._count(
                f"secret IS NOT NULL AND NOT {is_touched}"
                " AND uid IN (SELECT uid FROM property.old WHERE value IS NULL)"
            )
            == 0
        )


@contextmanager
def world(server: Server, scenario: Scenario) -> Iterator[World]:
    """A world that is closed at the end."""
    made = World(server, scenario)
    try:
        yield made
    finally:
        made.close()
