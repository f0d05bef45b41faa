"""Translates the driver's errors into the rotator's own, without values of rows."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout

from rotator.exceptions import (
    RangeRejectedError,
    RangeTooSlowError,
    RotatorError,
    RowsLockedError,
    ServerLostError,
    ServerRefusedError,
    SupersededError,
)

# Statements raise these by casting the text to a number or a boolean, since SQL has no RAISE.
SUPERSEDED: Final = "this process does not own the rotation any more"
RANGE_GREW: Final = "the range holds more rows than were planned"
TOO_LONG: Final = "the transaction of the range takes too long"
SUPPRESSED: Final = "rows were not updated, perhaps because of a trigger"

# The constraints of rotator.models that allow one checkpoint for each range.
_CHECKPOINTED: Final = ("rotator_range_begins_once", "rotator_range_ends_once")

ANSWER_SECONDS: Final = 30.0

_CONNECTION_LOST: Final = "The connection to the server was lost"

_LOST_CLASSES: Final = ("08", "57P")
_LOST: Final = (errors.TooManyConnections, errors.IdleInTransactionSessionTimeout, errors.ProtocolViolation)
# What is wrong, where the server's message cannot be shown, and what to do.
_PERMANENT: Final[dict[type[psycopg.Error], tuple[str, str]]] = {
    errors.InsufficientPrivilege: ("this role lacks a privilege", "Grant what docs/operating.md lists"),
    errors.DiskFull: ("the server's disk is full", "Free some space"),
    errors.UndefinedTable: ("a table does not exist", "Restore it, or run `manage.py migrate`"),
    errors.UndefinedColumn: ("a column does not exist", "Restore it, or run `manage.py migrate`"),
    errors.UndefinedFunction: (
        "a function does not exist",
        "Restore it, or upgrade a server older than PostgreSQL 15",
    ),
}
# Functions of the server whose messages contain only names, or the fault of a regular expression.
_NAMES_ALONE: Final = (
    "varchar",
    "bpchar",
    "ParseFuncOrColumn",
    "parserOpenTable",
    "errorMissingColumn",
    "op_error",
    "find_option",
    "GetConfigOptionByName",
    "aclcheck_error",
    "ProcessInterrupts",
    "RE_compile_and_cache",
)
# The driver's error where a lost connection or a cancelled task leaves a pipeline with results.
_PIPELINE_LEFT: Final = "cannot exit pipeline mode"
_RETRYABLE: Final = (
    errors.DeadlockDetected,
    errors.SerializationFailure,
    errors.UniqueViolation,
    errors.OutOfMemory,
)


class RangeGrewError(RotatorError):
    """A range holds more rows than there are new values; it was rolled back."""


@asynccontextmanager
async def translate_errors(
    connection: psycopg.AsyncConnection | None = None, *, seconds: float | None = ANSWER_SECONDS
) -> AsyncIterator[None]:
    """Translate the driver's errors, and a timeout, into the rotator's own errors.

    Args:
        connection: The connection, where it is open already.
        seconds: The longest time for the block; None for no limit. A proxy can acknowledge every packet of a
            lost server, so only a clock of this process notices the loss.

    Raises:
        ServerLostError: The connection was lost, could not be opened, or timed out; or a range was committed
            without a reply to this process, which must read the checkpoints again.
        RowsLockedError: A lock was not acquired in time.
        SupersededError: The fence failed.
        RangeTooSlowError: A statement exceeded its time limit.
        RangeGrewError: There were more rows than values.
        ServerRefusedError: A retry does not help.
        RangeRejectedError: The server reported another error.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ServerLostError(f"The server has not answered for {seconds or 0:.0f} s.") from None
    except (psycopg.Error, PoolTimeout) as error:
        # Not chained: a traceback would print the driver's message, which can contain values.
        raise translate(error, connection) from None


def translate(error: Exception, connection: psycopg.AsyncConnection | None = None) -> RotatorError:
    """Return the rotator's own error for an error of the driver."""
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return read_only()
    if _is_lost(error, connection):
        return ServerLostError(_lost_message(error))
    if not isinstance(error, psycopg.Error):
        raise error
    message = error.diag.message_primary or ""
    if SUPERSEDED in message:
        return superseded()
    if TOO_LONG in message:
        return RangeTooSlowError(TOO_LONG)
    if RANGE_GREW in message:
        return RangeGrewError(RANGE_GREW)
    return _permanent_error(error) or _rejected_range(error)


