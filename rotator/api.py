"""The Python interface: ``await rotate(Target("shop.Order.api_key"))``.

``rotate`` runs in the caller's event loop. ``rotate_sync`` runs in its own event loop, for scripts and data
migrations (with ``atomic = False``: a rotation commits as it goes, so it cannot be part of a transaction).

Both resume an unfinished rotation of the same target, so the same call can be repeated after any failure.
After a completed rotation of the same rows they raise an error, unless they are called with ``restart=True``.
Neither changes the process's signal handlers. Cancelling the task that awaits ``rotate`` rolls back the
ranges in flight, and the same call resumes the rotation.
"""

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypeVar, Unpack

from asgiref.sync import sync_to_async
from django.apps import apps
from django.db import connections, router
from django.db.backends.base.base import BaseDatabaseWrapper

from rotator.apps import default_target, hides_keys, throttle_paths
from rotator.events import Findings, LeakedValuesFound, Observer, OnCommit, RotationStopped, Verified
from rotator.exceptions import OptionError, RotatorError, TargetError
from rotator.fields.connections import (
    borrowed,
    borrowed_in_loop,
    check_no_running_loop,
    check_not_patched,
    check_postgresql,
    close_idle,
    is_in_transaction,
    run_in_new_loop,
)
from rotator.fields.leaked import read_leaked
from rotator.fields.receivers import commit_callback
from rotator.fields.server import check_migrations, check_session_of_thread, read_session, server_of
from rotator.fields.target import check_stored_form, find_fields, resolve
from rotator.fields.throttles import find_sources
from rotator.models import Rotation
from rotator.options import RotateOptions, RunOptions, Selection, check_kind, check_kinds, read_strings
from rotator.postgres.connection import Server, connected
from rotator.postgres.fence import Lease
from rotator.postgres.identity import TargetIdentity
from rotator.postgres.leaked import LeakedValues
from rotator.postgres.values import FromRows
from rotator.progress.lines import LogObserver
from rotator.progress.text import stopped_by
from rotator.runner import proof
from rotator.runner.context import AskForHelp, RunTarget, ShouldStop
from rotator.runner.leaked_rows import count_leaked
from rotator.runner.preflight import Earlier, dry_run, find_earlier
from rotator.runner.runner import Run

__all__ = ["RotateOptions", "RotationUnfinishedError", "Target", "rotate", "rotate_sync"]

T = TypeVar("T")

# The pool logs lost connections. The run reports them itself, so a process without logging need not.
logging.getLogger("psycopg").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Target:
    """One or several fields of one table, with the choice of rows and values.

    Attributes:
        fields: ``app.Model.field``, or several of them.
        database: Django's alias of the database; None for the one that the project's routers write the model
            to.
        filters: Django lookups; only rows that match all of them are rotated. They are written as on the
            command line: ``created_at__lt=2026-11-01T00:00:00Z``.
        excludes: Django lookups; rows that match one of them are skipped.
        generator: The dotted path of a callable that makes the values; empty for the fields' own defaults. It
            takes no argument, or the row's instance, and returns a value, or a mapping of field names to
            values.
        include_null: Whether rows whose value is NULL are rotated too.
        include_blank: Whether rows whose value is the empty string are rotated too.
        ignore_derived: The names of fields that derive nothing from the rotated ones, although it looks so.
        leaked: The path of a file with leaked values; only rows whose present value is in it are rotated. It
            is written as on the command line. Empty for all rows.
        leaked_column: The name of the column with the values, if that file is a CSV file.
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
    leaked: str = ""
    leaked_column: str = ""


class RotationUnfinishedError(RotatorError):
    """The run ended before the rotation did; the same call resumes the rotation.

    Attributes:
        stopped: The account of the run.
    """

    def __init__(self, stopped: RotationStopped) -> None:
        reason = stopped_by(stopped.stop_reason, stopped.cancelled_by)
        super().__init__(stopped.error or f"The run was {reason}.")
        self.stopped = stopped


async def rotate(
    target: Target, *, observer: Observer | None = None, **options: Unpack[RotateOptions]
) -> RotationStopped:
    """Give every row of a target a new value, or resume an earlier run.

    Args:
        target: The target.
        observer: Is called in the event loop with each event of :mod:`rotator.events`; must not block.
            By default, events are logged by the logger ``rotator``.
        **options: See :class:`RotateOptions`.

    Returns:
        The account of the run that completed the rotation.

    Raises:
        RotationUnfinishedError: The run ended before the rotation did; the text says why.
        OptionError: A completed rotation had the same fields, rows and values, and ``restart`` is false.
        RotatorError: The rotation cannot begin; the text says why. Nothing was changed.
    """
    observer = _checked_observer(observer)
    # Django's connections must not be used in the loop's thread.
    prepared = await sync_to_async(_prepare_call)(target, options)
    return _completed(await prepared.rotate_in_this_loop(observer))


def rotate_sync(
    target: Target, *, observer: Observer | None = None, **options: Unpack[RotateOptions]
) -> RotationStopped:
    """Do the same as :func:`rotate`, in its own event loop, for scripts and data migrations.

    Leaves Django's connections of this thread as they are. Generators and receivers use them, in their own
    thread. In a thread with a running event loop it raises an error: use :func:`rotate` there.
    """
    observer = _checked_observer(observer)
    prepared = replace(_prepare_call(target, options), keeps_connections=True)
    return _completed(prepared.rotate(observer))


def _checked_observer(observer: Observer | None) -> Observer:
    if observer is not None and not callable(observer):
        raise OptionError(f"observer must be callable, not {type(observer).__name__}.")
    return observer or LogObserver(hides_keys=hides_keys())


def _prepare_call(target: Target, options: RotateOptions) -> "Prepared":
    """Prepare with the caller's connections, and leave them as they were."""
    if not isinstance(target, Target):
        kind = type(target).__name__
        raise TargetError(f'The target must be a Target, not {kind}: use Target("app.Model.field").')
    if unknown := sorted(options.keys() - RotateOptions.__annotations__.keys()):
        raise OptionError(f"There is no option {', '.join(unknown)}. See RotateOptions for all of them.")
    checked = RunOptions.checked(**options, listens_to_signals=False)
    chosen = {each.name: getattr(target, each.name) for each in fields(Selection)}
    lists = {name: read_strings(name, chosen[name]) for name in ("filters", "excludes", "ignore_derived")}
    selection = Selection(**chosen | lists)
    check_kinds(selection)
    if target.database is not None:
        check_kind("database", target.database, str)
    labels = read_strings("fields", [target.fields] if isinstance(target.fields, str) else target.fields)
    check_no_running_loop()
    with borrowed():
        return prepare(labels, target.database, checked, selection).with_leaked_values()


