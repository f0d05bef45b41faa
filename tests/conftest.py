"""The set-up that all tests share."""

from collections.abc import Iterator
from typing import Any, Final

import pytest
from django.db import connection
from xdist.scheduler import LoadScopeScheduling

from tests.signals import stop_ignoring_signals

# Its virtual environments are made once for the file, and the databases of its projects have fixed names.
_FILES_FOR_ONE_PROCESS: Final = (
    "tests/acceptance/test_install.py",
    "tests/foreign/test_foreign_models.py",
    "tests/foreign/test_tenants.py",
)
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


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist ships no types for it
    """Hands out single tests, except for some files, which one process runs from first to last.

    ``--dist=loadgroup`` does the same, but has no effect with pytest 9.2: pytest-xdist's issue 1386.
    A process that dies is replaced, and the tests that it had still to run are run. LoadScopeScheduling as it
    comes would run the test again that ended the process, give a new process a single test, which then waits
    for the next one for ever, and fail where two processes are new.
    """

    def remove_node(self, node: Any) -> str | None:  # noqa: ANN401
        work = self.assigned_work.pop(node)
        pending = [test for unit in work.values() for test, is_done in unit.items() if not is_done]
        if not pending:
            return None
        crashed: str = pending[0]
        work[self._split_scope(crashed)][crashed] = True
        self.workqueue.update({scope: unit for scope, unit in work.items() if False in unit.values()})
        for other in self.assigned_work:
            self._reschedule(other)
        return crashed

    def _reschedule(self, node: Any) -> None:  # noqa: ANN401
        if node not in self.registered_collections:
            return
        super()._reschedule(node)
        if not node.shutting_down and self._pending_of(self.assigned_work[node]) == 1:
            super()._reschedule(node)

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return file if file in _FILES_FOR_ONE_PROCESS else nodeid


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix the files whose tests start processes, which need the CPUs, with those that wait for a server."""
    ordered = dict[str, list[pytest.Item]]()
    for item in items:
        ordered.setdefault(item.nodeid.partition("::")[0], []).append(item)
    starting = [file for file in ordered if file.startswith(_STARTING_PROCESSES)]
    waiting = [file for file in ordered if not file.startswith(_STARTING_PROCESSES)]
    places = {file: place / len(files) for files in (starting, waiting) for place, file in enumerate(files)}
    items[:] = [item for file in sorted(ordered, key=places.__getitem__) for item in ordered[file]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:  # noqa: ANN401
    return Scheduling(config, log)


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
