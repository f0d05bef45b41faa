import json

import pytest

from rotator.events import LeakedValuesFound
from rotator.progress.summary import report, summary
from rotator.ranges import Key, KeyInterval, intervals_between
from tests.unit.progress_fakes import stopped

REJECTED = tuple((Key(f"[{key}]"), "check_violation on token_length") for key in range(23))
KEYS = (
    "rotation target status rows rows_total rows_total_is_exact rows_this_run late_rows unconfirmed_rows "
    "ranges seconds seconds_total rows_per_second deferrals retries outage_seconds pace limited_seconds "
    "throttled_seconds peak_memory_bytes concurrency batch heap_bytes_before heap_bytes "
    "index_bytes_before index_bytes dead_rows vacuums vacuum_seconds resumed rejected_keys error reason "
    "spans table_rows table_rows_is_exact indexes analyze_statement reindex_statements unchanged_rows "
    "started_at ended_at user host server table filters excludes generator include_null "
    "verification leaked"
)


def test_a_completed_run() -> None:
    assert summary(stopped(), resume_command="manage.py async_rotate").splitlines() == [
        "Completed: rotation 7 gave 1,000,000 rows of tickets.Ticket.token a new value.",
        "  rows         1,000,000",
        "  ranges       500 of up to 2,000 rows",
        "  workers      4",
        "  pace         balanced",
        "  time         40 s",
        "  rate         25,100 rows/s while writing",
        "  deferrals    0",
        "  retries      0",
        "  peak memory  50 MB",
    ]


def test_leaked_rows_get_another_value_by_a_rotation_of_all_rows() -> None:
    leaked = LeakedValuesFound(values=2, found=1, found_lines=("1",), other_lines=("2",))
    sentence = "A rotation of all rows gives these rows another new value, unless a filter excludes them."
    assert sentence in summary(stopped(rows=1, leaked=leaked)).splitlines()
    assert sentence not in summary(stopped(rows=0, leaked=leaked)).splitlines()
    assert sentence not in summary(stopped()).splitlines()


def test_an_interrupted_run_says_how_to_resume() -> None:
    end = stopped(
        status="interrupted",
        resumed=True,
        rows=700_000,
        rows_this_run=288_000,
        late_rows=12,
        seconds_total=125.0,
        outage_seconds=12.3,
        deferrals=5,
        retries=3,
        error="SIGINT asked it to stop.",
    )
    assert summary(end, resume_command="manage.py async_rotate tickets.Ticket.token").splitlines() == [
        (
            "Interrupted: rotation 7 of tickets.Ticket.token is unfinished; "
            "700,000 of 1,000,000 rows have a new value."
        ),
        "SIGINT asked it to stop.",
        "  rows         288,000 in this run, 700,000 in total; 12 late rows among them",
        "  ranges       500 of up to 2,000 rows",
        "  workers      4",
        "  pace         balanced",
        "  time         40 s in this run, 2 min 05 s in total",
        "  rate         25,100 rows/s while writing",
        "  deferrals    5",
        "  retries      3",
        "  unreachable  12 s",
        "  peak memory  50 MB",
        "Resume with: manage.py async_rotate tickets.Ticket.token",
    ]


def test_rejected_rows_are_named_up_to_twenty() -> None:
    lines = summary(stopped(status="failed", rejected_keys=REJECTED)).splitlines()
    assert lines[0].startswith("Failed: ")
    assert lines[-22:-20] == ["23 rows rejected by the server:", "  row [0]: check_violation on token_length"]
    assert lines[-2:] == ["  row [19]: check_violation on token_length", "  and 3 more"]


def test_a_completed_run_does_not_hide_its_rejected_rows() -> None:
    assert (
        summary(stopped(rejected_keys=REJECTED))
        .splitlines()[0]
        .endswith("a new value, except 23 rejected rows.")
    )


def test_unknown_memory_is_not_shown() -> None:
    assert "peak memory" not in summary(stopped(peak_memory_bytes=0))


def test_never_more_rows_than_there_are() -> None:
    assert "1,000,000 of 1,000,000 rows" in summary(stopped(status="failed", rows=1_000_012))


def test_the_error_stays_on_its_line() -> None:
    assert summary(stopped(status="failed", error="a\nb\x1b[2J")).splitlines()[1] == "a b [2J"


def test_the_report_has_these_keys_and_is_json() -> None:
    facts = report(stopped(rejected_keys=REJECTED[:1], rows_per_second=1 / 3))
    assert facts.keys() == set(KEYS.split())
    assert facts["rejected_keys"] == [{"key": "[0]", "reason": "check_violation on token_length"}]
    assert facts["rows_per_second"] == 0.333
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("spans", "shown"),
    [
        ([(None, "[5000]")], "up to [5000]"),
        ([(None, "[2000]"), ("[3000]", "[5000]")], "(start, [2000]], ([3000], [5000]]"),
        ([("[3000]", "[5000]")], "([3000], [5000]]"),
        ([(f"[{n}]", f"[{n + 1}]") for n in range(0, 14, 2)], "([8], [9]], and 2 more"),
    ],
)
def test_the_keys_that_were_written_are_shown(spans: list[tuple[str | None, str]], shown: str) -> None:
    event = stopped(
        status="interrupted",
        spans=tuple(
            KeyInterval(after=Key(after) if after else None, through=Key(through)) for after, through in spans
        ),
    )
    (line,) = (line for line in summary(event).splitlines() if line.startswith("  keys "))
    assert line.endswith(f" {shown}")


def test_gaps_leave_spans() -> None:
    def spans(*gaps: tuple[int | None, int]) -> list[str]:
        made = [
            KeyInterval(after=None if a is None else Key(f"[{a}]"), through=Key(f"[{b}]")) for a, b in gaps
        ]
        return [str(span) for span in intervals_between(made, Key("[9]"))]

    assert spans() == ["(start, [9]]"]
    assert spans((None, 9)) == []
    assert spans((5, 9)) == ["(start, [5]]"]
    assert spans((None, 2), (4, 6)) == ["([2], [4]]", "([6], [9]]"]
