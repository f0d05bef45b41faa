import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from rotator.events import (
    DrainStarted,
    Event,
    LateCommitsAwaited,
    LockHeld,
    OutageEnded,
    OutageStarted,
    RangeDeferred,
    StopReason,
    Tick,
)
from rotator.progress.bar import BarObserver, Screen, bar_text, fitting
from rotator.stats import Stats
from tests.unit.progress_fakes import Clock, Gone, Terminal, completed, resumed, started, stopped

SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"


def bar(
    stream: Terminal, clock: Clock | None = None, *, columns: int = 100
) -> AbstractContextManager[Callable[[Event], None]]:
    return BarObserver(stream, clock=clock or Clock(), columns=lambda: columns, refresh_seconds=0.01)


def left_on(stream: Terminal) -> list[str]:
    """Return the lines that stay readable, without escape sequences and overwritten frames."""
    lines = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", stream.getvalue()).split("\n")
    return [line.rsplit("\r", 1)[-1].rstrip() for line in lines]


def test_a_completed_run_leaves_a_full_bar_without_a_warning() -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(started(rows_total=4000))
        observer(completed())
        observer(completed())
        observer(stopped(rows=4000))
    notice, receipt, rest = left_on(stream)
    assert notice.startswith("rotation 7 of tickets.Ticket.token starts: 4,000 rows")
    assert receipt == "|" + "█" * 20 + "| 4,000 rows  100%  in 40 s, 25,100 rows/s while writing"
    assert rest == ""


@pytest.mark.parametrize("rows", [3998, 4002])
def test_rows_that_came_or_went_neither_warn_nor_overflow(rows: int) -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(started(rows_total=4000))
        observer(completed(rows=rows))
        observer(Tick())
        observer(stopped(rows=rows))
    receipt = left_on(stream)[1]
    assert receipt.startswith("|" + "█" * 20 + f"| {rows:,} rows  100%")
    assert "(!)" not in stream.getvalue()
    assert "✗" not in stream.getvalue()


def test_a_resumed_run_starts_where_it_stopped() -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(resumed())
        observer(stopped(status="interrupted", rows=412_000))
    assert left_on(stream)[0].endswith("when it")
    assert left_on(stream)[1] == "stopped at 2026-03-01 12:03:05 UTC"
    receipt = left_on(stream)[2]
    assert receipt.startswith("|████████▎⚠")
    assert receipt.endswith("| (!) 412,000 of 1,000,000 rows  41%  interrupted after 40 s")


def test_the_mark_has_its_place_on_a_narrow_terminal() -> None:
    stream = Terminal()
    with bar(stream, columns=40) as observer:
        observer(resumed())
        observer(stopped(status="interrupted", rows=412_000))
    assert left_on(stream)[-2].endswith("(!) 41%  interrupted")


def test_a_failed_run_with_all_rows_done_is_marked() -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(started(rows_total=4000))
        observer(completed(rows=4000))
        observer(Tick())
        observer(stopped(status="failed", rows=4000))
    assert left_on(stream)[1].endswith("(!) 4,000 of 4,000 rows  100%  failed after 40 s")


def test_nothing_to_do_does_not_crash() -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(started(rows_total=0))
        observer(Tick())
        observer(stopped(rows=0))
    assert left_on(stream)[1].endswith("| 0 rows  100%  in 40 s, 25,100 rows/s while writing")


def test_an_outage_can_take_rows_back() -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(resumed(rows_done=500_000))
        observer(OutageStarted(reason="refused", budget_seconds=300))
        observer(OutageEnded(seconds=2, rows_done=250_000, late_rows=0))
        observer(stopped(status="interrupted", rows=250_000))
    assert left_on(stream)[-2].startswith("|█████⚠")
    assert "| (!) 250,000 of 1,000,000 rows  25%" in left_on(stream)[-2]


