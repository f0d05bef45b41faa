"""Columns whose type limits or changes values: they hold what a plain UPDATE would store, or are refused."""

from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest
from psycopg.sql import Identifier

from rotator.options import Selection
from rotator.postgres.table import TargetTable
from tests.integration.outcomes import CODED, CODES, SHOP, assert_unconfirmed, rotate
from tests.integration.rotation_tables import SCHEMA, Database
from tests.pairs import all_pairs

pytestmark = SHOP

MakeTable = Callable[[str], TargetTable]

ROWS = 20
GENERATORS = "tests.shop.generators."
SOURCES = ["", "_for_row"]
DOMAIN = Identifier(SCHEMA, "a domain").as_string()
OVER_DOMAIN = Identifier(SCHEMA, "over a domain").as_string()
CITEXT = Identifier(SCHEMA, "citext").as_string()

# The generator's values are 22 letters.
TOO_SHORT = {
    "varchar": "varchar(16)",
    "char": "char(16)",
    "a domain over varchar": DOMAIN,
    "a domain over that": OVER_DOMAIN,
}


def make_domains(database: Database, base: str = "varchar(16)", check: str = "") -> None:
    database.execute(f"CREATE DOMAIN {DOMAIN} AS {base} {check}")
    database.execute(f"CREATE DOMAIN {OVER_DOMAIN} AS {DOMAIN}")


def fill(database: Database, value: str = "'leaked ' || i") -> None:
    database.execute(f"INSERT INTO shop_coded SELECT i, {value} FROM generate_series(1, {ROWS}) AS i")


def assert_plain_update_fails(database: Database, value: str, reason: str) -> None:
    """The server itself refuses such a value with this condition."""
    with pytest.raises(psycopg.Error) as caught:
        database.execute("UPDATE shop_coded SET secret = %s WHERE id = 1", (value,))
    assert type(caught.value).__name__.lower() == reason.replace("_", "")


def assert_all_refused(database: Database, table: TargetTable, generator: str, reason: str) -> None:
    """Every row that is tried is refused for this reason, and all stay as they were."""
    before = database.values(table)
    outcome = rotate(CODES, batch=5, selection=Selection(generator=GENERATORS + generator))
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    failed = {key for key, _ in outcome.rejected_keys}
    assert len(failed) >= 8
    assert failed <= before.keys()
    assert all(found.startswith(reason) for _, found in outcome.rejected_keys)
    assert database.values(table) == before


@pytest.mark.parametrize(("type_name", "source"), all_pairs(TOO_SHORT.values(), SOURCES))
def test_a_value_that_is_too_long_is_not_cut(
    database: Database, coded: MakeTable, type_name: str, source: str
) -> None:
    make_domains(database)
    table = coded(type_name)
    fill(database)
    assert_plain_update_fails(database, "x" * 22, "string_data_right_truncation")
    assert_all_refused(database, table, f"token{source}", "string_data_right_truncation")


@pytest.mark.parametrize(("type_name", "source"), all_pairs([DOMAIN, OVER_DOMAIN], SOURCES))
def test_a_value_that_a_domain_refuses_is_refused(
    database: Database, coded: MakeTable, type_name: str, source: str
) -> None:
    make_domains(database, "text", "CONSTRAINT is_leaked CHECK (VALUE LIKE 'leaked %')")
    table = coded(type_name)
    fill(database)
    assert_plain_update_fails(database, "x", "check_violation")
    assert_all_refused(database, table, f"token{source}", "check_violation")


@pytest.mark.parametrize("source", SOURCES)
def test_bits_that_are_too_many_are_refused(database: Database, coded: MakeTable, source: str) -> None:
    table = coded("varbit(3)")
    fill(database, "B'101'")
    assert_plain_update_fails(database, "1010", "string_data_right_truncation")
    assert_all_refused(database, table, f"bits{source}", "string_data_right_truncation")


@pytest.mark.parametrize("source", SOURCES)
def test_a_number_that_is_too_large_is_refused(database: Database, coded: MakeTable, source: str) -> None:
    table = coded("numeric(3, 2)")
    fill(database, "1.25")
    assert_plain_update_fails(database, "12.5", "numeric_value_out_of_range")
    assert_all_refused(database, table, f"large_number{source}", "numeric_value_out_of_range")


def test_null_is_kept_if_not_null_is_not_validated(database: Database, coded: MakeTable) -> None:
    if database.connect().info.server_version < 180_000:
        pytest.skip("this server validates NOT NULL")
    coded("text")
    fill(database)
    database.execute("UPDATE shop_coded SET secret = NULL WHERE id <= 4")
    database.execute("ALTER TABLE shop_coded ADD CONSTRAINT filled NOT NULL secret NOT VALID")
    selection = Selection(generator=f"{GENERATORS}token")
    rotate(CODES, selection=selection)
    kept = database.execute(
        "SELECT id FROM shop_coded WHERE secret IS NULL OR secret LIKE 'leaked%' ORDER BY 1"
    )
    assert kept == [(1,), (2,), (3,), (4,)]


