"""What the tests on a real server share."""

from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from django.db import connection

from rotator.postgres.connections import connected
from rotator.postgres.transaction import Claim
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
async def claim(control: psycopg.AsyncConnection) -> Claim:
    """A rotation that has just begun and is this process's."""
    return await begin(control)
