"""What the command does, for programs: ``await rotate(Target("shop.Order.api_key"))``.

``rotate`` runs in the caller's event loop, ``rotate_sync`` in one of its own, for scripts and data migrations
(with ``atomic = False``: a rotation commits as it goes, so it cannot be part of a transaction).

Both go on with an unfinished rotation of the same target, and can be called again after whatever stopped
them. After a completed rotation of the same rows they raise, unless they are called with ``restart=True``.
Neither touches the process's signal handlers. Cancelling the task that awaits ``rotate`` rolls back the
ranges in flight and leaves the rotation to be gone on with.
"""

import logging
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from datetime import timedelta
from importlib import import_module
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.apps import apps
from django.db import DatabaseError, connections, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from psycopg.errors import InsufficientPrivilege
from psycopg.sql import Identifier

from rotator.apps import read_setting
from rotator.events import Event, Findings, Observer, OnCommit, RotationStopped
from rotator.exceptions import MissingPrivilegesError, OptionError, RotatorError, ServerLostError, TargetError
from rotator.fields.connections import (
    borrowed,
    check_no_running_loop,
    close_idle,
    is_in_transaction,
    lost_is_an_outage,
    open_aliases,
    restore,
    run,
    unlogged,
)
from rotator.fields.receivers import commit_callback
from rotator.fields.target import find_fields, resolve
from rotator.options import MAX_BATCH_ROWS, RunOptions, Selection, WaitLimits
from rotator.postgres.connection import Server
from rotator.postgres.fence import Lease
from rotator.postgres.identity import SESSION_QUERY, SessionIdentity, TargetIdentity, check_same_session
from rotator.postgres.values import FromRows, Place, Values
from rotator.ranges import Key
from rotator.runner.context import AskForHelp, RunTarget, ShouldStop
from rotator.runner.preflight import Earlier, dry_run, find_earlier
from rotator.runner.runner import Run
from rotator.runner.worker import Helper