def _completed(stopped: RotationStopped) -> RotationStopped:
    if stopped.status != "completed":
        raise RotationUnfinishedError(stopped)
    return stopped


def prepare(
    labels: Sequence[str],
    database: str | None,
    options: RunOptions,
    selection: Selection | None = None,
    *,
    is_begun: bool = False,
) -> "Prepared":
    """Check everything that Django's side can check, before anything is changed.

    Without labels the target is that of the setting; without a database, the one that the project's routers
    write the model to. If the rotation has begun, the rotator's tables exist and are not checked.
    """
    check_no_running_loop()
    check_not_patched()
    labels = labels or default_target()
    if not labels:
        raise TargetError(
            "No target was given. Name it as app.Model.field, or set ROTATOR = {'DEFAULT_TARGET': ...} in "
            "the settings."
        )
    connection = _connection(labels, database)
    target = resolve(labels, connection.alias, selection or Selection())
    if not is_begun:
        check_migrations(connection)
    if options.prove:
        check_stored_form(find_fields(labels), connection.alias)
    session = read_session(connection, target.path)
    source, path = target.source, target.path
    if isinstance(source, FromRows):
        source = check_session_of_thread(source, connection.alias, path, session)
    if session.table_schema is not None:
        # The search path of the rotator's own sessions may be another one.
        path = (session.table_schema, path[-1])
    server = server_of(connection, session.search_path)
    throttles = find_sources(options.lag_of, throttle_paths(), server)
    target = replace(target, source=source, path=path, session=session, throttles=throttles)
    return Prepared(target=target, options=options, server=server)


def prepare_again(stored: Rotation, database: str, *, is_begun: bool = False) -> "Prepared":
    """Prepare a stored rotation, with the options of its latest run."""
    return prepare(
        stored.target.split(),
        database,
        RunOptions.from_json(stored.options),
        Selection.from_json(stored.selection),
        is_begun=is_begun,
    )


def _connection(labels: Sequence[str], database: str | None) -> BaseDatabaseWrapper:
    """Return Django's connection to the database of a target."""
    if database is None:
        database = router.db_for_write(find_fields(labels)[0].model)
    if database not in connections:
        raise OptionError(f"There is no database '{database}': the project has {', '.join(connections)}.")
    connection = connections[database]
    check_postgresql(connection)
    if is_in_transaction(connection):
        raise OptionError(
            "A rotation cannot run inside a transaction, because it would wait for the transaction's locks. "
            "Call it outside atomic(), and with autocommit on."
        )
    return connection


