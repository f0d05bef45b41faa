"""Rows that the server refuses to update: all others are done, and these are named."""

import json
from pathlib import Path

import pytest

from tests.faults.database import Database, make_tickets
from tests.faults.harness import Rotations, assert_completed

ROWS = 4000
KEYS = (100, 2000, 3998)

_KEYS_SQL = ", ".join(map(str, KEYS))


@pytest.mark.parametrize(
    ("cause", "remedy", "reason"),
    [
        (
            f"ALTER TABLE tickets_ticket ADD CONSTRAINT frozen CHECK (id NOT IN ({_KEYS_SQL})) NOT VALID",
            "ALTER TABLE tickets_ticket DROP CONSTRAINT frozen",
            "check_violation (23514) of frozen",
        ),
        (
            (
                "CREATE FUNCTION telltale() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " RAISE EXCEPTION 'from % to %', OLD.token, NEW.token USING DETAIL = NEW.token::text; END $$;"
                " CREATE TRIGGER telltale BEFORE UPDATE ON tickets_ticket FOR EACH ROW"
                f" WHEN (OLD.id IN ({_KEYS_SQL})) EXECUTE FUNCTION telltale()"
            ),
            "DROP FUNCTION telltale() CASCADE",
            "raise_exception (P0001), in the function telltale()",
        ),
    ],
    ids=["check", "trigger"],
)
def test_rows_that_cannot_be_updated(
    database: Database, rotations: Rotations, tmp_path: Path, cause: str, remedy: str, reason: str
) -> None:
    audit = make_tickets(database, ROWS)
    database.query(cause)

    finished = rotations.rotated(database.url(), f"--report={tmp_path / 'report'}", "-v3", "--traceback")

    assert finished.status == 1
    assert "Traceback" not in finished.err
    for key in KEYS:
        assert f"row [{key}] is rejected: {reason}" in finished.err
        assert f"  row [{key}]: {reason}" in finished.out
    report = (tmp_path / "report").read_text()
    assert sorted(json.loads(report)["rejected_keys"], key=str) == sorted(
        ({"key": f"[{key}]", "reason": reason} for key in KEYS), key=str
    )
    assert json.loads(report)["status"] == database.status() == "failed"
    assert audit.changed() == ROWS - len(KEYS)
    audit.assert_each_row_written_at_most_once()
    said = finished.out + finished.err + report
    assert [token for token in audit.old_tokens() + database.tokens() if token in said] == []

    database.query(remedy)
    resumed = rotations.rotated(database.url())

    assert_completed(resumed)
    assert f"3 in this run, {ROWS:,} in total" in resumed.out
    audit.assert_rotated_once()
