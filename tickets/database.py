"""What the commands share: the ``--database`` option, the table's name, and errors a person can act on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import psycopg
from django.core.management import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from tickets.models import Ticket

META = Ticket._meta
TABLE = sql.Identifier(META.db_table)


class DatabaseOptions(TypedDict):
    """The options that both commands take."""

    database: str
    verbosity: int


def add_database_option(parser: CommandParser) -> None:
    """Give a command its ``--database`` option."""
    parser.add_argument(
        "--database",
        default=DEFAULT_DB_ALIAS,
        choices=tuple(connections),
        help="The alias of the database that holds the tickets (default: %(default)s).",
    )


def postgresql(alias: str) -> BaseDatabaseWrapper:
    """Django's own connection to the database with this alias.

    Raises:
        CommandError: It is not a PostgreSQL.
    """
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise CommandError(
            f"The database '{alias}' is {connection.display_name}; this command needs PostgreSQL."
        )
    return connection


@contextmanager
def errors_in_one_sentence(alias: str) -> Iterator[None]:
    """Turn errors of the database with this alias into one sentence that says what to do.

    Raises:
        CommandError: Where Django raised a database error.
    """
    try:
        yield
    except Error as error:
        raise CommandError(_sentence(error.__cause__ or error, alias)) from error


def _sentence(error: BaseException, alias: str) -> str:
    match error:
        case psycopg.errors.UndefinedTable() | psycopg.errors.UndefinedColumn():
            return (
                f"The table of tickets in the database '{alias}' is missing or out of date: "
                f"run `manage.py migrate --database {alias}` first."
            )
        case psycopg.errors.LockNotAvailable():
            return "Somebody else is using the table of tickets: try again when they have finished."
        case psycopg.errors.ForeignKeyViolation():
            return f"Rows of the table {error.diag.table_name} refer to tickets: delete those first."
        case psycopg.Error() if error.diag.message_primary:
            # Never the detail: it may hold the row's values.
            return f"PostgreSQL refused: {error.diag.message_primary}."
    reason = " ".join(str(error).split())
    return f"The database '{alias}' cannot be reached; check its settings and that it runs: {reason}"
