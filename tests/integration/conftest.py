"""What the tests on a real server share."""

from collections.abc import AsyncIterator, Callable, Iterator

import psycopg
import pytest
from django.db import connection

from rotator.postgres.connection import connected
from rotator.postgres.fence import Lease
from rotator.postgres.table import TargetTable
from tests.integration.outcomes import CODED
from tests.integration.rotation_tables import Database, begin

# Django's own: its cursors and adapters.
_DJANGOS_OWN = ("cursor_factory", "context", "prepare_threshold")


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
