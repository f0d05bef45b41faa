"""The options: their checks, their defaults, and the command to resume a run with."""

import os
import shlex
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.management import CommandError, CommandParser

from rotator.exceptions import OptionError
from rotator.management.commands.async_rotate import Command, _run_options
from rotator.management.terminal import resume_command, writable, write_report
from rotator.options import (
    COMMAND_OPTIONS,
    DEFAULT_OPTIONS,
    LARGE_BATCH,
    Duration,
    RotateOptions,
    RunOptions,
    Selection,
    given_options,
    is_id,
    read_duration,
    read_rows_or_duration,
    read_setting,
    read_size,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("100ms", 0.1),
        ("30s", 30.0),
        ("1.5m", 90.0),
        ("2h", 7200.0),
        (0.25, 0.25),
        (timedelta(minutes=2), 120.0),
    ],
)
def test_durations_have_units(value: Duration, expected: float) -> None:
    assert read_duration("outage_budget", value) == pytest.approx(expected)


@pytest.mark.parametrize("value", ["", "5", "m", "-1s", "1d", "5 m", "1e3s"])
def test_an_invalid_duration_is_refused(value: str) -> None:
    with pytest.raises(OptionError, match=r"^--outage-budget must be a duration \(100ms, 30s, 5m or 2h\)"):
        read_duration("outage_budget", value)


@pytest.mark.parametrize("value", ["0s", 0.0, -1.0, timedelta(0), "9000h", "99999999999999999999h"])
def test_a_duration_out_of_range_is_refused(value: Duration) -> None:
    with pytest.raises(OptionError, match=r"^--outage-budget must be from 1ms to 8760h, not "):
        read_duration("outage_budget", value)


def test_rows_are_whole_numbers_and_durations_are_not() -> None:
    assert read_rows_or_duration("stop_after", "5000") == (5000, None)
    assert read_rows_or_duration("stop_after", 5000) == (5000, None)
    assert read_rows_or_duration("stop_after", "30m") == (None, 1800.0)
    assert read_rows_or_duration("stop_after", None) == (None, None)


@pytest.mark.parametrize("text", ["-5", "many", "5k", "_", "5_", "\u0663", "9" * 5000])
def test_neither_rows_nor_a_duration_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"^--stop-after must be a number of rows "):
        read_rows_or_duration("stop_after", text)


@pytest.mark.parametrize("name", ["concurrency", "batch", "stop_after"])
@pytest.mark.parametrize("number", [0, 2**31])
def test_numbers_have_a_range(name: str, number: int) -> None:
    option = name.replace("_", "-")
    with pytest.raises(OptionError, match=f"^--{option} must be from 1 to 2,147,483,647, not {number}"):
        RunOptions.checked(**{name: number})  # type: ignore[arg-type] # each is a number


def test_only_ascii_digits_are_numbers() -> None:
    parser = Command().create_parser("manage.py", "async_rotate")
    for name in ("--batch", "--concurrency"):
        assert vars(parser.parse_args([name, "1_000"]))[name.removeprefix("--")] == 1000
        for text in ("\u0663", "\uff14", "+4", " 4", "_", "9" * 5000):
            with pytest.raises(CommandError, match=f"argument {name}: invalid int value: "):
                parser.parse_args([name, text])
    for text in ("\u0663", "_", "9" * 5000):
        with pytest.raises(OptionError, match=r"^batch must be a number or default, not "):
            read_setting("batch", text)
    with pytest.raises(OptionError, match=r"^--lock-timeout must be a duration "):
        read_duration("lock_timeout", "\u0663s")
    with pytest.raises(OptionError, match=r"^--max-slot-wal must be a size "):
        read_size("max_slot_wal", "\u0663GB")
    assert is_id("5")
    assert not is_id("\u0663")


# --- One set for the command, the API and Celery ---------------------------------------------------


def test_the_command_has_the_defaults_of_the_api() -> None:
    parser = Command().create_parser("manage.py", "async_rotate")
    assert isinstance(parser, CommandParser)
    defaults = vars(parser.parse_args([]))
    names = (
        *("concurrency", "batch", "restart", "take_over", "reindex"),
        *("stop_after", "lock_timeout", "outage_budget"),
    )
    assert RunOptions.checked(**{name: defaults[name] for name in names}) == RunOptions()
    assert RunOptions.checked() == RunOptions()
    assert defaults.keys() >= COMMAND_OPTIONS.keys()


