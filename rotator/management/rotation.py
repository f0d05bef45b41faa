"""The rotation that a command's ID names."""

from django.core.management import CommandError
from django.db import Error

from rotator.models import Ledger, Rotation


def find_rotation(number: int, database: str) -> Rotation:
    """Return a rotation of a database.

    Raises:
        CommandError: There is none with this id, or the database cannot be read.
    """
    try:
        rotation = Rotation.objects.using(database).filter(pk=number).first()
    except Error as error:
        raise unreadable(database, error) from error
    if rotation is None:
        raise CommandError(f"There is no rotation {number} in the database '{database}'.")
    return rotation


def find_ledger(rotation: Rotation) -> Ledger | None:
    """Return the ledger of a rotation, forgotten or not; None where it never had one."""
    return getattr(rotation, "ledger", None)


def unreadable(database: str, error: Error) -> CommandError:
    """Return the error for a database whose rotations cannot be read."""
    return CommandError(
        f"Cannot read the rotations of the database '{database}': {first_line(error)} "
        "Check that the server runs and that the database is migrated."
    )


def first_line(error: Error) -> str:
    """Return the first line of a database's error."""
    return " ".join(str(error).split("\n", 1)[0].split())
