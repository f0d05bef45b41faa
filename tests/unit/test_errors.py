"""The rotator's own errors, which replace those of the driver."""

import asyncio

import psycopg
import pytest
from psycopg import errors

from rotator.exceptions import ServerLostError
from rotator.postgres.errors import translate

LOST = "The connection to the server was lost"


def pipeline_error(cause: BaseException) -> psycopg.Error:
    """Return the driver's error at the end of a pipeline that another error has ended."""
    try:
        try:
            raise cause
        finally:
            raise psycopg.OperationalError("cannot exit pipeline mode while busy")
    except psycopg.Error as error:
        return error


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (errors.AdminShutdown(), f"{LOST}: admin_shutdown (57P01)."),
        (
            psycopg.OperationalError("the connection is closed"),
            "The server cannot be reached: the connection is closed.",
        ),
        (asyncio.CancelledError(), f"{LOST}."),
        (
            errors.SerializationFailure(),
            "The connection to the server was closed after an error: serialization_failure (40001).",
        ),
    ],
)
def test_the_error_of_a_pipeline_does_not_replace_its_cause(cause: BaseException, message: str) -> None:
    translated = translate(pipeline_error(cause))
    assert isinstance(translated, ServerLostError)
    assert str(translated) == message
