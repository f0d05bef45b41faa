"""What the tests on a real server share."""

from collections.abc import AsyncIterator, Callable, Iterator

import psycopg
import pytest
from django.db import connection

from rotator.postgres import column_samples
from rotator.postgres.connection import connected
from rotator.postgres.fence import Lease
from rotator.postgres.table import TargetTable
from rotator.runner import session
from tests.integration.outcomes import CODED
from tests.integration.rotation_tables import MONTH, Database, begin, fill

# Django's own: its cursors and adapters.
_DJANGOS_OWN = ("cursor_factory", "context", "prepare_threshold")


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits only for a moment for transactions that are older than the rotation."""
    monkeypatch.setattr(session, "OLDER_WRITERS_SECONDS", 0.1)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for secrets and copies does not pause between its statements."""
    monkeypatch.setattr(column_samples, "_MOST_PAUSE_SECONDS", 0)


@pytest.fixture
def database(transactional_db: None) -> Iterator[Database]:  # noqa: ARG001
    """The test database, empty, for transactions that really commit."""
    parameters = connection.get_connection_params()
    opened = Database({name: value for name, value in parameters.items() if name not in _DJANGOS_OWN})
    yield opened
    opened.close()


@pytest.fixture
async def control(database: Database) -> AsyncIterator[psycopg.AsyncConnection]:
    """One of the rotator's own connections."""
    async with connected(database.server) as opened:
        yield opened


@pytest.fixture
async def lease(control: psycopg.AsyncConnection) -> Lease:
    """A rotation that has just begun and is this process's."""
    return await begin(control)


@pytest.fixture
def coded(database: Database) -> Iterator[Callable[[str], TargetTable]]:
    """Make the table of codes, with secrets of a type that the test chooses."""

    def make(type_name: str = "text") -> TargetTable:
        database.execute("DROP TABLE IF EXISTS shop_coded")
        database.execute(f"CREATE TABLE shop_coded (id bigint PRIMARY KEY, secret {type_name})")
        return CODED

    yield make
    database.execute("DROP TABLE IF EXISTS shop_coded CASCADE")


@pytest.fixture
def days(database: Database) -> Iterator[Database]:
    """Twenty rows in January, one partition; twenty in March, two by hash; nothing in February."""
    database.execute(
        "CREATE TABLE shop_partitioned (day date, number integer, secret varchar(40) NOT NULL,"
        " PRIMARY KEY (day, number)) PARTITION BY RANGE (day)"
    )
    database.execute(f"CREATE TABLE shop_january PARTITION OF shop_partitioned {MONTH.format(1, 2)}")
    database.execute(
        f"CREATE TABLE shop_march PARTITION OF shop_partitioned {MONTH.format(3, 4)}"
        " PARTITION BY HASH (number)"
    )
    for part in range(2):
        database.execute(
            f"CREATE TABLE shop_march_{part} PARTITION OF shop_march"
            f" FOR VALUES WITH (MODULUS 2, REMAINDER {part})"
        )
    fill(database, "shop_partitioned", "2026-01-01")
    fill(database, "shop_partitioned", "2026-03-01")
    yield database
    for table in ("partitioned", "january", "february", "march"):
        database.execute(f"DROP TABLE IF EXISTS shop_{table}")
