"""What a verification says, by what it has found."""

import json
from dataclasses import replace

import pytest

from rotator.progress.summary import verification_report, verification_summary, verification_verdict
from rotator.ranges import Key, KeyInterval
from tests.unit.progress_fakes import CONTROLS, COVERAGE, VERIFIED

CONTROLLED = (
    "1,000 of 1,000 sampled rows found before the rotation; 3 of 3 planted values found; "
    "1,001 of 1,001 entries in the ledger"
)
GAP = KeyInterval(after=None, through=Key("[9]"))


def test_a_verified_rotation() -> None:
    assert VERIFIED.exit_status == 0
    assert verification_summary(VERIFIED).splitlines() == [
        "Verified: no row of shop.Order.api_key has an old value of rotation 7.",
        "  status       completed",
        "  written      1,000 rows confirmed",
        "  not written  0 rows since the start",
        "  in gaps      0 rows",
        "  rejected     0 rows",
        "  excluded     0 rows that do not match the filters now",
        "  kept         0 rows with NULL, 0 with ''",
        "  searched     1,000 rows",
        "  survivors    0 rows",
        "  false hits   0 expected among them, by chance",
        f"  controls     {CONTROLLED}",
    ]


@pytest.mark.parametrize(
    ("change", "beginning"),
    [
        ({"survivors": 1}, "Not verified: 1 row of shop.Order.api_key has an old value of rotation 7. Run: "),
        ({"survivors": 2}, "Not verified: 2 rows of shop.Order.api_key have an old value"),
        ({"survivors": None, "controls": None}, "Not verified: it is unknown whether old values"),
        ({"controls": replace(CONTROLS, planted_found=2)}, "Not verified: a control of rotation 7"),
        ({"controls": replace(CONTROLS, entries_found=9)}, "Not verified: a control of rotation 7"),
        ({"controls": replace(CONTROLS, is_salt_right=False)}, "Not verified: a control of rotation 7"),
        ({"coverage": replace(COVERAGE, older_rows=1)}, "Not verified: rotation 7 of shop.Order.api_key has"),
        ({"coverage": replace(COVERAGE, gaps=(GAP,))}, "Not verified: rotation 7 of shop.Order.api_key has"),
        ({"coverage": replace(COVERAGE, rejected_keys=((Key("[9]"), "check"),))}, "Not verified: rotation 7"),
        ({"coverage": replace(COVERAGE, status="failed")}, "Not verified: rotation 7 of shop.Order.api_key"),
        ({"error": "It is gone."}, "Not verified: the verification of rotation 7 of shop.Order.api_key did"),
    ],
)
def test_anything_that_is_left_ends_with_1(change: dict[str, object], beginning: str) -> None:
    changed = replace(VERIFIED, **change)  # type: ignore[arg-type] # fields of the class
    assert (changed.is_verified, changed.exit_status) == (False, 1)
    assert verification_verdict(changed).startswith(beginning)


def test_what_was_left_out_on_purpose_does_not() -> None:
    left_out = replace(COVERAGE, excluded_rows=5, null_rows=3, blank_rows=2, unconfirmed_rows=4)
    assert replace(VERIFIED, coverage=left_out).exit_status == 0


def test_many_survivors_are_named_up_to_twenty() -> None:
    keys = tuple(Key(f"[{number}]") for number in range(30))
    text = verification_summary(replace(VERIFIED, survivors=40, survivor_keys=keys))
    assert "40 rows: [0], [1]" in text
    assert "[19], and 20 more" in text


def test_the_report_is_json() -> None:
    rejected = replace(COVERAGE, gaps=(GAP,), rejected_keys=((Key("[9]"), "check_violation"),))
    facts = verification_report(replace(VERIFIED, coverage=rejected))
    assert json.loads(json.dumps(facts)) == facts | {
        "survivor_keys": [],
        "coverage": _lists(facts["coverage"]),
    }
    assert facts["started_at"] == "2026-11-27T12:00:00.000+00:00"


def _lists(coverage: object) -> object:
    return json.loads(json.dumps(coverage))