# --- What fits -------------------------------------------------------------------------------------

FITTING = {
    "varchar": ("varchar(22)", "token", 22),
    "char that is padded": ("char(40)", "token", 22),
    "a domain": (DOMAIN, "token", 22),
    "a domain over that": (OVER_DOMAIN, "token", 22),
    "bits": ("varbit(200)", "bits", 128),
    "a number that is rounded": ("numeric(12, 2)", "large_number", None),
    "a domain over a number": (OVER_DOMAIN, "large_number", None),
    "a text of a uuid": ("uuid", "uuid_text", 36),
}


@pytest.mark.parametrize(("fitting", "source"), all_pairs(FITTING, SOURCES))
def test_a_value_that_fits_is_stored_as_a_plain_update_stores_it(
    database: Database, coded: MakeTable, fitting: str, source: str
) -> None:
    type_name, generator, length = FITTING[fitting]
    make_domains(database, "varchar(30)" if generator == "token" else "numeric(12, 2)")
    table = coded(type_name)
    fill(
        database,
        {"bits": "B'1'", "large_number": "0", "uuid_text": "gen_random_uuid()"}.get(
            generator, "'leaked ' || i"
        ),
    )
    before = database.values(table)
    selection = Selection(generator=f"{GENERATORS}{generator}{source}")
    assert_unconfirmed(rotate(CODES, selection=selection), 0)
    assert database.changed(before, table) == before.keys()
    assert len(set(database.values(table).values())) == ROWS
    lengths = database.execute("SELECT DISTINCT octet_length(secret::text) FROM shop_coded")
    assert length is None or lengths == [(length,)]


@pytest.mark.parametrize("source", SOURCES)
def test_a_type_of_an_extension(database: Database, coded: MakeTable, source: str) -> None:
    """Whose own equality would call values that differ in case the same."""
    if not database.execute("SELECT FROM pg_available_extensions WHERE name = 'citext'"):
        pytest.skip("this server lacks citext")
    database.execute(f"CREATE EXTENSION citext SCHEMA {Identifier(SCHEMA).as_string()}")
    table = coded(CITEXT)
    fill(database, "'LEAKED ' || i")
    before = database.values(table)
    selection = Selection(generator=f"{GENERATORS}token{source}")
    assert_unconfirmed(rotate(CODES, selection=selection), 0)
    assert database.changed(before, table) == before.keys()


@pytest.mark.parametrize("stored", ["'one for all'", "''"])
def test_a_trigger_that_stores_equal_values_ends_the_run(
    database: Database, coded: MakeTable, stored: str
) -> None:
    table = coded("text")
    fill(database)
    before = database.values(table)
    name = database.before_update(f"NEW.secret := {stored}; RETURN NEW;", table)
    outcome = rotate(CODES)
    assert (outcome.status, outcome.exit_status) == ("failed", 1)
    assert outcome.error.startswith("Rows in the range ")
    assert "have the same value after the update" in outcome.error
    assert name.strip('"') in outcome.error
    assert database.values(table) == before


@pytest.mark.parametrize("stored", ["md5(NEW.secret)", "CASE WHEN NEW.id % 2 = 0 THEN NEW.secret END"])
def test_a_trigger_may_store_other_values(database: Database, coded: MakeTable, stored: str) -> None:
    table = coded("text")
    fill(database)
    before = database.values(table)
    database.before_update(f"NEW.secret := {stored}; RETURN NEW;", table)
    assert rotate(CODES).status == "completed"
    assert database.changed(before, table) == before.keys()


def test_one_of_several_values_may_be_equal(database: Database) -> None:
    """A row that keeps an empty text gets only the other value, of which there are few."""
    database.execute(
        "INSERT INTO shop_checked (token, checksum, changed_at)"
        " SELECT CASE WHEN i % 2 = 0 THEN '' ELSE 'leaked ' || i END, 'leaked', now()"
        f" FROM generate_series(1, {ROWS}) AS i"
    )
    table = replace(CODED, path=("shop_checked",))
    database.before_update("RETURN NEW;", table)
    chosen = Selection(generator=f"{GENERATORS}token_and_digit")
    assert rotate(["shop.Checked.token", "shop.Checked.checksum"], selection=chosen).status == "completed"
    assert not database.execute("SELECT FROM shop_checked WHERE token LIKE 'leaked%' OR checksum = 'leaked'")
