"""Keys whose text depends on settings of the role that the rotator logs in as."""

from collections import Counter
from collections.abc import Iterator

import pytest
from psycopg.sql import SQL, Composed, Identifier, Literal

from rotator.postgres.table import Column, TargetTable
from tests.integration.outcomes import SHOP, assert_unconfirmed, each_connection, rotate
from tests.integration.rotation_tables import Database
from tests.pairs import all_pairs

pytestmark = SHOP

ROWS = 60
WORD = "shop.Word.secret"
ODD_NUMBERS = "ARRAY['NaN', '-Infinity', 'Infinity', '-0', '1e-300', '0.30000000000000004', '0.3']::float8[]"
KEYS = {
    "float8": ("extra_float_digits", "0", "float8", "0.1 + i / 3.0::float8 + 1e-15 * i"),
    "float4": ("extra_float_digits", "-3", "float4", "1.0000001 + i / 8388608.0::float4"),
    "float8 that is no number": ("extra_float_digits", "-15", "float8", f"({ODD_NUMBERS})[i]"),
    "interval": ("IntervalStyle", "sql_standard", "interval", "i * interval '-1 day -2 hours -3.000001 s'"),
    "interval of months": (
        "IntervalStyle", "iso_8601", "interval", "i * interval '1 month -1 day -0.5 s' - interval '1 year'"
    ),
    "bytea": ("bytea_output", "escape", "bytea", "decode(md5(i::text), 'hex')"),
    "date": ("DateStyle", "SQL, DMY", "date", "'2026-01-25'::date + i::int"),
    "timestamp": ("DateStyle", "German", "timestamp", "'2026-01-25'::timestamp + i * interval '7.000001 s'"),
    "timestamptz": (
        "TimeZone", "America/St_Johns", "timestamptz",
        "'2026-11-01T03:00:00Z'::timestamptz + i * interval '7 minutes 0.000001 s'",
    ),
}  # fmt: skip
TABLE = TargetTable(
    path=("shop_word",),
    key=(Column(name="word", type_name="text"),),
    columns=(Column(name="secret", type_name="uuid"),),
)


RUNS = {
    "one run": (True,),
    "two runs": (True, True),
    "the second run without the setting": (True, False),
    "the first run without the setting": (False, True),
}


@pytest.fixture
def settings(database: Database) -> Iterator[list[str]]:
    """The names of the role's settings that are reset in the end."""
    names: list[str] = []
    yield names
    for name in names:
        database.execute(SQL("{} RESET {}").format(_of_role(database), SQL(name)))
    database.execute("DROP TABLE IF EXISTS shop_word")


def _of_role(database: Database) -> Composed:
    """Begin a statement about the role's settings in this database: other tests use it at the same time."""
    ((name,),) = database.execute("SELECT current_database()")
    return SQL("ALTER ROLE CURRENT_USER IN DATABASE {}").format(Identifier(name))


def change_setting(database: Database, name: str, value: str, *, is_set: bool) -> None:
    """Give the role a setting, or take it back, and look whether its next sessions have it."""
    if is_set:
        change = SQL("{} SET {} = {}").format(_of_role(database), SQL(name), Literal(value))
    else:
        change = SQL("{} RESET {}").format(_of_role(database), SQL(name))
    database.execute(change)
    ((seen,),) = database.connect().execute(f"SHOW {name}".encode())
    assert str(seen).startswith(value) == is_set


@pytest.mark.parametrize(("of_key", "of_runs"), all_pairs(KEYS, RUNS))
def test_every_row_is_changed_exactly_once(
    database: Database, settings: list[str], of_key: str, of_runs: str
) -> None:
    setting, value, type_name, key = KEYS[of_key]
    runs = RUNS[of_runs]
    database.execute(f"CREATE TABLE shop_word (word {type_name} PRIMARY KEY, secret uuid)")
    database.execute(
        f"INSERT INTO shop_word SELECT {key}, gen_random_uuid() FROM generate_series(1, {ROWS}) AS i"
        f" WHERE ({key}) IS NOT NULL"
    )
    database.count_updates(TABLE)
    before = database.execute("SELECT secret FROM shop_word")
    settings.append(setting)

    # Django itself reads times in this style alone.
    with each_connection("SET DateStyle = 'ISO'"):
        for is_set in runs[:-1]:
            change_setting(database, setting, value, is_set=is_set)
            rotate(WORD, batch=7, stop_after_rows=len(before) // 2)
        change_setting(database, setting, value, is_set=runs[-1])
        outcome = rotate(WORD, batch=7)
        assert_unconfirmed(outcome, 0)

    assert outcome.rows == len(before)
    assert outcome.resumed == (len(runs) > 1)
    # The checkpoints mean the same rows to every run; else the last pass would have to find some.
    assert outcome.late_rows == 0
    assert set(database.execute("SELECT secret FROM shop_word")).isdisjoint(before)
    assert Counter(database.updates().values()) == {1: len(before)}
