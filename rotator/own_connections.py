"""Django's own connections of this thread, which generators, receivers and row reads use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from rotator.errors import ServerLostError
from rotator.postgres.failures import connection_lost


@contextmanager
def lost_is_an_outage() -> Iterator[None]:
    """Turn the loss of one of Django's connections into an outage, and close what is dead.

    Raises:
        ServerLostError: A connection of this thread is gone.
    """
    try:
        yield
    except Error as error:
        if lost := lost_connection(error):
            raise lost from None
        raise


def lost_connection(error: BaseException) -> ServerLostError | None:
    """Return what a lost connection of Django's means; None for any other error.

    To be called in the thread that had the error. It closes this thread's dead connections.
    """
    if not isinstance(error, Error):
        return None
    cause = error.__cause__ or error
    if isinstance(cause, psycopg.Error):
        lost = connection_lost(cause)
    else:
        lost = ServerLostError("Django's own connection to the database was lost.")
        if all(each.connection is None or each.is_usable() for each in _opened()):
            return None
    if lost is not None:
        for each in _opened():
            each.close_if_unusable_or_obsolete()
    return lost


def _opened() -> Sequence[BaseDatabaseWrapper]:
    return connections.all(initialized_only=True)