def _permanent_error(error: psycopg.Error) -> ServerRefusedError | None:
    # An error in a trigger of the application is one of the range.
    if not _function(error):
        for permanent, (wrong, advice) in _PERMANENT.items():
            if isinstance(error, permanent):
                reason = error.diag.message_primary if _has_names_alone(error) else wrong
                return ServerRefusedError(
                    f"Cannot rotate: {reason}. {advice}, then run the same command again."
                )
    return None


def _rejected_range(error: psycopg.Error) -> RotatorError:
    match error:
        case errors.UniqueViolation() if error.diag.constraint_name in _CHECKPOINTED:
            # The halves of such a range would not violate the constraints, and be written twice.
            return ServerLostError("The range was already committed; the checkpoints must be read again.")
        case errors.LockNotAvailable():
            return RowsLockedError("Another session has locked rows of the range.")
        case errors.QueryCanceled():
            return RangeTooSlowError(condition(error))
        case _:
            return RangeRejectedError(condition(error), retryable=isinstance(error, _RETRYABLE))


def _function(error: psycopg.Error) -> str:
    """Return the name of the function that raised the error; empty where it was our own statement.

    The rest of the context can contain statements with values.
    """
    found = re.search(r"PL/pgSQL function ([^\s(]+\([^)]*\))", error.diag.context or "")
    return found[1] if found else ""


def connection_lost(error: psycopg.Error) -> ServerLostError | None:
    """Return the error for the loss of a connection that is not the rotator's; None for any other error."""
    if isinstance(error, psycopg.InterfaceError) or _is_lost(error, None):
        return ServerLostError(_lost_message(error))
    return None


def read_only(*, is_standby: bool | None = None) -> ServerLostError:
    """Return the error for a server that is read-only, permanently or until a failover has finished.

    A primary is read-only by a setting. ``is_standby`` is None where it is unknown which of them it is.
    """
    reasons = {
        None: "the server is read-only. Connect to the primary, or turn default_transaction_read_only off",
        True: "the server is read-only. Connect to the primary",
        False: "the session is read-only, because default_transaction_read_only is on for the connection, "
        "the database or the server. Turn it off",
    }
    return ServerLostError(f"Cannot rotate: {reasons[is_standby]}, then run the same command again.")


def superseded() -> SupersededError:
    """Return the error for a process whose rotation another process has taken over."""
    return SupersededError(
        "Another process has taken this rotation over; this one stopped and has written nothing since."
    )


def condition(error: psycopg.Error) -> str:
    """Return the server's name for an error, e.g. ``check_violation (23514) of token_not_empty``.

    The server's message is added where it contains only names, and the name of a trigger's function.
    """
    words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    name = words if error.sqlstate is None else f"{words} ({error.sqlstate})"
    if error.diag.constraint_name:
        name = f"{name} of {error.diag.constraint_name}"
    if _has_names_alone(error):
        name = f"{name}: {error.diag.message_primary}"
    function = _function(error)
    return f"{name}, in the function {function}" if function else name


def _has_names_alone(error: psycopg.Error) -> bool:
    """Return whether the server's message can be shown: it has no values of rows."""
    return error.diag.source_function in _NAMES_ALONE


def _is_lost(error: Exception, connection: psycopg.AsyncConnection | None) -> bool:
    if isinstance(error, (PoolTimeout, *_LOST)) or (connection is not None and connection.closed):
        return True
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(_LOST_CLASSES) and not isinstance(error, errors.QueryCanceled)


def _lost_message(error: Exception) -> str:
    if str(error).startswith(_PIPELINE_LEFT):
        # It follows from another error, and replaces it.
        cause = error.__context__
        if not isinstance(cause, psycopg.Error):
            return f"{_CONNECTION_LOST}."
        if _is_lost(cause, None):
            return _lost_message(cause)
        return f"The connection to the server was closed after an error: {condition(cause)}."
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        return f"{_CONNECTION_LOST}: {condition(error)}."
    # libpq's messages contain hosts and system errors, but no values of rows.
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"The server cannot be reached: {first_line.rstrip('.')}."
