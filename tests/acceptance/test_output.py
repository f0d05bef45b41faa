"""What the command says to pipes, to programs and into its report."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from rotator import __version__
from rotator.models import Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import (
    COMMAND,
    MANAGE,
    Commands,
    number,
    query,
    url_of,
    wait_for_checkpoints,
    wait_until,
)

REPORT_KEYS = {
    "rotation",
    "target",
    "status",
    "rows",
    "rows_total",
    "rows_total_is_exact",
    "rows_this_run",
    "late_rows",
    "unconfirmed_rows",
    "ranges",
    "seconds",
    "seconds_total",
    "rows_per_second",
    "deferrals",
    "retries",
    "outage_seconds",
    "pace",
    "limited_seconds",
    "throttled_seconds",
    "heap_bytes_before",
    "heap_bytes",
    "index_bytes_before",
    "index_bytes",
    "dead_rows",
    "vacuums",
    "vacuum_seconds",
    "peak_memory_bytes",
    "concurrency",
    "batch",
    "resumed",
    "rejected_keys",
    "error",
    "reason",
    "spans",
    "table_rows",
    "table_rows_is_exact",
    "indexes",
    "analyze_statement",
    "reindex_statements",
    "unchanged_rows",
    "started_at",
    "ended_at",
    "user",
    "host",
    "server",
    "table",
    "filters",
    "excludes",
    "generator",
    "include_null",
    "verification",
    "leaked",
}
HEAD_KEYS = {"event", "at", "rotation"}
EVENT_KEYS = {
    "preflight": {
        "target",
        "database",
        "server_name",
        "table_name",
        "concurrency",
        "rows_left",
        "unfinished",
        "table",
        "server",
        "sample",
        "selection",
        "bypassed",
        "warnings",
        "wal_bytes",
        "forced_checkpoints",
        "estimated_seconds",
        "proves",
        "guard",
    },
    "started": {
        "target",
        "rows_total",
        "rows_total_is_exact",
        "rows_done",
        "late_rows",
        "seconds_before",
        "stopped_at",
        "concurrency",
        "batch",
        "pace",
        "deferrals_before",
        "retries_before",
        "throttled_seconds_before",
        "resumed",
    },
    "progress": {
        "state",
        "rows_done",
        "rows_total",
        "rows_total_is_exact",
        "percent",
        "rows_per_second",
        "eta_seconds",
        "late_rows",
        "deferrals",
        "retries",
        "rejected_rows",
        "outage_left_seconds",
        "lock_holders",
        "pace",
        "throttles",
        "throttled_seconds",
    },
    "drain_started": {"reason", "by"},
    "stopped": REPORT_KEYS,
}
CONTROL = re.compile(r"[^\n -~]")


def untimed(said: str) -> list[str]:
    """Return the lines without the time that each of them begins with."""
    now = datetime.now(UTC)
    lines = []
    for line in said.splitlines():
        at, _, rest = line.partition(" ")
        assert re.fullmatch(r"[-0-9]{10}T[:0-9]{8}Z", at)
        assert abs(datetime.fromisoformat(at) - now) < timedelta(minutes=5)
        lines.append(rest)
    return lines


def test_pipes_get_lines_without_control_characters(commands: Commands) -> None:
    audited_tickets(5000)
    finished = commands.run("--batch", "50")

    rotation = Rotation.objects.get()
    assert CONTROL.search(finished.out + finished.err) is None
    *screen, undone, started, last, ended = untimed(finished.err)
    assert screen[0].startswith("Before the first write to tickets.Ticket.token ")
    assert undone.startswith("  - ")
    assert last.startswith("all rows are rotated; running the final VACUUM")
    assert started == (
        f"rotation {rotation.pk} of tickets.Ticket.token starts: 5,000 rows, 4 workers, 50 rows a range"
    )
    assert ended.startswith(f"rotation {rotation.pk} of tickets.Ticket.token completed after ")
    assert finished.summary[0] == (
        f"Completed: rotation {rotation.pk} gave 5,000 rows of tickets.Ticket.token a new value."
    )
    assert "Resume with:" not in finished.out


def test_json_is_one_object_a_line_and_the_summary_elsewhere(commands: Commands) -> None:
    audited_tickets(20_000)
    slow_down(0.1)
    finished = commands.run("--progress", "json", "--batch", "200", "--stop-after", "10000")

    assert finished.status == 0
    events = [json.loads(line) for line in finished.out.splitlines()]
    names = [event["event"] for event in events]
    assert names[:2] == ["preflight", "started"]
    assert names[-2:] == ["drain_started", "stopped"]
    assert set(names[2:-2]) == {"progress"}
    for event in events:
        assert set(event) == HEAD_KEYS | EVENT_KEYS[event["event"]]
        assert event["rotation"] == (None if event["event"] == "preflight" else Rotation.objects.get().pk)
        assert datetime.fromisoformat(event["at"]).tzinfo is not None
    assert (events[-1]["status"], events[-1]["rows"], events[-1]["ranges"]) == ("interrupted", 10_000, 50)
    assert finished.err.startswith("Interrupted: ")
    assert finished.err.splitlines()[-1].startswith("Resume with: ")


def test_none_is_the_summary_alone(commands: Commands) -> None:
    audited_tickets(1000)
    finished = commands.run("--progress", "none")

    assert (finished.status, finished.err) == (0, "")
    assert finished.summary[0].startswith("Completed: ")
    assert all(line.startswith("  ") for line in finished.summary[1:])


def test_the_report_says_what_the_summary_says(commands: Commands, tmp_path: Path) -> None:
    audited_tickets(3000)
    file = tmp_path / "report.json"
    file.write_text("something longer than the report, of an earlier run" * 100)
    options = ("--batch", "100", "--concurrency", "3", "--report", str(file))
    stopped = commands.run(*options, "--stop-after", "1000")
    first = json.loads(file.read_text())
    completed = commands.go_on(stopped)
    second = json.loads(file.read_text())

    assert completed.status == 0
    assert set(first) == set(second) == REPORT_KEYS
    rotation = Rotation.objects.get()
    expected = {
        "rotation": rotation.pk,
        "target": "tickets.Ticket.token",
        "status": "completed",
        "rows": 3000,
        "rows_total": 3000,
        "rows_total_is_exact": True,
        "rows_this_run": 2000,
        "ranges": 20,
        "deferrals": 0,
        "retries": 0,
        "concurrency": 3,
        "batch": 100,
        "resumed": True,
        "rejected_keys": [],
        "error": "",
    }
    assert {name: second[name] for name in expected} == expected
    assert (first["status"], first["rows"], first["resumed"], first["error"], first["reason"]) == (
        "interrupted",
        1000,
        False,
        "",
        "stopped by --stop-after",
    )
    assert (second["user"], second["host"]) == (rotation.owner_user, rotation.owner_host)
    assert re.fullmatch(r"\w+@[^@]+:\d+/\w+", second["server"])
    assert (second["table"], second["filters"], second["generator"]) == ("public.tickets_ticket", [], "")
    started_at, ended_at = (datetime.fromisoformat(second[name]) for name in ("started_at", "ended_at"))
    assert started_at.tzinfo is not None
    assert (ended_at - started_at).total_seconds() == pytest.approx(second["seconds"], abs=0.5)
    assert second["seconds_total"] > second["seconds"] > 0
    assert second["seconds_total"] == pytest.approx(first["seconds_total"] + second["seconds"], abs=0.1)
    assert second["peak_memory_bytes"] > 10_000_000
    assert second["rows_per_second"] > 0


def test_a_resumed_run_says_how_far_it_was_and_when_it_stopped(commands: Commands) -> None:
    audit = audited_tickets(8000)
    stopped = commands.run("--stop-after", "5000")
    left_at = Rotation.objects.get().updated_at
    assert stopped.status == 0
    assert audit.assert_checkpoints_and_tokens_agree() == audit.changed() == 5000
    assert stopped.resume_command[1:] == ["manage.py", COMMAND]

    resumed = commands.go_on(stopped)

    rotation = Rotation.objects.get()
    assert re.fullmatch(
        f"rotation {rotation.pk} of tickets.Ticket.token resumes: 5,000 of 8,000 rows were done in "
        f"[0-9.]+ s when it stopped at {left_at:%Y-%m-%d %H:%M:%S} UTC",
        untimed(resumed.err)[0],
    )
    assert resumed.summary[1].split() == ["rows", "3,000", "in", "this", "run,", "8,000", "in", "total"]
    audit.assert_rotated()


def test_stop_after_a_time(commands: Commands) -> None:
    audit = audited_tickets(20_000)
    slow_down(0.1)
    stopped = commands.run("--batch", "100", "--stop-after", "1s", "--progress", "json")
    seconds = json.loads(stopped.out.splitlines()[-1])["seconds"]

    assert stopped.status == 0
    assert seconds >= 1
    assert Rotation.objects.get().status == "interrupted"
    assert 0 < audit.assert_checkpoints_and_tokens_agree() < 20_000
    speed_up()
    assert commands.run().status == 0
    audit.assert_rotated()


def test_restart_does_not_ask_without_a_terminal(commands: Commands) -> None:
    audit = audited_tickets(6000)
    commands.run("--stop-after", "2000")
    between = audit.assert_checkpoints_and_tokens_agree()
    stopped = commands.run("--restart", "--stop-after", "3000")

    assert (stopped.status, between) == (0, 2000)
    assert list(Rotation.objects.order_by("pk").values_list("status", flat=True)) == [
        "abandoned",
        "interrupted",
    ]
    # Not --restart again, which would abandon the rotation that it advises to resume.
    assert stopped.resume_command[1:] == ["manage.py", COMMAND]
    assert commands.go_on(stopped).status == 0
    assert audit.changed() == 6000
    assert Rotation.objects.latest("pk").status == "completed"


def test_a_filtered_rotation_says_so_wherever_it_completes(commands: Commands, tmp_path: Path) -> None:
    audit = audited_tickets(6000)
    file = tmp_path / "report.json"
    finished = commands.run("--filter", "title__endswith=0", "--report", str(file))

    assert finished.status == 0
    changed = number("SELECT count(*) FROM tickets_ticket WHERE title LIKE '%0'")
    assert audit.changed() == changed == 600
    sentence = "600 of 6,000 rows match the filter; 5,400 were left unchanged"
    assert finished.summary[0].endswith(f"gave 600 rows of tickets.Ticket.token a new value. {sentence}.")
    assert untimed(finished.err)[-1].endswith(f": 600 rows in this run; {sentence}")
    report = json.loads(file.read_text())
    assert (report["rows"], report["table_rows"], report["unchanged_rows"]) == (600, 6000, 5400)
    assert report["filters"] == ["title__endswith=0"]
    pk = str(Rotation.objects.get().pk)
    for words in ((), (pk,)):
        listed = commands.start(*words, program=(*MANAGE, "rotations")).wait()
        assert "600 of 600 that match the filter" in listed.out
    followed = commands.start(pk, "--follow", program=(*MANAGE, "rotations")).wait()
    assert followed.out == "completed: 600 of 600 rows that match the filter (100%)\n"
    facts = json.loads(commands.start("--json", program=(*MANAGE, "rotations")).wait().out)
    assert facts[0]["is_filtered"] is True


def test_a_canary_says_which_keys_to_look_at(commands: Commands, tmp_path: Path) -> None:
    audited_tickets(6000)
    file = tmp_path / "report.json"
    stopped = commands.run("--batch", "500", "--stop-after", "2500", "--report", str(file))

    last = number("SELECT max((through->>0)::bigint) FROM rotator_completedrange")
    assert stopped.summary[3].split() == ["keys", "up", "to", f"[{last}]"]
    assert json.loads(file.read_text())["spans"] == [{"after": None, "through": f"[{last}]"}]
    assert "  keys " not in commands.run().out


@pytest.mark.parametrize("options", [(), pytest.param(("--progress=lines",), marks=pytest.mark.slow)])
def test_verbosity_0_is_silent(commands: Commands, options: tuple[str, ...]) -> None:
    audit = audited_tickets(1000)
    finished = commands.run("-v0", *options)
    assert (finished.status, finished.out, finished.err) == (0, "", "")
    audit.assert_rotated()


def test_verbosity_0_tells_of_errors(commands: Commands) -> None:
    audited_tickets(100)
    query("ALTER TABLE tickets_ticket ADD CONSTRAINT frozen CHECK (id <> 8) NOT VALID")
    try:
        finished = commands.run("--verbosity=0")
    finally:
        query("ALTER TABLE tickets_ticket DROP CONSTRAINT frozen")
    assert (finished.status, finished.out) == (1, "")
    assert finished.complaint.startswith("Failed: rotation ")
    assert commands.run("-v0").err == ""
    assert commands.run("-v0").complaint.startswith("Rotation ")


@pytest.mark.parametrize("command", ["async_rotate", "rotations"])
def test_the_version_is_that_of_the_app(commands: Commands, command: str) -> None:
    finished = commands.start("--version", program=(*MANAGE, command)).wait()
    assert (finished.status, finished.out) == (0, f"{__version__}\n")


@pytest.mark.slow
def test_while_a_range_waits_for_a_lock_the_eta_is_unknown(commands: Commands) -> None:
    audit = audited_tickets(8000)
    slow_down(0.15)
    with psycopg.connect(url_of()) as other:
        other.execute("SELECT FROM tickets_ticket WHERE id = (SELECT max(id) FROM tickets_ticket) FOR UPDATE")
        running = commands.start("--batch", "100", "--pace", "full", "--progress", "json")
        wait_for_checkpoints(79)
        said = running.out.count('"progress"')
        wait_until(lambda: running.out.count('"progress"') > said + 5, "progress while it waits")
        other.rollback()
    assert running.wait().status == 0

    events = [json.loads(line) for line in running.out.splitlines()]
    shown = [event for event in events if event["event"] == "progress"]
    assert any(event["eta_seconds"] for event in shown)
    waiting = [event["eta_seconds"] for event in shown if 7900 <= event["rows_done"] < 8000]
    assert len(waiting) >= 5
    # The first second may be the time that a range takes.
    assert waiting[2:] == [None] * len(waiting[2:])
    audit.assert_rotated()
