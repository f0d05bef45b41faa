"""Making tickets by the million: COPY, one transaction a batch."""

from collections.abc import Iterator

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from tickets.database import META, TABLE

# The binary format leaves the server nothing to parse, but needs each column's type to be named.
_COLUMN_TYPES = {"title": "varchar", "created_at": "timestamptz", "token": "uuid"}
_COLUMNS = {field.name: sql.Identifier(field.column) for field in META.concrete_fields if field.column}

_COPY = sql.SQL("COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)").format(
    table=TABLE,
    columns=sql.SQL(", ").join(_COLUMNS[name] for name in _COLUMN_TYPES),
)


def create(connection: BaseDatabaseWrapper, count: int, batch_rows: int) -> Iterator[int]:
    """Make tickets, as many as the caller iterates for.

    The ids come from the table's own sequence, the other values from the model's own defaults. Rows are
    streamed, so memory does not grow with ``batch_rows``.

    Args:
        connection: Django's connection, outside of any transaction.
        count: How many tickets to make.
        batch_rows: How many rows a transaction commits at the most.

    Yields:
        The rows of each batch, after its commit.

    Raises:
        django.db.Error: The server refused or went away; earlier batches are committed.
    """
    for first in range(1, count + 1, batch_rows):
        numbers = range(first, min(first + batch_rows, count + 1))
        with transaction.atomic(using=connection.alias, durable=True):
            _copy(connection, numbers)
        yield len(numbers)


def _copy(connection: BaseDatabaseWrapper, numbers: range) -> None:
    created_at = META.get_field("created_at").get_default
    token = META.get_field("token").get_default
    # Django translates the errors of execute() by itself, but knows nothing of copy().
    with connection.wrap_database_errors, connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(list(_COLUMN_TYPES.values()))
        for number in numbers:
            copy.write_row((f"Ticket {number}", created_at(), token()))


def tidy(connection: BaseDatabaseWrapper) -> None:
    """Tell the server about the new rows: statistics for plans, the visibility map for index-only scans."""
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("VACUUM (ANALYZE) {}").format(TABLE))
