"""Puts a rotation together from Django's side: its settings, its connections, its models."""

import logging
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

from rotator.announcing import announcer
from rotator.errors import MissingPrivilegesError, OptionError, RotatorError, ServerLostError, TargetError
from rotator.events import Observer, RotationStopped
from rotator.findings import Findings
from rotator.keys import Key
from rotator.own_connections import lost_is_an_outage
from rotator.postgres.arrays import Values
from rotator.postgres.connections import Server
from rotator.postgres.identity import SESSION_QUERY, Session, TargetIdentity, check_same_session
from rotator.postgres.transaction import Claim
from rotator.postgres.value_source import FromRows, Place
from rotator.project_connections import (
    check_no_running_loop,
    close_idle,
    is_in_transaction,
    open_aliases,
    restore,
    run,
    unlogged,
)
from rotator.project_setting import read_setting
from rotator.run.context import Announce, ShouldStop
from rotator.run.distribution import SpanPublisher
from rotator.run.examination import Earlier, dry_run, find_earlier
from rotator.run.options import RunOptions, RunTarget
from rotator.run.run import Run
from rotator.run.span_work import SpanWork
from rotator.selection import Selection
from rotator.target import find_fields, resolve

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
        publisher: SpanPublisher | None = None,
        should_stop: ShouldStop | None = None,
        *,
        keeps_connections: bool = False,
    ) -> Outcome:
        """Run until the rotation is completed or the run is stopped.

        Args:
            observer: Is told of everything.
            publisher: Has the ranges rewritten by other processes; None where this one does it.
            should_stop: Is asked now and then whether to drain; None where signals alone say so.
            keeps_connections: Leave Django's connections of this thread as they are; else those without a
                transaction are closed first, so that they are not idle during the run.

        Raises:
            RotatorError: It did not begin, or is another process's.
        """
        if not keeps_connections:
            close_idle()
        return run(lambda: self.rotate_in_this_loop(observer, publisher, should_stop))

    async def rotate_in_this_loop(
        self,
        observer: Observer,
        publisher: SpanPublisher | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Outcome:
        """Do the same in the loop that is running already."""
        # The pool logs what it does about lost connections; told once, by the run itself, that is enough
        # for whoever has not set up logging.
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        rotation = Run(
            self.server, self.target, self.options, observer, self._announce(observer), publisher, should_stop
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

    def rotate_span(
        self, claim: Claim, span: int, should_stop: ShouldStop, identity: Mapping[str, Any]
    ) -> None:
        """Rewrite what is left of a distributed rotation's span.

        Args:
            claim: What the message about the span says of the rotation.
            span: The span's id.
            should_stop: Whether the worker has to stop.
            identity: What the rotation was begun on.

        Raises:
            RotatorError: As :meth:`SpanWork.rotate` has it.
        """
        close_idle()
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        run(lambda: self._rotate_span(claim, span, should_stop, identity))

    async def _rotate_span(
        self, claim: Claim, span: int, should_stop: ShouldStop, identity: Mapping[str, Any]
    ) -> None:
        work = SpanWork(self.server, self.target, self.options, claim, self._announce(), should_stop)
        aliases = await sync_to_async(open_aliases)()
        try:
            await work.rotate(span, TargetIdentity.from_json(identity))
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

    def _announce(self, observer: Observer | None = None) -> Announce | None:
        return announcer(apps.get_model(self.target.model), self.target.database, observer)


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


def read_session(connection: BaseDatabaseWrapper, path: tuple[str, ...]) -> Session:
    """Ask one of Django's own connections what it sees.

    Args:
        connection: The connection.
        path: The table's name, with its schema before it where it has one; unquoted.
    """
    name = Identifier(*path).as_string()
    with unlogged(connection.alias), connection.cursor() as cursor:
        cursor.execute(SESSION_QUERY, (name, name))
        names = [column.name for column in cursor.description]
        return Session(**dict(zip(names, cursor.fetchone(), strict=True)))


def _in_session(source: FromRows, database: str, path: tuple[str, ...], session: Session) -> FromRows:
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


def _server(connection: BaseDatabaseWrapper, session: Session) -> Server:
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
