"""The set-up that all tests share."""

from collections.abc import Generator, Iterator
from typing import Final

import pytest
from django.db import connection

from tests.acceptance.harness import Commands
from tests.signals import stop_ignoring_signals

_STARTING_PROCESSES: Final = ("tests/acceptance/", "tests/faults/")
# What a test can leave in the tables of the project; the rotator's own are emptied, and its ledgers dropped.
_SCHEMA: Final = (
    "WITH own AS (SELECT oid, relname, relkind, reloptions FROM pg_class"
    " WHERE relnamespace = 'public'::regnamespace AND relname !~ '^rotator_')"
    " SELECT relname || ' ' || COALESCE(reloptions::text, '') FROM own"
    " UNION ALL SELECT relname || '.' || attname || ' ' || format_type(atttypid, atttypmod)"
    " FROM pg_attribute JOIN own ON own.oid = attrelid"
    " WHERE relkind IN ('r', 'p') AND attnum > 0 AND NOT attisdropped"
    " UNION ALL SELECT relname || ' ' || conname FROM pg_constraint JOIN own ON own.oid = conrelid"
    # What pg_constraint says of NOT NULL since PostgreSQL 18.
    " WHERE contype <> 'n'"
    " UNION ALL SELECT relname || ' ' || tgname FROM pg_trigger JOIN own ON own.oid = tgrelid"
    " WHERE NOT tgisinternal"
)


def pytest_configure() -> None:
    # Some tests send a signal to their own process, others start processes without the acceptance harness.
    stop_ignoring_signals()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix the files whose tests start processes, which need the CPUs, with those that wait for a server."""
    ordered = dict[str, list[pytest.Item]]()
    for item in items:
        ordered.setdefault(item.nodeid.partition("::")[0], []).append(item)
    starting = [file for file in ordered if file.startswith(_STARTING_PROCESSES)]
    waiting = [file for file in ordered if not file.startswith(_STARTING_PROCESSES)]
    places = {file: place / len(files) for files in (starting, waiting) for place, file in enumerate(files)}
    items[:] = [item for file in sorted(ordered, key=places.__getitem__) for item in ordered[file]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failed test what the processes that it started have said."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for value in item.funcargs.values():
            if isinstance(value, Commands):
                report.sections += value.said
    return report


def _schema() -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute(_SCHEMA)
        return {name for (name,) in cursor.fetchall()}


@pytest.fixture(scope="session")
def schema() -> set[str]:
    """The schema as the latest test has left it; empty before the first test."""
    return set()


@pytest.fixture(autouse=True)
def unchanged_schema(request: pytest.FixtureRequest, schema: set[str]) -> Iterator[None]:
    """Fail the test that leaves a column, an index or a trigger behind, rather than a later one."""
    if "transactional_db" not in request.fixturenames:
        yield
        return
    request.getfixturevalue("transactional_db")
    schema.update(schema or _schema())
    before = set(schema)
    yield
    # The test can have broken it.
    connection.close()
    schema.clear()
    schema.update(_schema())
    assert schema == before
