"""How the server plans the rotator's real statements, as its own auto_explain tells it while they run."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import sql

from rotator.postgres.connection import OwnConnection, Server, connected, pooled
from rotator.postgres.fence import Lease
from rotator.postgres.last_writers import find_older_rows
from rotator.postgres.ledger import create_ledger, index_ledger
from rotator.postgres.planner import IndexPlanner, last_key
from rotator.postgres.table import Condition, TargetTable
from rotator.postgres.writer import RangeUpdate, write_placed, write_range
from rotator.ranges import KeyInterval
from tests.integration.rotation_tables import COMMITTING, PAIRS, PATIENT, TICKETS, UUIDS, Database

pytestmark = COMMITTING

BATCH = 2000
EXPLAINING = (
    "-c session_preload_libraries=auto_explain -c auto_explain.log_min_duration=0"
    " -c auto_explain.log_level=notice -c auto_explain.log_format=json"
)
# Each of them reads the whole table, or leaves the key's order.
UNWANTED = {"Seq Scan", "Hash Join", "Sort", "Incremental Sort", "Bitmap Heap Scan"}


class Plans:
    """The plans of the statements on one table."""

    def __init__(self, table: TargetTable) -> None:
        self._table = table.path[-1]
        self._plans = list[list[Mapping[str, Any]]]()

    def hear(self, notice: psycopg.errors.Diagnostic) -> None:
        """Take what the server tells of a statement."""
        _, _, plan = (notice.message_primary or "").partition("plan:\n")
        if plan:
            nodes = list(_nodes(json.loads(plan)["Plan"]))
            if any(node.get("Relation Name") == self._table for node in nodes):
                self._plans.append(nodes)

    def kinds(self) -> list[set[str]]:
        """The kinds of nodes of each plan heard of since the last call."""
        heard, self._plans = self._plans, []
        return [{node["Node Type"] for node in nodes} for nodes in heard]


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


class _ExplainedServer(Server):
    plans: Plans

    async def configure(self, connection: OwnConnection) -> None:
        await super().configure(connection)
        connection.add_notice_handler(self.plans.hear)


@pytest.fixture
def table(database: Database, request: pytest.FixtureRequest) -> TargetTable:
    """A table with so many rows, which the server has yet to analyze."""
    found: TargetTable = request.param[0]
    rows: int = request.param[1]
    if found is TICKETS:
        database.make_tickets(1, rows)
    else:
        database.make_table(found)
        database.execute(
            sql.SQL(
                "INSERT INTO {} (shop, number, token)"
                " SELECT 'shop ' || i / 1000, i %% 1000, gen_random_uuid() FROM generate_series(1, %s) AS i"
            ).format(found.name),
            (rows,),
        )
    return found


@pytest.fixture
def explained(database: Database, table: TargetTable) -> _ExplainedServer:
    """The same server, which tells how it plans."""
    try:
        database.connect(options=EXPLAINING)
    except psycopg.Error as error:
        pytest.skip(f"this role cannot have the server explain itself: {error}")
    server = _ExplainedServer(parameters={**database.server.parameters, "options": EXPLAINING})
    object.__setattr__(server, "plans", Plans(table))
    return server


@pytest.fixture
async def side(explained: _ExplainedServer) -> AsyncIterator[psycopg.AsyncConnection]:
    """A connection for the planner and the late pass."""
    async with connected(explained) as opened:
        yield opened


def tables(*rows: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "table",
        [
            pytest.param((found, count), id=f"{count} rows of {found.path[-1]}")
            for found in (TICKETS, PAIRS)
            for count in rows
        ],
        indirect=True,
    )


def analyze(database: Database, table: TargetTable) -> None:
    database.execute(sql.SQL("ANALYZE {}").format(table.name), ())


@tables(50, 30_000)
async def test_ranges_are_updated_by_merging_two_scans_of_the_index(
    database: Database,
    explained: _ExplainedServer,
    side: psycopg.AsyncConnection,
    table: TargetTable,
    lease: Lease,
) -> None:
    planner = IndexPlanner(side, table)
    bound = await last_key(side, table)
    assert bound is not None
    rest, batch = KeyInterval(after=None, through=bound), len(database.values(table)) // 15
    async with pooled(explained, 1) as pool:
        update_range = RangeUpdate(table, UUIDS, PATIENT, keeps_plan=True)
        writer = partial(write_range, pool, update_range, lease, None)
        # The table's first range is another statement than those after it.
        for is_analyzed in (False, False, True, True):
            if is_analyzed:
                analyze(database, table)
            key_range = await planner.next_range(rest, batch)
            explained.plans.kinds()
            assert (await writer(key_range)).rows == batch
            (update,) = explained.plans.kinds()
            assert "Merge Join" in update
            assert not update & (UNWANTED | {"Nested Loop"})
            rest = KeyInterval(after=key_range.through, through=bound)
        async with pool.connection() as connection:
            kept = await connection.execute(
                "SELECT sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements"
                " WHERE statement LIKE 'WITH written AS (UPDATE%'"
            )
            assert await kept.fetchone() == (4, 0)


@tables(50, 30_000)
async def test_values_that_the_ledger_may_lack_are_looked_up_by_its_index(
    database: Database,
    explained: _ExplainedServer,
    side: psycopg.AsyncConnection,
    table: TargetTable,
    lease: Lease,
) -> None:
    planner = IndexPlanner(side, table)
    bound = await last_key(side, table)
    assert bound is not None
    ledger = await create_ledger(side, lease)
    fill = sql.SQL("INSERT INTO {} SELECT * FROM generate_series(1, 100000)")
    await side.execute(fill.format(ledger.name))
    await index_ledger(side, lease, ledger)
    rest, batch = KeyInterval(after=None, through=bound), len(database.values(table)) // 15
    async with pooled(explained, 1) as pool:
        update_range = RangeUpdate(table, UUIDS, PATIENT, ledger, keeps_plan=True)
        for is_analyzed in (False, False, True, True):
            if is_analyzed:
                analyze(database, table)
                await side.execute(sql.SQL("ANALYZE {}").format(ledger.name))
            key_range = await planner.next_range(rest, batch)
            explained.plans.kinds()
            await write_range(pool, update_range, lease, None, key_range)
            (update,) = explained.plans.kinds()
            assert "Merge Join" in update
            assert not update & UNWANTED
            rest = KeyInterval(after=key_range.through, through=bound)


@pytest.fixture
def of_kind(database: Database, table: TargetTable) -> Iterator[TargetTable]:
    """Every twentieth row of the table, by an index that a plan for any bounds would prefer."""
    for statement in (
        "ALTER TABLE {} ADD COLUMN kind integer DEFAULT 0",
        "UPDATE {} SET kind = 1 WHERE abs(hashtext(token::text)) %% 20 = 0",
        "CREATE INDEX of_kind ON {} (kind)",
        "ANALYZE {}",
    ):
        database.execute(sql.SQL(statement).format(table.name), ())
    yield replace(table, condition=Condition("kind = 1"))
    database.execute(sql.SQL("ALTER TABLE {} DROP COLUMN kind").format(table.name), ())


@tables(30_000)
async def test_an_index_for_the_condition_on_the_rows_is_not_used(
    explained: _ExplainedServer,
    side: psycopg.AsyncConnection,
    table: TargetTable,
    of_kind: TargetTable,
    lease: Lease,
) -> None:
    bound = await last_key(side, table)
    assert bound is not None
    planner, rest = IndexPlanner(side, table), KeyInterval(after=None, through=bound)
    async with pooled(explained, 1) as pool:
        writer = partial(
            write_range, pool, RangeUpdate(of_kind, UUIDS, PATIENT, keeps_plan=True), lease, None
        )
        for _ in range(3):
            key_range = await planner.next_range(rest, BATCH)
            explained.plans.kinds()
            await writer(key_range)
            update = explained.plans.kinds()[0]
            assert "Merge Join" in update
            assert not update & (UNWANTED | {"Nested Loop"})
            rest = KeyInterval(after=key_range.through, through=bound)


@tables(30_000)
async def test_ranges_are_planned_from_the_index(
    database: Database, explained: _ExplainedServer, side: psycopg.AsyncConnection, table: TargetTable
) -> None:
    analyze(database, table)
    planner = IndexPlanner(side, table)
    bound = await last_key(side, table)
    assert bound is not None
    first = await planner.next_range(KeyInterval(after=None, through=bound), BATCH)
    second = await planner.next_range(KeyInterval(after=first.through, through=bound), BATCH)
    assert (first.rows, second.rows) == (BATCH, BATCH)
    statements = explained.plans.kinds()
    assert len(statements) == 3
    for statement in statements:
        assert statement & {"Index Scan", "Index Only Scan"}
        assert not statement & UNWANTED


@tables(50, 30_000)
async def test_older_rows_are_looked_up_by_their_places(
    database: Database,
    explained: _ExplainedServer,
    side: psycopg.AsyncConnection,
    table: TargetTable,
    lease: Lease,
) -> None:
    # As if all of them had been committed late.
    started_xid = 1 + int(database.execute("SELECT pg_current_xact_id()::text")[0][0])
    older_rows = find_older_rows(side, table, rotation=lease.rotation, started_xid=started_xid, batch=50)
    update_rows = RangeUpdate(table, UUIDS, PATIENT)
    async with aclosing(older_rows) as batches:
        found = await anext(batches)
    for chosen in (found[10:40], found[:7]):
        late_before = database.rotation("late_rows")
        explained.plans.kinds()
        await write_placed(side, update_rows, lease, None, chosen)
        assert database.rotation("late_rows") == late_before + len(chosen)
        (update,) = explained.plans.kinds()
        assert "Tid Scan" in update
        assert not update & {"Seq Scan", "Hash Join", "Merge Join", "Bitmap Heap Scan"}
        analyze(database, table)
