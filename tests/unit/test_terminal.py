"""What the process of a command prints when Python collects an unfinished generator."""

import sys
from collections.abc import Iterator

import psycopg
import pytest

from rotator.management.terminal import hide_errors_of_lost_connections


def _raises_when_collected(error: Exception) -> Iterator[None]:
    try:
        yield
    finally:
        raise error


@pytest.mark.parametrize(
    ("error", "reported"),
    [(psycopg.OperationalError("the connection is closed"), 0), (ValueError("a fault of our own"), 1)],
)
def test_only_errors_of_lost_connections_are_hidden(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reported: int
) -> None:
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(unraisable.exc_value))
    hide_errors_of_lost_connections()

    unfinished = _raises_when_collected(error)
    next(unfinished)
    del unfinished

    assert len(found) == reported