def drop_ledger(database: str, rotation: int, *, only_guard: bool) -> bool:
    """Drop the ledger of a rotation with its guard, or only the guard; return whether there was one."""
    connection = connections[database]
    server = server_of(connection, read_session(connection, ("rotator_rotation",)).search_path)

    async def drop() -> bool:
        async with connected(server) as own:
            return await proof.drop_ledger(own, rotation, only_guard=only_guard)

    return run_in_new_loop(drop)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A rotation that Django's side has checked; each method raises RotatorError if it cannot go ahead.

    Attributes:
        findings: The findings that the user has seen already, to be stored; None where there are none.
        keeps_connections: Whether Django's connections of this thread stay open, because the caller uses
            them. By default those without a transaction are closed, so that they are not idle during the run.
    """

    target: RunTarget
    options: RunOptions
    server: Server
    findings: Findings | None = None
    keeps_connections: bool = False

    def _run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self.keeps_connections:
            with borrowed():
                return run_in_new_loop(main)
        close_idle()
        return run_in_new_loop(main)

    def _new_run(
        self,
        observer: Observer,
        ask_for_help: AskForHelp | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Run:
        on_commit = self._on_commit(observer)
        return Run(self.server, self.target, self.options, observer, on_commit, ask_for_help, should_stop)

    def with_leaked_values(self) -> "Prepared":
        """Read the leaked values that the selection names, and return the rotation of only their rows."""
        selection = self.target.selection
        if not selection.leaked:
            if selection.leaked_column:
                raise OptionError("--leaked-column names a column of the file of --leaked. Use both.")
            return self
        if self.options.prove:
            raise OptionError(
                "--leaked rotates some rows, and --prove is about all of them. Rotate with --leaked first, "
                "then all rows with --prove."
            )
        values = self._read_leaked(selection.leaked, selection.leaked_column)
        # The digests are in temporary tables, which one connection uses.
        options = replace(self.options, concurrency=1, sample=False)
        return replace(self, target=replace(self.target, leaked=values), options=options)

    def _read_leaked(self, path: str, column: str) -> LeakedValues:
        return read_leaked(path, column, find_fields(self.target.label.split()), self.target.database)

    def count_leaked(self, path: str, column: str) -> LeakedValuesFound:
        """Search the table for the leaked values of a file, and return which of them rows have now."""
        values = self._read_leaked(path, column)
        return self._run(lambda: count_leaked(self.server, self.target, values))

    def earlier(self, observer: Observer) -> Earlier:
        """Return the earlier rotations of this target that matter to a new run."""
        return self._run(lambda: find_earlier(self.server, self.target, self.options, observer))

    def examine(self, observer: Observer) -> Findings:
        """Return the findings of the preflight; the rows of its sample are rolled back."""
        return self._run(lambda: dry_run(self.server, self.target, self.options, observer))

    def begin(self, observer: Observer) -> int:
        """Begin or resume the rotation, queue it for Celery workers, and return its id."""
        return self._run(lambda: self._new_run(observer).begin(self.findings))

    def reindex(self, observer: Observer, rotation: int) -> tuple[str, ...]:
        """Rebuild the indexes after a completed rotation, and return the statements for the rest."""
        return self._run(lambda: self._new_run(observer).reindex(rotation))

    def verify(
        self, observer: Observer, rotation: int, *, repairs: bool, should_stop: ShouldStop | None = None
    ) -> Verified:
        """Verify a rotation of this target, and give survivors new values if ``repairs``."""

        async def work() -> Verified:
            verifying = self._new_run(observer, should_stop=should_stop)
            async with borrowed_in_loop():
                return await verifying.verify(rotation, repairs=repairs)

        return self._run(work)

    def rotate(
        self,
        observer: Observer,
        ask_for_help: AskForHelp | None = None,
        should_stop: ShouldStop | None = None,
    ) -> RotationStopped:
        """Run until the rotation is completed, or signals or ``should_stop`` stop the run.

        With ``ask_for_help``, Celery workers rewrite the ranges instead of this process.
        """
        return self._run(lambda: self.rotate_in_this_loop(observer, ask_for_help, should_stop))

    async def rotate_in_this_loop(
        self,
        observer: Observer,
        ask_for_help: AskForHelp | None = None,
        should_stop: ShouldStop | None = None,
    ) -> RotationStopped:
        """Do the same in the running event loop."""
        run = self._new_run(observer, ask_for_help, should_stop)
        if not self.options.preflight:
            for warning in self.target.warnings:
                logging.getLogger(__name__).warning("Rotating %s: %s.", self.target.label, warning)
        async with borrowed_in_loop():
            return await run.rotate(self.findings)

    def help(self, lease: Lease, number: int, should_stop: ShouldStop, identity: Mapping[str, Any]) -> bool:
        """Rewrite spans of a distributed rotation, and return whether another Celery task is to continue.

        ``number`` is the id of this task's row, and ``identity`` that of the target when the rotation began.
        """
        from rotator.runner.worker import Helper  # noqa: PLC0415 - only Celery workers need it

        async def work() -> bool:
            helper = Helper(
                self.server, self.target, self.options, lease, number, self._on_commit(), should_stop
            )
            async with borrowed_in_loop():
                return await helper.work(TargetIdentity.from_json(identity))

        return self._run(work)

    def _on_commit(self, observer: Observer | None = None) -> OnCommit | None:
        return commit_callback(apps.get_model(self.target.model), self.target.database, observer)