def test_the_command_has_the_help_of_the_api() -> None:
    documentation = " ".join((RotateOptions.__doc__ or "").split())
    for name in RotateOptions.__annotations__.keys() - {"vacuum", "lag_of"}:
        text = COMMAND_OPTIONS[name]["help"].removesuffix(" Asks first on a terminal.")
        assert text
        assert f"{name}: {text}" in documentation


def test_the_help_names_the_defaults() -> None:
    given = RunOptions()
    for name, default in {
        "concurrency": given.concurrency,
        "batch": given.batch,
        "pace": given.pace,
        "lock_timeout": f"{given.limits.lock_seconds * 1000:.0f}ms",
        "outage_budget": f"{given.outage_budget_seconds / 60:.0f}m",
    }.items():
        assert f"(default: {default})." in COMMAND_OPTIONS[name]["help"]
    assert f" More than {LARGE_BATCH:,} " in COMMAND_OPTIONS["batch"]["help"]


def test_saved_options_of_a_newer_version_are_read() -> None:
    options = RunOptions(batch=7)
    saved = options.to_json() | {"newer": 1}
    saved["limits"] |= {"newer_seconds": 2.0}
    assert RunOptions.from_json(saved) == options
    selection = Selection(filters=("status=active",), include_null=True, ignore_derived=("checksum",))
    restored = Selection.from_json(selection.to_json() | {"filters": ["status=active"], "newer": [1]})
    assert (restored, restored.ignore_derived) == (selection, ("checksum",))


def test_saved_options_of_an_older_version_have_the_defaults() -> None:
    assert RunOptions.from_json({"batch": 7}) == RunOptions(batch=7)
    assert Selection.from_json({}) == Selection()


# One line for each option that a resumed run needs again; the others are for one run, or for its start.
GIVEN_AGAIN = (
    "--concurrency 3",
    "--batch 7",
    "--pace full",
    "--lock-timeout 250ms",
    "--outage-budget 90s",
    "--max-lag 9h --lag-of a --lag-of b",
    "--max-unarchived-wal 1536kB",
    "--max-slot-wal 2097152kB",
    "--prove --guard keep",
    "--celery",
    "--no-vacuum",
    "--reindex",
)
OF_ONE_RUN = {
    *("restart", "after", "take_over", "rotation", "stop_after_rows", "stop_after_seconds"),
    *("preflight", "sample", "listens_to_signals"),
}


def test_a_resumed_run_needs_each_option_that_is_not_the_default() -> None:
    parser = Command().create_parser("manage.py", "async_rotate")
    words = " ".join(GIVEN_AGAIN).split()

    def read(words: list[str]) -> RunOptions:
        return _run_options(vars(parser.parse_args(words)))

    options, defaults = read(words), read([])
    assert sorted(shlex.split(str(options))) == sorted(words)
    assert read(shlex.split(str(options))) == options
    assert str(defaults) == DEFAULT_OPTIONS
    same = {name for name, value in options.to_json().items() if value == defaults.to_json()[name]}
    assert same <= OF_ONE_RUN


@pytest.mark.parametrize("value", ["1ms", "1.5ms", "290ms", "1s", "1234567ms", "61s", "8759m", "8760h"])
def test_a_duration_is_given_again_as_it_was(value: str) -> None:
    options = RunOptions.checked(outage_budget=value)
    assert str(options) == f"--outage-budget {value}"
    assert RunOptions.checked(outage_budget=str(options).split()[1]) == options


def test_the_only_worker_of_leaked_values_was_not_chosen_by_the_user() -> None:
    options = RunOptions(concurrency=1, batch=7).to_json()
    assert str(given_options(options, Selection(leaked="list").to_json())) == "--batch 7"
    assert str(given_options(options, Selection().to_json())) == "--concurrency 1 --batch 7"


# --- The command line ------------------------------------------------------------------------------


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


def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Cannot write to the file"):
        writable(tmp_path / "missing" / "report.json")
    with pytest.raises(OptionError, match="No space left on device"):
        writable("/dev/full")


def test_a_named_pipe_is_refused_without_waiting_for_its_reader(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OptionError, match=f"the file {path}: it is a named pipe. Name another file."):
            writable(path)


def test_devices_and_pipes_of_the_shell_are_written() -> None:
    reader, writer = os.pipe()
    try:
        for path in (Path("/dev/null"), Path(f"/dev/fd/{writer}")):
            assert writable(path) == path
            write_report(path, {"status": "completed"})
        assert os.read(reader, 1000) == b'{\n  "status": "completed"\n}\n'
    finally:
        os.close(reader)
        os.close(writer)
