"""Synchronous standbys: a real one that streams, and names of others."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from core.own_server import OwnReplica, OwnServer
from rotator.exceptions import ServerLostError
from rotator.postgres.activity import check_standbys
from rotator.postgres.catalog import read_table
from rotator.postgres.connection import Server, connected
from rotator.postgres.maintenance import analyze
from tests.acceptance.harness import wait_until
from tests.faults.database import Database, make_tickets, new_role, slow_down, speed_up
from tests.faults.harness import Rotations

ROWS = 6000
# Five seconds, and three times as long again for a busy machine.
NOTICED_SECONDS = 20.0


@contextmanager
def synchronous(server: OwnServer, names: str) -> Iterator[None]:
    """Have each commit wait for these standbys; the one that streams is called walreceiver."""
    streams = (
        "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming' AND (sync_state = 'async')"
        " = (NOT current_setting('synchronous_standby_names') ~ 'walreceiver|[*]')"
        " AND current_setting('synchronous_standby_names') = %s"
    )
    with server.connect() as admin:

        def use(change: sql.Composable, names: str) -> None:
            admin.execute(sql.SQL("ALTER SYSTEM {}").format(change))
            admin.execute("SELECT pg_reload_conf()")
            wait_until(lambda: admin.execute(streams, [names]).fetchall(), "the setting is in effect")

        use(sql.SQL("SET synchronous_standby_names = {}").format(names), names)
        try:
            yield
        finally:
            use(sql.SQL("RESET synchronous_standby_names"), "")


async def check(url: str) -> None:
    async with connected(Server(parameters=conninfo_to_dict(url))) as control:
        await check_standbys(control)


@pytest.mark.usefixtures("replica")
@pytest.mark.parametrize(
    "names",
    [
        "walreceiver",
        "*",
        "gone, walreceiver",
        "1 (gone, walreceiver)",
        "FIRST 1 (walreceiver, gone)",
        "any 1 (gone, walreceiver)",
    ],
)
async def test_a_connected_standby_is_enough(server: OwnServer, database: Database, names: str) -> None:
    with new_role(database, "visitor") as url, synchronous(server, names):
        await check(database.url())
        # It sees that there is a standby, and not what it does.
        await check(url)


@pytest.mark.usefixtures("replica")
@pytest.mark.parametrize(
    "names",
    ["gone", "2 (walreceiver, gone)", "FIRST 2 (gone, walreceiver)", "ANY 2 (walreceiver, gone)"],
)
async def test_fewer_standbys_than_commits_wait_for_are_refused(
    server: OwnServer, database: Database, names: str
) -> None:
    with synchronous(server, names), pytest.raises(ServerLostError, match=re.escape(f"is '{names}')")):
        await check(database.url())


@pytest.mark.usefixtures("replica")
async def test_statistics_are_made_while_the_standby_is_gone(server: OwnServer, database: Database) -> None:
    make_tickets(database, 100)
    parameters = conninfo_to_dict(database.url())
    async with (
        connected(Server(parameters=parameters)) as control,
        connected(Server(parameters=parameters)) as connection,
    ):
        table = await read_table(control, path=("tickets_ticket",), key=("id",), columns=("token",))
        with synchronous(server, "gone"):
            async with asyncio.timeout(NOTICED_SECONDS):
                assert await analyze(connection, control, table) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "batch"), [(0.2, 20), (0.05, 100)], ids=["ranges are left", "only the completion is left"]
)
def test_a_rotation_waits_while_the_standby_is_gone(
    server: OwnServer,
    database: Database,
    rotations: Rotations,
    replica: OwnReplica,
    seconds: float,
    batch: int,
) -> None:
    audit = make_tickets(database, ROWS)
    slow_down(database, seconds)
    with synchronous(server, "ANY 1 (walreceiver, gone)"):
        running = rotations.rotate(database.url(), f"--batch={batch}", "--progress=json")
        wait_until(lambda: database.checkpoints() > 10, "some checkpoints")
        assert '"outage_started"' not in running.out
        replica.stop("immediate")
        try:
            wait_until(lambda: '"outage_started"' in running.out, "an outage", seconds=NOTICED_SECONDS)
            wait_until(lambda: running.out.count('"state": "outage"') >= 3, "the outage ticks")
        finally:
            replica.start()
        speed_up(database)
        finished = running.wait()
    assert finished.status == 0, finished.err
    events = [json.loads(line) for line in finished.out.splitlines()]
    (outage,) = [event for event in events if event["event"] == "outage_started"]
    assert outage["reason"] == (
        "Each commit waits for a synchronous standby that does not confirm it (synchronous_standby_names is "
        "'ANY 1 (walreceiver, gone)'). Start the standby, or change that setting."
    )
    assert sum(event["event"] == "outage_ended" for event in events) == 1
    audit.assert_rotated_once()
