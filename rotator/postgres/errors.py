"""Translates the driver's errors into the rotator's own, without values of rows."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import psycopg
from psycopg import AsyncConnection, errors
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

# These are raised by casts of these words inside the statements, since SQL has no RAISE.
SUPERSEDED: Final = "this process does not own the rotation any more"
RANGE_GREW: Final = "the range holds more rows than were planned"
TOO_LONG: Final = "the transaction of the range takes too long"
SUPPRESSED: Final = "rows stayed as they were, perhaps because of a trigger"

# The constraints of rotator.models that no two checkpoints of a rotation get past.
_CHECKPOINTED: Final = ("rotator_range_begins_once", "rotator_range_ends_once")

ANSWER_SECONDS: Final = 30.0

_LOST_CLASSES: Final = ("08", "57P")
_LOST: Final = (errors.TooManyConnections, errors.IdleInTransactionSessionTimeout, errors.ProtocolViolation)
_REFUSED: Final[dict[type[psycopg.Error], str]] = {
    errors.InsufficientPrivilege: "this role lacks a privilege: grant what docs/operating.md lists",
    errors.DiskFull: "its disk is full: make room",
    errors.UndefinedTable: "a table is missing: run `manage.py migrate`",
    errors.UndefinedColumn: "a column is missing: run `manage.py migrate`",
    errors.UndefinedFunction: "a function is missing: PostgreSQL 15 or later is needed",
}
# Functions of the server's own source that report what does not exist, is not permitted, or is too long for
# its type, by names alone.
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
)
_PASSING: Final = (
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
    """Turn the driver's errors, and the server's silence, into the rotator's own errors.

    Args:
        connection: What is talked over, where there is one already.
        seconds: How long the block may take. A peer behind a proxy can be gone and still acknowledge
            every packet, so only a clock of our own notices. None for as long as it takes.

    Raises:
        ServerLostError: The connection is gone, was never made, or is silent; or more was committed than
            this process was told, and the checkpoints have to be read anew.
        RowsLockedError: A lock was not to be had in time.
        SupersededError: The fence holds.
        RangeTooSlowError: A statement took longer than it may.
        RangeGrewError: There were more rows than values.
        ServerRefusedError: Trying again does not help.
        RangeRejectedError: Anything else that the server reported.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ServerLostError(f"The server has not answered for {seconds or 0:.0f} s.") from None
    except (psycopg.Error, PoolTimeout) as error:
        # Not chained: the driver's message can quote values, and a traceback would print it.
        raise translate(error, connection) from None


def translate(error: Exception, connection: psycopg.AsyncConnection | None = None) -> RotatorError:
    """Return what an error of the driver means."""
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return read_only()
    if _is_lost(error, connection):
        return ServerLostError(_lost_message(error))
    if not isinstance(error, psycopg.Error):
        raise error
    # What a trigger of the application lacks is nothing that our own statements lack.
    for_good = None if _function(error) else permanent_refusal(type(error))
    return _own_error(error) or for_good or _rejected_range(error)


def _own_error(error: psycopg.Error) -> RotatorError | None:
    said = error.diag.message_primary or ""
    if SUPERSEDED in said:
        return superseded()
    if TOO_LONG in said:
        return RangeTooSlowError(TOO_LONG)
    return RangeGrewError(RANGE_GREW) if RANGE_GREW in said else None


def _function(error: psycopg.Error) -> str:
    """Return the name of the function that met the error; empty where it was our own statement.

    Of the context it takes the name alone: the rest can quote statements, and these values.
    """
    found = re.search(r"PL/pgSQL function ([^\s(]+\([^)]*\))", error.diag.context or "")
    return found[1] if found else ""


def permanent_refusal(condition: type[psycopg.Error]) -> ServerRefusedError | None:
    """Return what to say of an error that trying again does not mend; None for any other."""
    for refused, advice in _REFUSED.items():
        if issubclass(condition, refused):
            return ServerRefusedError(f"The server refuses, {advice}; then the same command goes on.")
    return None


