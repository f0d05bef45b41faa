"""Samples of columns of each kind: the server judges the values, in read-only transactions."""

import pytest
from psycopg import AsyncConnection, errors, sql

from rotator.postgres import column_samples
from rotator.postgres.column_samples import (
    ColumnSample,
    StoredTable,
    UnreadableError,
    connected_for_reading,
    read_stored_table,
    reading,
    sample_column,
)
from tests.integration.rotation_tables import SCHEMA, Database

pytestmark = pytest.mark.django_db(transaction=True)

TABLE = sql.Identifier(SCHEMA, "100% odd")
COLUMN = "The %s column"
HEX = "encode(sha256(random()::text::bytea), 'hex')"


def make(database: Database, value: str, *, of: str = "text", rows: int = 100) -> None:
    """Make a table with a value for each number ``i``, which is an expression in SQL."""
    database.execute(f"CREATE DOMAIN {sql.Identifier(SCHEMA, 'code').as_string()} AS text")
    made = sql.SQL("CREATE TABLE {} AS SELECT i, CAST({} AS {}) AS {} FROM generate_series(1, {}) AS i")
    database.execute(
        made.format(
            TABLE,
            sql.SQL(value),
            sql.SQL(of),
            sql.Identifier(COLUMN),
            sql.Literal(rows),
        )
    )


async def table_of(connection: AsyncConnection, database: Database) -> StoredTable:
    found = await read_stored_table(connection, database.server, (SCHEMA, "100% odd"))
    assert found is not None
    return found


async def sampled(database: Database) -> ColumnSample | None:
    async with connected_for_reading(database.server) as connection:
        table = await table_of(connection, database)
        return await sample_column(connection, database.server, table, COLUMN)


async def sample_of(database: Database, value: str, *, of: str = "text", rows: int = 100) -> ColumnSample:
    make(database, value, of=of, rows=rows)
    sample = await sampled(database)
    assert isinstance(sample, ColumnSample)
    return sample


@pytest.mark.parametrize(
    ("value", "of"),
    [
        (HEX, "text"),
        (HEX, "char(64)"),
        (HEX, f"{sql.Identifier(SCHEMA, 'code').as_string()}"),
        (f"encode(decode({HEX}, 'hex'), 'base64')", "varchar"),
        (f"decode({HEX}, 'hex')", "bytea"),
    ],
)
async def test_random_values(database: Database, value: str, of: str) -> None:
    sample = await sample_of(database, value, of=of)
    assert (sample.values, sample.distinct) == (100, 100)
    assert sample.bits > 100
    assert 0.2 < sample.digit_changes < 0.6
    assert not any(sample.formats.values())


@pytest.mark.parametrize(
    "value",
    [
        "'order ' || i",
        "'2026-11-' || lpad(i::text, 6, '0')",
        "'ORD-2026-' || lpad(i::text, 12, '0')",
        "i % 3",
    ],
)
async def test_values_that_are_not_random(database: Database, value: str) -> None:
    assert (await sample_of(database, value)).bits < 20


async def test_nulls_and_blanks_are_left_out(database: Database) -> None:
    sample = await sample_of(database, "CASE i % 3 WHEN 0 THEN NULL WHEN 1 THEN '' ELSE 'x' END", rows=90)
    assert (sample.values, sample.distinct, sample.mean_length) == (30, 1, 1)


async def test_an_empty_table_has_an_empty_sample(database: Database) -> None:
    assert (await sample_of(database, "'x'", rows=0)).values == 0


async def test_formats(database: Database) -> None:
    sample = await sample_of(
        database, f"CASE WHEN i <= 30 THEN 'sk_live_' || left({HEX}, 24) ELSE 'pbkdf2_sha256$1$' || i END"
    )
    assert {name: number for name, number in sample.formats.items() if number} == {"a Stripe key": 30}
    assert sample.hashes == 70


@pytest.mark.parametrize("of", ["json", "jsonb"])
async def test_documents(database: Database, of: str) -> None:
    value = (
        "CASE i % 4 WHEN 0 THEN json_build_object('a', json_build_object('api_key', 'x' || i))"
        f" WHEN 1 THEN json_build_object('url', 'ghp_' || left({HEX}, 36))"
        " WHEN 2 THEN json_build_object('has_token', true) ELSE '[1]' END"
    )
    sample = await sample_of(database, value, of=of)
    assert sample.json_keys == 25
    assert sample.formats["a GitHub token"] == 25


@pytest.mark.parametrize("of", ["integer", "timestamptz"])
async def test_other_types_have_no_sample(database: Database, of: str) -> None:
    make(database, "NULL", of=of)
    assert await sampled(database) is None


async def test_a_large_table_is_sampled_from_all_its_parts(database: Database) -> None:
    make(database, "repeat('x', 200) || i", rows=20_000)
    database.execute(sql.SQL("ANALYZE {}").format(TABLE))
    async with connected_for_reading(database.server) as connection:
        table = await table_of(connection, database)
    assert (table.rows, table.rows_is_exact) == (20_000, False)
    assert table.pages > 500
    sample = await sampled(database)
    assert isinstance(sample, ColumnSample)
    assert sample.values == column_samples.MOST_VALUES


async def test_a_small_table_is_counted(database: Database) -> None:
    make(database, "'x'", rows=77)
    async with connected_for_reading(database.server) as connection:
        table = await table_of(connection, database)
        assert await read_stored_table(connection, database.server, ("no such table",)) is None
    assert (table.rows, table.rows_is_exact) == (77, True)


async def test_a_locked_table_has_the_reason(database: Database) -> None:
    make(database, "'x'")
    async with connected_for_reading(database.server) as connection:
        table = await table_of(connection, database)
        other = database.connect()
        other.execute("BEGIN")
        other.execute(sql.SQL("LOCK TABLE {}").format(TABLE))
        reason = r"lock_not_available \(55P03\): canceling statement due to lock timeout"
        with pytest.raises(UnreadableError, match=reason):
            await sample_column(connection, database.server, table, COLUMN)
        other.execute("ROLLBACK")
        # The connection is still usable.
        assert isinstance(await sample_column(connection, database.server, table, COLUMN), ColumnSample)


async def test_its_transactions_are_read_only(database: Database) -> None:
    make(database, "'x'")
    async with connected_for_reading(database.server) as connection:
        with pytest.raises(errors.ReadOnlySqlTransaction):
            async with reading(connection, database.server):
                await connection.execute(sql.SQL("DELETE FROM {}").format(TABLE))
