"""Emptying the table of tickets, the fastest way that its foreign keys allow."""

from dataclasses import dataclass

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from tickets.database import TABLE

# Waiting longer would make everybody who comes later wait behind this lock.
_LOCK_TIMEOUT = "10s"

_REFERRING_TABLES = """
    SELECT DISTINCT conrelid::regclass::text
    FROM pg_constraint
    WHERE contype = 'f' AND confrelid = %s::regclass AND conrelid <> confrelid
    ORDER BY 1
"""


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """What was done.

    Attributes:
        rows: How many tickets are gone.
        referring_tables: The tables whose foreign keys made TRUNCATE impossible; none where it was used.
    """

    rows: int
    referring_tables: tuple[str, ...]


def delete_all(connection: BaseDatabaseWrapper) -> Deletion:
    """Delete every ticket in one transaction: by TRUNCATE, or by DELETE where other tables refer to this one.

    The sequence of the ids goes on, so that no new ticket ever answers to a deleted one's id.

    Raises:
        django.db.Error: The server refused, or another session held the table too long; nothing is deleted.
    """
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
        cursor.execute(_REFERRING_TABLES, [TABLE.as_string()])
        referring_tables = tuple(name for (name,) in cursor.fetchall())
        if referring_tables:
            cursor.execute(sql.SQL("DELETE FROM {}").format(TABLE))
            return Deletion(rows=cursor.rowcount, referring_tables=referring_tables)
        # TRUNCATE does not count; under its own lock a count stays true.
        cursor.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(TABLE))
        cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(TABLE))
        ((rows,),) = cursor.fetchall()
        cursor.execute(sql.SQL("TRUNCATE TABLE {} CONTINUE IDENTITY").format(TABLE))
        return Deletion(rows=rows, referring_tables=())
