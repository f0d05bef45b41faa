import io
import subprocess
import sys

import pytest

import rotator.progress
from rotator.progress import PROGRESS_KINDS, ProgressKind, open_progress, summary_stream
from tests.unit.progress_fakes import Terminal, started, stopped


def told(kind: ProgressKind, err: io.StringIO) -> tuple[str, str]:
    out = io.StringIO()
    with open_progress(kind, out=out, err=err) as observer:
        observer(started())
        observer(stopped())
    return out.getvalue(), err.getvalue()


def test_the_kinds_are_those_of_the_option() -> None:
    assert PROGRESS_KINDS == ("auto", "bar", "lines", "json", "log", "none")


def test_lines_go_to_err() -> None:
    out, err = told("lines", io.StringIO())
    assert out == ""
    assert "Z rotation 7 of tickets.Ticket.token starts" in err.splitlines()[0]


def test_json_goes_to_out_and_nothing_else_does() -> None:
    out, err = told("json", io.StringIO())
    assert out.startswith('{"event": "started"')
    assert err == ""


def test_log_goes_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rotator"):
        assert told("log", io.StringIO()) == ("", "")
    assert [record.name for record in caplog.records] == ["rotator", "rotator"]


def test_none_says_nothing() -> None:
    assert told("none", io.StringIO()) == ("", "")


def test_auto_is_lines_where_there_is_no_terminal() -> None:
    _, err = told("auto", io.StringIO())
    assert err.endswith("1,000,000 rows in this run\n")
    assert "\x1b" not in err


def test_auto_is_the_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(rotator.progress, "terminal_columns", lambda _stream: 100)
    _, err = told("auto", Terminal())
    assert "█" in err


@pytest.mark.parametrize(("term", "columns"), [("dumb", 100), ("xterm", 0)])
def test_auto_is_lines_on_a_terminal_that_cannot_draw(
    monkeypatch: pytest.MonkeyPatch, term: str, columns: int
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(rotator.progress, "terminal_columns", lambda _stream: columns)
    _, err = told("auto", Terminal())
    assert "\x1b" not in err


def test_auto_is_lines_where_the_bar_has_no_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(rotator.progress, "terminal_columns", lambda _stream: 100)
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    _, err = told("auto", Terminal())
    assert "\x1b" not in err


def test_the_summary_keeps_out_of_the_way_of_json() -> None:
    out, err = io.StringIO(), io.StringIO()
    assert [summary_stream(kind, out=out, err=err) is err for kind in PROGRESS_KINDS] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_alive_progress_loads_only_with_the_bar() -> None:
    code = "import sys, rotator.progress; sys.exit('alive_progress' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
