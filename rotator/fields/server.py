"""The server, session and migrations behind one of Django's own connections."""

import pkgutil
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Final, TypeVar

from asgiref.sync import sync_to_async
from django.db import DatabaseError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from psycopg.errors import InsufficientPrivilege
from psycopg.pq import Conninfo
from psycopg.sql import Identifier

from rotator.exceptions import MissingPrivilegesError, RotatorError, ServerLostError
from rotator.fields.connections import lost_is_an_outage, naming_timeouts, unlogged
from rotator.postgres.connection import Server
from rotator.postgres.identity import SESSION_QUERY, SessionIdentity, check_same_session
from rotator.postgres.values import FromRows
from rotator.runner.aio import run_in_daemon_thread

T = TypeVar("T")
R = TypeVar("R")

_APP: Final = "rotator"
# Only libpq's parameters: Django's cursors and adapters are not for the rotator's connections, and an engine
# with a pool of connections adds options of its own.
_PARAMETERS: Final = frozenset(option.keyword.decode() for option in Conninfo.get_defaults())


def read_session(connection: BaseDatabaseWrapper, path: tuple[str, ...]) -> SessionIdentity:
    """Return the identity of the session and the table that one of Django's own connections uses."""
    name = Identifier(*path).as_string()
    alias = connection.alias
    with unlogged(alias), naming_timeouts(alias), connection.cursor() as cursor:
        cursor.execute(SESSION_QUERY, (name,))
        names = [column.name for column in cursor.description]
        return SessionIdentity(**dict(zip(names, cursor.fetchone(), strict=True)))


def check_session_of_thread(
    source: FromRows, database: str, path: tuple[str, ...], session: SessionIdentity
) -> FromRows:
    """Return a source of values that first checks that its thread's connection uses the same table.

    Each thread has its own Django connections, and a project may have set up only those of one thread.
    """

    def check() -> None:
        with lost_is_an_outage():
            found = read_session(connections[database], path)
        check_same_session(path, session, found)

    def checked(make: Callable[[Sequence[T]], Awaitable[R]]) -> Callable[[Sequence[T]], Awaitable[R]]:
        async def check_and_make(wanted: Sequence[T]) -> R:
            await sync_to_async(check)()
            return await make(wanted)

        return check_and_make

    return FromRows(checked(source.make), checked(source.make_at))


def check_migrations(connection: BaseDatabaseWrapper) -> None:
    """Refuse a database that lacks tables of the rotator."""
    try:
        recorder = MigrationRecorder(connection)
        # Without their times, which the driver cannot read in every session.
        with naming_timeouts(connection.alias):
            names = recorder.migration_qs.values_list("app", "name") if recorder.has_table() else ()
            applied = set(names)
    except DatabaseError as error:
        if isinstance(error.__cause__, InsufficientPrivilege):
            role = connection.settings_dict["USER"]
            raise MissingPrivilegesError([f"GRANT SELECT ON django_migrations TO {role};"]) from error
        # The other lines ask whether the server runs, or are about its next address.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ServerLostError(
            f"The database '{connection.alias}' cannot be reached: {reason}. Check its settings and that the "
            "server runs."
        ) from error
    # Not Django's loader, which imports the migrations of every app.
    module = import_module(MigrationLoader.migrations_module(_APP)[0] or _APP)
    needed = (found.name for found in pkgutil.iter_modules(module.__path__))
    if any((_APP, name) not in applied for name in needed):
        raise RotatorError(
            f"The rotator's tables are missing or out of date in the database '{connection.alias}'. Run "
            f"`manage.py migrate --database {connection.alias}` first."
        )


def server_of(connection: BaseDatabaseWrapper, search_path: str | None) -> Server:
    """Return the server that one of Django's connections uses, which may be a replica.

    The search path is that of Django's session on the primary.
    """

    def read_parameters() -> dict[str, Any]:
        # A new wrapper, which connects to nothing.
        return _parameters(connections.create_connection(connection.alias))

    return Server(
        parameters=_parameters(connection),
        role=connection.settings_dict.get("OPTIONS", {}).get("assume_role"),
        time_zone=connection.timezone_name,
        search_path=search_path,
        # It may request a password or a token from another server.
        read_parameters=partial(run_in_daemon_thread, read_parameters),
    )


def _parameters(connection: BaseDatabaseWrapper) -> dict[str, Any]:
    parameters: dict[str, Any] = connection.get_connection_params()
    return {name: value for name, value in parameters.items() if name in _PARAMETERS}
