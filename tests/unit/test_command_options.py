"""How options are read, and the command that a summary tells to resume with."""

from pathlib import Path

import pytest

from rotator.exceptions import OptionError
from rotator.management.options import resume_command, rows_or_seconds, seconds, writable


@pytest.mark.parametrize(
    ("text", "expected"), [("100ms", 0.1), ("30s", 30.0), ("1.5m", 90.0), ("2h", 7200.0), (0.25, 0.25)]
)
def test_times_have_units(text: str | float, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "5", "m", "-1s", "0s", "1d", "5 m", "1e3s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="write it as 100ms, 30s, 5m or 2h"):
        seconds(text)


def test_rows_are_whole_numbers_and_times_are_not() -> None:
    rows, time = rows_or_seconds("5000"), rows_or_seconds("30m")
    assert (rows, type(rows)) == (5000, int)
    assert (time, type(time)) == (1800.0, float)
    assert rows_or_seconds(None) is None


@pytest.mark.parametrize("text", ["0", "-5", "many", "5k"])
def test_what_is_neither_rows_nor_a_time_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="neither rows"):
        rows_or_seconds(text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["manage.py", "async_rotate"], "python manage.py async_rotate"),
        (["/usr/bin/django-admin", "async_rotate", "a.B.c"], "/usr/bin/django-admin async_rotate a.B.c"),
        (
            ["manage.py", "async_rotate", "--restart", "--batch", "9", "--stop-after", "5m", "--take-over"],
            "python manage.py async_rotate --batch 9",
        ),
        (["manage.py", "async_rotate", "--stop-after=7", "--report", "a b"], None),
    ],
)
def test_what_was_meant_for_one_run_is_not_told_to_the_next(
    arguments: list[str], expected: str | None
) -> None:
    told = resume_command(arguments, python=Path("/opt/python/bin/python3"), folder=Path("/home/me/shop"))
    assert told == (expected or "python manage.py async_rotate --report 'a b'")


def test_an_environment_below_the_folder_is_named() -> None:
    told = resume_command(
        ["manage.py", "async_rotate"],
        python=Path("/home/me/shop/.venv/bin/python"),
        folder=Path("/home/me/shop"),
    )
    assert told == ".venv/bin/python manage.py async_rotate"


def test_an_older_report_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("old")
    assert writable(str(report)) == report
    assert report.read_text() == "old"


def test_a_report_is_not_begun_before_there_is_something_to_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert writable(report) == report
    assert not report.exists()


@pytest.mark.parametrize("text", ["9000h", "99999999999999999999h"])
def test_no_time_is_longer_than_a_year(text: str) -> None:
    with pytest.raises(OptionError, match="too long"):
        seconds(text)


def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written to"):
        writable(tmp_path / "missing" / "report.json")