def connection_lost(error: psycopg.Error) -> ServerLostError | None:
    """Return what an error means on a connection that is not the rotator's, if it is the loss of it."""
    if isinstance(error, psycopg.InterfaceError) or _is_lost(error, None):
        return ServerLostError(_lost_message(error))
    return None


def read_only() -> ServerLostError:
    """Return the error of a server that is read-only: permanently, or until a failover is over."""
    return ServerLostError(
        "The server refuses, it is read-only: connect to the primary; then the same command goes on."
    )


def _rejected_range(error: psycopg.Error) -> RotatorError:
    match error:
        case errors.UniqueViolation() if error.diag.constraint_name in _CHECKPOINTED:
            # Halves of such a range would get past the constraints, and be written twice.
            return ServerLostError("The checkpoints hold more than this process knows of.")
        case errors.LockNotAvailable():
            return RowsLockedError("Somebody else holds rows of the range.")
        case errors.QueryCanceled():
            return RangeTooSlowError(condition(error))
        case _:
            return RangeRejectedError(condition(error), retryable=isinstance(error, _PASSING))


def superseded() -> SupersededError:
    """Return the error of a process that another one has taken the rotation from."""
    return SupersededError(
        "Another process has taken this rotation over; this one stopped and has written nothing since."
    )


def condition(error: psycopg.Error) -> str:
    """Return the server's name for an error, e.g. ``check_violation (23514) of token_not_empty``.

    Its text is added where the server itself has put it together from names alone, and the function that met
    it, which is a trigger's.
    """
    words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    name = words if error.sqlstate is None else f"{words} ({error.sqlstate})"
    if error.diag.constraint_name:
        name = f"{name} of {error.diag.constraint_name}"
    if error.diag.source_function in _NAMES_ALONE:
        name = f"{name}: {error.diag.message_primary}"
    function = _function(error)
    return f"{name}, in the function {function}" if function else name


def _is_lost(error: Exception, connection: psycopg.AsyncConnection | None) -> bool:
    if isinstance(error, (PoolTimeout, *_LOST)) or (connection is not None and connection.closed):
        return True
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(_LOST_CLASSES) and not isinstance(error, errors.QueryCanceled)


def _lost_message(error: Exception) -> str:
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        return f"The connection to the server was lost: {condition(error)}."
    # libpq's own words: hosts and system errors, nothing of a row. Its first line says it all.
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"The server cannot be reached: {first_line.rstrip('.')}."


# PostgreSQL's manual, chapter "Error Reporting and Logging", and those of the two modules. Where this role
# may change log_parameter_max_length, guard() does so for each of its transactions, and nothing shows.
_QUERY: Final = (
    "SELECT name || ' = ' || setting FROM pg_settings WHERE"
    " (CASE name WHEN 'log_statement' THEN setting IN ('mod', 'all')"
    " WHEN 'log_min_duration_statement' THEN setting <> '-1'"
    " WHEN 'log_min_duration_sample' THEN setting <> '-1'"
    " WHEN 'log_transaction_sample_rate' THEN setting <> '0' ELSE false END"
    " AND current_setting('log_parameter_max_length') <> '0'"
    " AND NOT has_parameter_privilege('log_parameter_max_length', 'SET'))"
    " OR (name = 'auto_explain.log_min_duration' AND setting <> '-1'"
    " AND COALESCE(current_setting('auto_explain.log_parameter_max_length', true), '0') <> '0')"
    " OR (name = 'pgaudit.log_parameter' AND setting = 'on') ORDER BY name"
)


async def settings_that_show_values(connection: AsyncConnection) -> tuple[str, ...]:
    """The settings that make the server log new values, e.g. ``log_statement = all``; mostly none."""
    async with translate_errors(connection):
        cursor = await connection.execute(_QUERY)
        return tuple([setting async for (setting,) in cursor])
