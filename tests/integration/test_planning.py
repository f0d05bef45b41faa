"""Planning over real tables: gaps in ids, keys of several types, checkpoints subtracted by the server."""

from collections.abc import AsyncIterator

import psycopg
import pytest
from django.db import connection as django_connection

from rotator.exceptions import RangeTooSlowError
from rotator.postgres.errors import ANSWER_SECONDS
from rotator.postgres.planner import IndexPlanner, gaps, last_key
from rotator.postgres.table import Column, TargetTable
from rotator.ranges import Key, KeyInterval, KeyRange
from rotator.runner.verification import PLANNING_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)

TOKEN = Column(name="token", type_name="uuid")
ODD = TargetTable(path=('od"d %s',), key=(Column(name='I%d"', type_name="int8"),), columns=(TOKEN,))
PAIRS = TargetTable(
    path=("pairs",),
    key=(Column(name="shop", type_name="text"), Column(name="number", type_name="int4")),
    columns=(TOKEN,),
)


@pytest.fixture
async def connection() -> AsyncIterator[psycopg.AsyncConnection]:
    parameters = django_connection.get_connection_params()
    named = {
        name: parameters[name]
        for name in ("host", "port", "user", "password", "dbname")
        if name in parameters
    }
    async with await psycopg.AsyncConnection.connect(**named, autocommit=True) as opened:
        await opened.execute(
            'CREATE TEMPORARY TABLE "od""d %s" ("I%d""" bigint PRIMARY KEY)'.replace("%", "%%"), ()
        )
        await opened.execute(
            "CREATE TEMPORARY TABLE pairs (shop text, number int, PRIMARY KEY (shop, number))"
        )
        await opened.execute(
            "CREATE TEMPORARY TABLE rotator_completedrange"
            " (id bigint GENERATED ALWAYS AS IDENTITY, rotation_id bigint, after jsonb, through jsonb)"
        )
        yield opened


async def _plan(connection: psycopg.AsyncConnection, table: TargetTable, batch: int) -> list[KeyRange]:
    planner, planned = IndexPlanner(connection, table), list[KeyRange]()
    bound = await last_key(connection, table)
    assert bound is not None
    interval = KeyInterval(after=None, through=bound)
    while interval.after != bound:
        planned.append(await planner.next_range(interval, batch))
        interval = KeyInterval(after=planned[-1].through, through=bound)
    return planned


async def test_ranges_hold_batch_rows_whatever_the_gaps(connection: psycopg.AsyncConnection) -> None:
    await connection.execute(
        'INSERT INTO "od""d %%s" SELECT i * i * 1000 - 50 FROM generate_series(0, 24) AS i WHERE %s', (True,)
    )
    planned = await _plan(connection, ODD, 10)
    assert [key_range.rows for key_range in planned] == [10, 10, 5]
    assert [key_range.after for key_range in planned] == [None, "[80950]", "[360950]"]
    assert planned[-1].through == "[575950]"


async def test_an_empty_table_has_no_last_key(connection: psycopg.AsyncConnection) -> None:
    assert await last_key(connection, ODD) is None


async def test_composite_keys_are_planned_in_the_order_of_their_index(
    connection: psycopg.AsyncConnection,
) -> None:
    await connection.execute(
        "INSERT INTO pairs SELECT s, n FROM unnest('{a,b}'::text[]) s, generate_series(9, 11) n"
    )
    planned = await _plan(connection, PAIRS, 2)
    assert [key_range.through for key_range in planned] == ['["a", 10]', '["b", 9]', '["b", 11]']


async def test_what_is_planned_ahead_is_what_is_planned_one_by_one(
    connection: psycopg.AsyncConnection,
) -> None:
    await connection.execute(
        "INSERT INTO pairs SELECT 'shop ' || i / 90, i %% 90 * 3 FROM generate_series(1, %s) AS i", (1000,)
    )
    bound = await last_key(connection, PAIRS)
    assert bound is not None
    planner, interval, planned = IndexPlanner(connection, PAIRS), KeyInterval(after=None, through=bound), 0
    while interval.after != bound:
        # A slower server gets smaller ranges, and a range that is refused is split.
        batch = 7 if planned % 20 < 15 else 3
        key_range = await planner.next_range(interval, batch)
        alone = await IndexPlanner(connection, PAIRS).next_range(interval, batch)
        assert key_range == alone
        if planned % 4 == 0:
            half = await planner.next_range(key_range, 2)
            assert half == await IndexPlanner(connection, PAIRS).next_range(key_range, 2)
        interval = KeyInterval(after=key_range.through, through=bound)
        planned += 1
    assert planned > 1000 / 7


async def test_a_range_that_takes_too_long_to_plan_is_no_loss_of_the_server(
    connection: psycopg.AsyncConnection,
) -> None:
    await connection.execute("INSERT INTO pairs SELECT 'shop', n FROM generate_series(1, 200000) n")
    bound = await last_key(connection, PAIRS)
    assert bound is not None
    with pytest.raises(RangeTooSlowError):
        await IndexPlanner(connection, PAIRS, seconds=0.001).next_range(
            KeyInterval(after=None, through=bound), 150_000
        )
    assert 2 * PLANNING_SECONDS < ANSWER_SECONDS


@pytest.mark.parametrize(
    ("completed", "left"),
    [
        ([], [(None, 100)]),
        ([(None, 100)], []),
        ([(None, 9), (9, 10), (20, 100)], [(10, 20)]),
        ([(5, 9)], [(None, 5), (9, 100)]),
        ([(90, 100), (9, 10)], [(None, 9), (10, 90)]),
    ],
)
async def test_gaps_are_what_no_checkpoint_covers(
    connection: psycopg.AsyncConnection,
    completed: list[tuple[int | None, int]],
    left: list[tuple[int | None, int]],
) -> None:
    def key(number: int | None) -> Key | None:
        return None if number is None else Key(f"[{number}]")

    for after, through in completed:
        await connection.execute(
            "INSERT INTO rotator_completedrange (rotation_id, after, through)"
            " VALUES (1, %s, %s), (2, NULL, '[100]')",
            (key(after), key(through)),
        )
    found = await gaps(connection, ODD, 1, Key("[100]"))
    assert [(interval.after, interval.through) for interval in found] == [
        (key(after), key(through)) for after, through in left
    ]


async def test_gaps_of_an_interval_alone(connection: psycopg.AsyncConnection) -> None:
    await connection.execute(
        "INSERT INTO rotator_completedrange (rotation_id, after, through)"
        " VALUES (1, NULL, '[9]'), (1, '[9]', '[20]'), (1, '[30]', '[40]'), (1, '[60]', '[70]')"
    )
    bounds = [
        [
            (interval.after, interval.through)
            for interval in await gaps(connection, ODD, 1, Key("[50]"), after=after)
        ]
        for after in (Key("[9]"), Key("[20]"))
    ]
    assert bounds == [[("[20]", "[30]"), ("[40]", "[50]")]] * 2


async def test_checkpoints_of_before_are_not_looked_at(connection: psycopg.AsyncConnection) -> None:
    await connection.execute(
        "INSERT INTO rotator_completedrange (rotation_id, after, through)"
        " VALUES (1, NULL, '[9]'), (1, '[9]', '[20]'), (1, '[30]', '[40]')"
    )
    found = await gaps(connection, ODD, 1, Key("[40]"), after=Key("[20]"), checkpoints_before=2)
    assert [(interval.after, interval.through) for interval in found] == [("[20]", "[30]")]