def test_the_cursor_comes_back_after_an_exception() -> None:
    stream = Terminal()

    def fail() -> None:
        with bar(stream) as observer:
            observer(started())
            observer(completed(rows=100_000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert stream.getvalue().rindex(SHOW) > stream.getvalue().rindex(HIDE)
    assert left_on(stream)[1].endswith("(!) 100,000 of 1,000,000 rows  10%  stopped")


def test_a_run_that_never_started_draws_no_bar() -> None:
    stream = Terminal()
    with bar(stream) as observer:
        observer(Tick())
        observer(DrainStarted(reason=StopReason.SIGTERM))
        observer(stopped(status="failed"))
    assert left_on(stream) == ["SIGTERM: draining; ranges in flight are committed, and no new ones start", ""]
    assert HIDE not in stream.getvalue()


@pytest.mark.parametrize("columns", [12, 20, 40, 79])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    stream = Terminal()
    with bar(stream, columns=columns) as observer:
        observer(resumed())
        observer(OutageStarted(reason="connection refused", budget_seconds=300))
        observer(LateCommitsAwaited(holders=("pid 4711, app, psql, since 12:03:05",)))
        observer(DrainStarted(reason=StopReason.SIGINT))
        observer(stopped(status="interrupted", rows=412_000))
    words = [line for line in left_on(stream) if " " in line and "|" not in line]
    frames = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
    # Narrower terminals break lines themselves.
    assert columns < 30 or all(len(line) < columns for line in words)
    assert all(len(frame.replace("︎", "")) <= columns for frame in frames if "|" in frame)


def test_a_terminal_that_hung_up_does_not_stop_the_run() -> None:
    stream = Gone(3)
    with BarObserver(stream, clock=Clock(), columns=lambda: 80, refresh_seconds=0.01) as observer:
        observer(started())
        observer(completed())
        observer(stopped())
    assert stream.left == 0


def stats_after(*events: Event, ranges: int = 0, seconds: float = 0.0) -> Stats:
    clock = Clock()
    stats = Stats(clock=clock)
    for event in events:
        stats.take(event)
    for step in range(1, ranges + 1):
        clock.now = step / 10
        stats.take(completed())
    clock.now += seconds
    return stats


AMPLE, COMPACT = "  200,000 of 1,000,000 rows   20%", "  200,000 of 1,000,000   20%"


@pytest.mark.parametrize(
    ("room", "text"),
    [
        (95, f"{AMPLE}     20,000 rows/s  ETA 40 s        "),
        (66, f"{COMPACT}     20,000 rows/s  ETA 40 s        "),
        (44, " 20%     20,000 rows/s  ETA 40 s        "),
        (30, " 20%  ETA 40 s        "),
        (18, " 20%  40 s        "),
        (9, " 20%"),
        (2, " 2"),
        (0, ""),
    ],
)
def test_what_there_is_room_for_is_shown(room: int, text: str) -> None:
    stats = stats_after(started(), ranges=100)
    assert bar_text(stats, room) == text


EVENTS: list[Event] = [
    started(),
    *[completed() for _ in range(200)],
    RangeDeferred(rows=2000),
    OutageStarted(reason="refused", budget_seconds=300),
    OutageEnded(seconds=2, rows_done=600, late_rows=0),
    LateCommitsAwaited(holders=("pid 1", "pid 2")),
    DrainStarted(reason=StopReason.SIGINT),
]


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_no_figure_comes_goes_or_moves(columns: int) -> None:
    clock, room = Clock(), columns - min(30, columns // 5) - 4
    stats = Stats(clock=clock)
    percent_at, shows_rows = set[int](), set[bool]()
    for step, event in enumerate(EVENTS):
        clock.now = step / 10
        stats.take(event)
        text = bar_text(stats, room)
        percent_at.add(text.index("%"))
        shows_rows.add("of 1,000,000" in text)
        assert len(text) <= room
    assert len(percent_at) == len(shows_rows) == 1


def test_deferrals_are_shown_where_there_is_room() -> None:
    stats = stats_after(started(), RangeDeferred(rows=2000), ranges=100)
    assert bar_text(stats, 92) == f"{AMPLE}     20,000 rows/s  ETA 40 s            1 deferral"
    assert "deferral" not in bar_text(stats, 80)


def test_unknown_figures_are_said_to_be() -> None:
    stats = stats_after(started(rows_total_is_exact=False))
    assert "? rows/s  ETA unknown" in bar_text(stats, 99)
    assert "0 of about 1,000,000 rows" in bar_text(stats, 99)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (OutageStarted(reason="refused", budget_seconds=300), "unreachable 8 s, 4 min 52 s left"),
        (LateCommitsAwaited(holders=("pid 1", "pid 2")), "waiting for 2 transactions"),
        (LockHeld(holders=("pid 4711, psql, idle", "pid 3")), "waiting for pid 4711, psql, idle"),
        (LockHeld(holders=(f"pid 4711, {'a' * 50}",)), "waiting for pid 4711"),
        (DrainStarted(reason=StopReason.SIGINT), "draining ranges in flight"),
    ],
)
def test_what_holds_the_run_up_takes_the_place_of_rate_and_eta(event: Event, text: str) -> None:
    stats = stats_after(started(), event, seconds=8.0)
    assert bar_text(stats, 99) == f"        0 of 1,000,000 rows    0%  {text}"
    assert bar_text(stats, 44) == f"  0%  {text}"


def test_the_first_text_that_fits_is_taken_and_the_last_is_cut() -> None:
    assert fitting(["abcdef", "abc"], 6) == "abcdef"
    assert fitting(["abcdef", "abc"], 5) == "abc"
    assert fitting(["abcdef", "abc"], 2) == "ab"
    assert fitting(["abcdef", "abc"], -1) == ""


def test_each_frame_is_written_at_once_and_clears_the_rest_of_its_line() -> None:
    stream = Terminal()
    screen = Screen(stream)
    screen.write("\r")
    screen.write("|██  |")
    screen.write_above("a line above", columns=40)
    screen.write(" 50%")
    screen.flush()
    screen.flush()
    assert stream.getvalue() == "\r\x1b[2Ka line above\n\r|██  | 50%\x1b[K"
