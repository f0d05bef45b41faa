"""Creates and deletes tickets by the million."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from django.core.management import CommandError
from django.db import Error, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from tickets.models import Ticket

META = Ticket._meta
TABLE = sql.Identifier(META.db_table)
# The binary format needs no parsing on the server, but each column's type must be named.
_COLUMN_TYPES = {"title": "varchar", "created_at": "timestamptz", "token": "uuid"}
_COLUMNS = {field.name: sql.Identifier(field.column) for field in META.concrete_fields if field.column}
_COPY = sql.SQL("COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)").format(
    table=TABLE,
    columns=sql.SQL(", ").join(_COLUMNS[name] for name in _COLUMN_TYPES),
)
# A longer wait for the lock would block every later session.
_LOCK_TIMEOUT = "10s"
_REFERRING_TABLES = """
    SELECT DISTINCT conrelid::regclass::text
    FROM pg_constraint
    WHERE contype = 'f' AND confrelid = %s::regclass AND conrelid <> confrelid
    ORDER BY 1
"""


def postgresql(alias: str) -> BaseDatabaseWrapper:
    """Return Django's connection to the database with this alias.

    Raises:
        CommandError: The database is not PostgreSQL.
    """
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise CommandError(
            f"The database '{alias}' is {connection.display_name}; this command needs PostgreSQL."
        )
    return connection


def create(connection: BaseDatabaseWrapper, count: int, batch_rows: int) -> Iterator[int]:
    """Create tickets by COPY, one transaction for each batch.

    The values come from the model's defaults and the ids from the table's sequence. Rows are streamed, so
    memory does not grow with ``batch_rows``.

    Args:
        connection: Django's connection, outside of any transaction.
        count: The number of tickets.
        batch_rows: The maximum rows in a transaction.

    Yields:
        The rows of each batch, after its commit.

    Raises:
        django.db.Error: The server raised an error; earlier batches are committed.
    """
    for first in range(1, count + 1, batch_rows):
        numbers = range(first, min(first + batch_rows, count + 1))
        with transaction.atomic(using=connection.alias, durable=True):
            _copy(connection, numbers)
        yield len(numbers)


def _copy(connection: BaseDatabaseWrapper, numbers: range) -> None:
    created_at = META.get_field("created_at").get_default
    token = META.get_field("token").get_default
    # Django does not wrap the errors of copy() by itself.
    with connection.wrap_database_errors, connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(list(_COLUMN_TYPES.values()))
        for number in numbers:
            copy.write_row((f"Ticket {number}", created_at(), token()))


def vacuum_and_analyze(connection: BaseDatabaseWrapper) -> None:
    """Give the planner statistics, and index-only scans a visibility map."""
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("VACUUM (ANALYZE) {}").format(TABLE))


def delete_all(connection: BaseDatabaseWrapper) -> tuple[int, tuple[str, ...]]:
    """Delete every ticket in one transaction: by TRUNCATE, or by DELETE where other tables refer to them.

    The sequence of the ids continues, so no new ticket gets the id of a deleted one.

    Returns:
        The number of deleted tickets, and the tables whose foreign keys prevented TRUNCATE.

    Raises:
        django.db.Error: The server raised an error, or the lock was not free in time; nothing is deleted.
    """
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
        cursor.execute(_REFERRING_TABLES, [TABLE.as_string()])
        referring_tables = tuple(name for (name,) in cursor.fetchall())
        if referring_tables:
            cursor.execute(sql.SQL("DELETE FROM {}").format(TABLE))
            return cursor.rowcount, referring_tables
        # TRUNCATE does not count the rows; under its own lock the count is exact.
        cursor.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(TABLE))
        cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(TABLE))
        ((rows,),) = cursor.fetchall()
        cursor.execute(sql.SQL("TRUNCATE TABLE {} CONTINUE IDENTITY").format(TABLE))
        return rows, ()


@contextmanager
def errors_in_one_sentence(alias: str) -> Iterator[None]:
    """Turn errors of the database with this alias into one sentence that says what to do.

    Raises:
        CommandError: Django raised a database error.
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
            return "Another session is using the table of tickets. Try again when it has finished."
        case psycopg.errors.ForeignKeyViolation():
            return f"Rows of the table {error.diag.table_name} refer to tickets. Delete those first."
        case psycopg.Error() if error.diag.message_primary:
            # Never the detail: it may hold the row's values.
            return f"PostgreSQL refused: {error.diag.message_primary}."
    reason = " ".join(str(error).split())
    return f"The database '{alias}' cannot be reached; check its settings and that it runs: {reason}"
