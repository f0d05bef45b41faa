"""A server of the tests' own for all of them, and for each a database of its own on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.own_server import OwnReplica, OwnServer
from core.proxy import Proxy
from tests.acceptance.harness import MANAGE, Commands
from tests.faults.database import Database, new_database, wait_for_replay
from tests.faults.harness import Rotations

TEMPLATE = "migrated"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A server, with a migrated database to copy."""
    # Throttles read the state of the archiver.
    with OwnServer({"archive_mode": "on", "archive_command": "true"}) as own:
        with own.connect() as admin:
            admin.execute(f"CREATE DATABASE {TEMPLATE}".encode())
        migrated = (
            Commands(tmp_path_factory.mktemp("migrate"))
            .start_on(own.url(TEMPLATE), *MANAGE, "migrate", "--verbosity=0")
            .wait()
        )
        assert migrated.status == 0, migrated.err
        yield own


@pytest.fixture
def database(server: OwnServer) -> Iterator[Database]:
    with new_database(server, TEMPLATE) as database:
        yield database


@pytest.fixture
def rotations(database: Database, tmp_path: Path) -> Iterator[Rotations]:  # noqa: ARG001 - dropped after them
    started = Rotations(tmp_path)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def proxy(server: OwnServer) -> Iterator[Proxy]:
    with Proxy(port=server.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def streaming(server: OwnServer) -> Iterator[OwnReplica]:
    with OwnReplica(server) as own:
        yield own


@pytest.fixture
def replica(streaming: OwnReplica, database: Database) -> Iterator[OwnReplica]:
    """A replica that has the test's own database, and replays whatever the test before has done to it."""
    wait_for_replay(database, streaming)
    yield streaming
    with streaming.connect() as standby:
        standby.execute("SELECT pg_wal_replay_resume()")