_APP: Final = "rotator"
# Django's own: its cursors are synchronous, and its adapters make Django's kind of values.
_DJANGOS_OWN: Final = ("cursor_factory", "context", "prepare_threshold")
_SIGNAL_BASE: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        stopped: The account of it.
        exit_status: What a command exits with: 0 completed or stopped as it was told to by an option,
            128 and the signal's number when one asked for it, 1 for anything else.
    """

    stopped: RotationStopped
    exit_status: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A rotation that could begin: everything that Django knows of it has been checked.

    Attributes:
        target: What is rotated.
        options: How.
        server: Where.
    """

    target: RunTarget
    options: RunOptions
    server: Server

    def earlier(self) -> Earlier:
        """Return the earlier rotations of this target that a new run has to do with.

        Raises:
            RotatorError: The target cannot be rotated, or the server cannot be reached.
        """
        return run(lambda: find_earlier(self.server, self.target))

    def begin(self, observer: Observer) -> int:
        """Begin the rotation, or go on with it, and leave it to the workers; return its id.

        Args:
            observer: Is told of the preflight.

        Raises:
            RotatorError: It cannot be rotated, or another process is at it; nothing was changed.
        """
        close_idle()
        return run(lambda: self._begin(observer))

    async def _begin(self, observer: Observer) -> int:
        return await Run(self.server, self.target, self.options, observer).begin()

    def rotate(
        self,
        observer: Observer,
        ask_for_help: AskForHelp | None = None,
        should_stop: ShouldStop | None = None,
        *,
        keeps_connections: bool = False,
    ) -> Outcome:
        """Run until the rotation is completed or the run is stopped.

        Args:
            observer: Is told of everything.
            ask_for_help: Asks Celery workers to rewrite the ranges; None where this process does it.
            should_stop: Is asked now and then whether to drain; None where signals alone say so.
            keeps_connections: Leave Django's connections of this thread as they are; else those without a
                transaction are closed first, so that they are not idle during the run.

        Raises:
            RotatorError: It did not begin, or is another process's.
        """
        if not keeps_connections:
            close_idle()
        return run(lambda: self.rotate_in_this_loop(observer, ask_for_help, should_stop))

    async def rotate_in_this_loop(
        self,
        observer: Observer,
        ask_for_help: AskForHelp | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Outcome:
        """Do the same in the loop that is running already."""
        # The pool logs what it does about lost connections; told once, by the run itself, that is enough
        # for whoever has not set up logging.
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        rotation = Run(
            self.server,
            self.target,
            self.options,
            observer,
            self._on_commit(observer),
            ask_for_help,
            should_stop,
        )
        if not self.options.preflight:
            for warning in self.target.warnings:
                logging.getLogger(__name__).warning("Rotating %s: %s.", self.target.label, warning)
        aliases = await sync_to_async(open_aliases)()
        try:
            stopped = await rotation.rotate()
        finally:
            # Generators and receivers may have opened some, in their thread.
            await sync_to_async(restore)(aliases)
        return Outcome(stopped=stopped, exit_status=_exit_status(rotation, stopped))

    def help(self, lease: Lease, number: int, should_stop: ShouldStop, identity: Mapping[str, Any]) -> bool:
        """Rewrite spans of a distributed rotation, as a Celery task.

        Args:
            lease: The rotation and the generation that it runs with.
            number: The id of the task's row.
            should_stop: Returns whether the task has to stop.
            identity: What the rotation was begun on.

        Returns:
            Whether another task is to continue.

        Raises:
            RotatorError: See :meth:`Helper.work`.
        """
        close_idle()
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        return run(lambda: self._help(lease, number, should_stop, identity))

    async def _help(
        self, lease: Lease, number: int, should_stop: ShouldStop, identity: Mapping[str, Any]
    ) -> bool:
        helper = Helper(self.server, self.target, self.options, lease, number, self._on_commit(), should_stop)
        aliases = await sync_to_async(open_aliases)()
        try:
            return await helper.work(TargetIdentity.from_json(identity))
        finally:
            await sync_to_async(restore)(aliases)

    def examine(self) -> Findings:
        """Find out what the rotation will meet; rewrite rows of a sample, if asked for, and roll them back.

        Raises:
            RotatorError: It cannot begin, or the server cannot be asked.
        """
        close_idle()
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        return run(lambda: dry_run(self.server, self.target, self.options))

    def _on_commit(self, observer: Observer | None = None) -> OnCommit | None:
        return commit_callback(apps.get_model(self.target.model), self.target.database, observer)


def default_target() -> tuple[str, ...]:
    """Return the target that the project's settings name; empty where they do not.

    Raises:
        OptionError: The setting is none.
    """
    return tuple(read_setting().get("DEFAULT_TARGET", "").split())


def prepare(
    labels: Sequence[str],
    database: str | None,
    options: RunOptions,
    selection: Selection | None = None,
    *,
    is_begun: bool = False,
) -> Prepared:
    """Check all that can be checked before anything is changed.

    Args:
        labels: One or several ``app.Model.field``; none for the setting's.
        database: Django's alias of the database; None for the one that the project's routers write the model
            to.
        options: How to rotate.
        selection: How rows and values are chosen; None for all rows and the fields' own defaults.
        is_begun: Whether the rotation is there, so that its tables are.

    Raises:
        RotatorError: It cannot begin, for the reason that its text gives.
    """
    check_no_running_loop()
    _check_sockets()
    labels = labels or default_target()
    if not labels:
        raise TargetError(
            "Name the target, as app.Model.field, or set ROTATOR = {'DEFAULT_TARGET': ...} in the settings."
        )
    if database is None:
        database = router.db_for_write(find_fields(labels)[0].model)
    if database not in connections:
        raise OptionError(f"There is no database '{database}': the project has {', '.join(connections)}.")
    connection = connections[database]
    if connection.vendor != "postgresql":
        raise TargetError(
            f"The database '{database}' is {connection.display_name}; only PostgreSQL is supported."
        )
    if is_in_transaction(connection):
        raise OptionError(
            "A rotation cannot run inside a transaction, whose locks it would wait for: call it outside "
            "atomic(), and with autocommit on."
        )
    target = resolve(labels, database, selection or Selection())
    if not is_begun:
        _check_migrations(connection)
    session = read_session(connection, target.path)
    if isinstance(target.source, FromRows):
        # By the name that the model has: in another thread it may mean another schema's table.
        target = replace(target, source=_in_session(target.source, database, target.path, session))
    if session.table_schema is not None:
        # The rotator's own sessions need not look in the same schemas.
        target = replace(target, path=(session.table_schema, target.path[-1]))
    target = replace(target, session=session)
    return Prepared(target=target, options=options, server=_server(connection, session))


def _check_sockets() -> None:
    """Refuse a process whose sockets and threads are not the system's."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    patcher = ""
    if gevent is not None and gevent.is_module_patched("socket"):
        patcher = "gevent"
    elif eventlet is not None and eventlet.is_monkey_patched("socket"):
        patcher = "eventlet"
    if patcher:
        raise OptionError(
            f"{patcher} has monkey-patched this process, and asyncio does not work there. Use a manage.py "
            "that does not patch, and Celery workers with --pool prefork."
        )


def read_session(connection: BaseDatabaseWrapper, path: tuple[str, ...]) -> SessionIdentity:
    """Ask one of Django's own connections what it sees.

    Args:
        connection: The connection.
        path: The table's name, with its schema before it where it has one; unquoted.
    """
    name = Identifier(*path).as_string()
    with unlogged(connection.alias), connection.cursor() as cursor:
        cursor.execute(SESSION_QUERY, (name, name))
        names = [column.name for column in cursor.description]
        return SessionIdentity(**dict(zip(names, cursor.fetchone(), strict=True)))


def _in_session(source: FromRows, database: str, path: tuple[str, ...], session: SessionIdentity) -> FromRows:
    """Return a source that reads the rows of the same table, in whichever thread it is.

    Each thread has Django connections of its own, and a project may have set up this thread's alone.
    """

    def check() -> None:
        with lost_is_an_outage():
            found = read_session(connections[database], path)
        check_same_session(path, session, found)

    async def make(keys: Sequence[Key]) -> tuple[list[Key], tuple[Values, ...]]:
        await sync_to_async(check)()
        return await source.make(keys)

    async def make_at(places: Sequence[Place]) -> tuple[list[Place], tuple[Values, ...]]:
        await sync_to_async(check)()
        return await source.make_at(places)

    return FromRows(make, make_at)


def _check_migrations(connection: BaseDatabaseWrapper) -> None:
    try:
        applied = MigrationRecorder(connection).applied_migrations()
    except DatabaseError as error:
        if isinstance(error.__cause__, InsufficientPrivilege):
            role = connection.settings_dict["USER"]
            raise MissingPrivilegesError([f"GRANT SELECT ON django_migrations TO {role};"]) from error
        # The lines after the first one only ask whether the server runs, or tell of the next address.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ServerLostError(
            f"The database '{connection.alias}' cannot be reached; check its settings and that it runs: "
            f"{reason}."
        ) from error
    # Not Django's loader, which imports the migrations of every app.
    module = import_module(MigrationLoader.migrations_module(_APP)[0] or _APP)
    needed = (found.name for found in pkgutil.iter_modules(module.__path__))
    if any((_APP, name) not in applied for name in needed):
        raise RotatorError(
            f"The rotator's tables are missing or out of date in the database '{connection.alias}': "
            f"run `manage.py migrate --database {connection.alias}` first."
        )


def _server(connection: BaseDatabaseWrapper, session: SessionIdentity) -> Server:
    return Server(
        parameters=_parameters(connection),
        role=connection.settings_dict.get("OPTIONS", {}).get("assume_role"),
        time_zone=connection.timezone_name,
        search_path=session.search_path,
        # By a wrapper of its own, which connects to nothing.
        read_parameters=lambda: _parameters(connections.create_connection(connection.alias)),
    )


def _parameters(connection: BaseDatabaseWrapper) -> dict[str, Any]:
    parameters: dict[str, Any] = connection.get_connection_params()
    return {name: value for name, value in parameters.items() if name not in _DJANGOS_OWN}


def _exit_status(rotation: Run, stopped: RotationStopped) -> int:
    if stopped.status == "completed":
        return 0
    if stopped.status == "interrupted" and rotation.signal is not None:
        return _SIGNAL_BASE + rotation.signal
    return 0 if stopped.status == "interrupted" and rotation.stopped_by_option else 1


__all__ = ["RotationUnfinishedError", "Target", "rotate", "rotate_sync"]


@dataclass(frozen=True)
class Target:
    """What is rotated: one or several fields of one table, all of its rows or some.

    Attributes:
        fields: ``app.Model.field``, or several of them.
        database: Django's alias of the database; None for the one that the project's routers write the model
            to.
        filters: Rows match all of these Django lookups, written as on the command line:
            ``created_at__lt=2026-11-01T00:00:00Z``.
        excludes: Rows match none of these.
        generator: The dotted path of a callable that makes the values; empty for the fields' own defaults. It
            takes nothing, or the row's instance, and returns a value, or a mapping of field names to values.
        include_null: Whether a NULL gets a value, too.
        include_blank: Whether an empty text gets a value, too.
        ignore_derived: The names of fields that derive nothing from the rotated ones, although it looks so.
    """

    fields: str | Sequence[str]
    _: KW_ONLY
    database: str | None = None
    filters: Sequence[str] = ()
    excludes: Sequence[str] = ()
    generator: str = ""
    include_null: bool = False
    include_blank: bool = False
    ignore_derived: Sequence[str] = ()


class RotationUnfinishedError(RotatorError):
    """The run ended before the rotation did; calling again goes on with it.

    Attributes:
        stopped: The account of the run.
    """

    def __init__(self, stopped: RotationStopped) -> None:
        super().__init__(stopped.error or f"Stopped by {stopped.stop_reason}.")
        self.stopped = stopped


@dataclass(frozen=True)
class _Call:
    """The arguments of one call, checked where they are used."""

    target: Target
    options: RunOptions

    def prepare(self) -> Prepared:
        target = self.target
        return prepare(
            (target.fields,) if isinstance(target.fields, str) else target.fields,
            target.database,
            self.options,
            Selection(
                filters=tuple(target.filters),
                excludes=tuple(target.excludes),
                generator=target.generator,
                include_null=target.include_null,
                include_blank=target.include_blank,
                ignore_derived=tuple(target.ignore_derived),
            ),
        )

    def prepare_with_callers_connections(self) -> Prepared:
        """Prepare with the caller's connections, and leave them as they were."""
        with borrowed():
            return self.prepare()


async def rotate(  # noqa: PLR0913 - the options of the command, by name
    target: Target,
    *,
    concurrency: int = 4,
    batch: int = 2000,
    restart: bool = False,
    take_over: bool = False,
    vacuum: bool = True,
    lock_timeout: timedelta = timedelta(milliseconds=100),
    outage_budget: timedelta = timedelta(minutes=5),
    observer: Observer | None = None,
) -> RotationStopped:
    """Give every row of a target a new value, or go on where an earlier run stopped.

    Args:
        target: What is rotated.
        concurrency: How many workers write at the same time, a connection each; three more are needed.
        batch: How many rows a range holds; each is one transaction.
        restart: Begin a new rotation: abandon the target's unfinished one, or repeat a completed one.
        take_over: Take the rotation from the process that owns it, even if that is alive; it will stop.
        vacuum: Vacuum the table now and then.
        lock_timeout: How long a range waits for a lock before it goes to the back of the queue.
        outage_budget: How long to wait for a server that is away before giving up.
        observer: Is called in the event loop with each event of :mod:`rotator.events`; must not block.

    Returns:
        The account of the run that completed the rotation.

    Raises:
        RotationUnfinishedError: The run ended before the rotation did, for the reason that its text gives.
        OptionError: A completed rotation had the same fields, rows and values, and ``restart`` is false.
        RotatorError: It could not begin, for the reason that its text gives; nothing was changed.
    """
    call = _Call(
        target,
        _options(
            concurrency=concurrency,
            batch=batch,
            restart=restart,
            take_over=take_over,
            vacuum=vacuum,
            lock_timeout=lock_timeout,
            outage_budget=outage_budget,
        ),
    )
    # Django's connections must not be used in the loop's thread.
    prepared = await sync_to_async(call.prepare_with_callers_connections)()
    outcome = await prepared.rotate_in_this_loop(observer or _ignore)
    return _completed(outcome.stopped)


def rotate_sync(  # noqa: PLR0913 - the options of the command, by name
    target: Target,
    *,
    concurrency: int = 4,
    batch: int = 2000,
    restart: bool = False,
    take_over: bool = False,
    vacuum: bool = True,
    lock_timeout: timedelta = timedelta(milliseconds=100),
    outage_budget: timedelta = timedelta(minutes=5),
    observer: Observer | None = None,
) -> RotationStopped:
    """Do what :func:`rotate` does, with an event loop of its own, for scripts and data migrations.

    Leaves Django's connections of this thread as they are. Generators and receivers use them, in a thread of
    their own. In a thread with a running event loop it raises an error: use :func:`rotate` there.

    Args:
        target: What is rotated.
        concurrency: How many workers write at the same time, a connection each; three more are needed.
        batch: How many rows a range holds; each is one transaction.
        restart: Begin a new rotation: abandon the target's unfinished one, or repeat a completed one.
        take_over: Take the rotation from the process that owns it, even if that is alive; it will stop.
        vacuum: Vacuum the table now and then.
        lock_timeout: How long a range waits for a lock before it goes to the back of the queue.
        outage_budget: How long to wait for a server that is away before giving up.
        observer: Is called with each event of :mod:`rotator.events`; must not block.

    Returns:
        The account of the run that completed the rotation.

    Raises:
        RotationUnfinishedError: The run ended before the rotation did, for the reason that its text gives.
        OptionError: A completed rotation had the same fields, rows and values, and ``restart`` is false.
        RotatorError: It could not begin, for the reason that its text gives; nothing was changed.
    """
    check_no_running_loop()
    call = _Call(
        target,
        _options(
            concurrency=concurrency,
            batch=batch,
            restart=restart,
            take_over=take_over,
            vacuum=vacuum,
            lock_timeout=lock_timeout,
            outage_budget=outage_budget,
        ),
    )
    prepared = call.prepare_with_callers_connections()
    with borrowed():
        return _completed(prepared.rotate(observer or _ignore, keeps_connections=True).stopped)


def _options(
    *,
    concurrency: int,
    batch: int,
    restart: bool,
    take_over: bool,
    vacuum: bool,
    lock_timeout: timedelta,
    outage_budget: timedelta,
) -> RunOptions:
    if concurrency < 1 or not 1 <= batch <= MAX_BATCH_ROWS:
        raise OptionError(
            f"concurrency and batch must be 1 or more, and batch {MAX_BATCH_ROWS:,} or less, not "
            f"{concurrency} and {batch}."
        )
    # The server takes a timeout of 0 for none.
    if lock_timeout < timedelta(milliseconds=1) or outage_budget <= timedelta(0):
        raise OptionError("lock_timeout must be a millisecond or more, and outage_budget more than 0.")
    lock_seconds = lock_timeout.total_seconds()
    return RunOptions(
        concurrency=concurrency,
        batch=batch,
        restart=restart,
        take_over=take_over,
        vacuum=vacuum,
        outage_budget_seconds=outage_budget.total_seconds(),
        limits=WaitLimits.of_lock_seconds(lock_seconds),
        listens_to_signals=False,
    )


def _completed(stopped: RotationStopped) -> RotationStopped:
    if stopped.status != "completed":
        raise RotationUnfinishedError(stopped)
    return stopped


def _ignore(_event: Event) -> None:
    """Observe nothing."""
