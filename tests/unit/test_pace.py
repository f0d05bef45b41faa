"""The options of the pace, and what all kinds of progress show of it."""

import io
import json
from datetime import UTC, datetime

import pytest

from rotator.events import Event, PaceChanged, Throttled, ThrottleEnded
from rotator.exceptions import OptionError
from rotator.options import PACES, RangeLimit, RunOptions
from rotator.progress.bar import bar_text
from rotator.progress.lines import JsonObserver, figures
from rotator.progress.summary import report, summary
from rotator.progress.text import notice
from rotator.stats import Stats
from tests.unit.progress_fakes import Clock, completed, started, stopped

CHANGED = PaceChanged(
    pace="balanced",
    workers=2,
    concurrency=4,
    rows=500,
    reason="commit p90 4.1 ms > 3.0 ms",
    is_limited=True,
)
TEXT = "pace balanced: 2 of 4 workers × 500 rows, commit p90 4.1 ms > 3.0 ms"  # noqa: RUF001 - a sign
LAG = "replica lag 14 s > 10 s"


def _stats(clock: Clock, *events: Event) -> Stats:
    stats = Stats(clock=clock)
    for event in (started(), *events):
        stats.take(event)
    return stats


def test_the_limits_of_the_paces() -> None:
    assert {name: (pace.latency_limit, pace.range_limit) for name, pace in PACES.items()} == {
        "gentle": (1.5, RangeLimit(seconds=0.010, rows=100)),
        "balanced": (2.5, RangeLimit(seconds=0.025, rows=750)),
        "full": (None, None),
    }


def test_another_pace_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^--pace must be gentle, balanced or full, not 'fast'\.$"):
        RunOptions.checked(pace="fast")


def test_a_very_large_batch_needs_the_full_pace() -> None:
    with pytest.raises(OptionError, match=r"^--batch must be at most 100,000, not 100001: .*--pace full\.$"):
        RunOptions.checked(batch=100_001)
    assert RunOptions.checked(batch=100_000).batch == 100_000
    assert RunOptions.checked(batch=200_000, pace="full").batch == 200_000


def test_a_large_batch_says_what_it_costs() -> None:
    assert "warning" not in notice(started(batch=10_000), Stats())
    assert notice(started(batch=20_000), Stats()).endswith(
        " 20,000 rows a range; warning: with ranges of this size, writers of the same rows may wait for "
        "1 s or more"
    )


def test_options_that_an_older_version_saved_have_the_default_pace() -> None:
    assert RunOptions.from_json({"concurrency": 2}).pace == "balanced"


def test_the_same_text_is_in_the_line_the_figures_the_bar_and_json() -> None:
    clock = Clock()
    stats = _stats(clock, CHANGED)
    assert notice(CHANGED, stats) == TEXT
    assert figures(stats).endswith(f", {TEXT}")
    assert bar_text(stats, 180).endswith(f"  {TEXT}")
    assert "pace" not in bar_text(stats, 60)
    stream = io.StringIO()
    observer = JsonObserver(stream, clock=clock, wall_clock=lambda: datetime.now(UTC))
    observer(started())
    observer(CHANGED)
    clock.now += 2
    observer(completed())
    changed, progress = (json.loads(line) for line in stream.getvalue().splitlines()[1:])
    assert changed["event"] == "pace_changed"
    assert progress["pace"]["reason"] == "commit p90 4.1 ms > 3.0 ms"
    assert (progress["pace"]["workers"], progress["pace"]["rows"]) == (2, 500)


def test_a_new_reason_alone_is_no_line_of_its_own() -> None:
    changed = PaceChanged(
        pace="balanced",
        workers=2,
        concurrency=4,
        rows=400,
        reason="commit p90 2.0 ms ≤ 3.0 ms",
        is_limited=True,
        is_new=False,
    )
    assert notice(changed, Stats()) == ""
    stream = io.StringIO()
    JsonObserver(stream, clock=Clock(), wall_clock=lambda: datetime.now(UTC))(changed)
    assert stream.getvalue() == ""


def test_the_summary_says_for_how_long_the_pace_applied() -> None:
    clock = Clock()
    stats = _stats(clock, CHANGED)
    clock.now += 30
    stats.take(
        PaceChanged(
            pace="balanced",
            workers=4,
            concurrency=4,
            rows=2000,
            reason="no other sessions at work",
            is_limited=False,
        )
    )
    clock.now += 60
    assert stats.limited_seconds == 30
    ended = stopped(limited_seconds=30.0)
    assert (
        "  pace         balanced; limited for 30 s: other sessions were at work"
        in summary(ended).splitlines()
    )
    assert (report(ended)["pace"], report(ended)["limited_seconds"]) == ("balanced", 30.0)


def test_a_throttle_is_a_state_with_its_reason_and_its_time() -> None:
    clock = Clock()
    stats = _stats(clock, Throttled(source="lag", reason=LAG))
    assert (stats.state, stats.eta_seconds) == ("throttled", None)
    assert f"throttled 0 s so far ({LAG})" in figures(stats)
    clock.now += 5
    stats.take(Throttled(source="lag", reason="replica lag 20 s > 10 s", is_new=False))
    clock.now += 5
    assert stats.throttled_so_far == {"lag": 10.0}
    stats.take(ThrottleEnded(source="lag", reason="replica lag 20 s > 10 s", seconds=10.0))
    clock.now += 5
    assert (stats.state, stats.throttled_so_far) == ("rotating", {"lag": 10.0})
    assert notice(Throttled(source="lag", reason=LAG), stats) == f"throttled: {LAG}; no new ranges start"
    assert notice(ThrottleEnded(source="lag", reason=LAG, seconds=10.0), stats) == (
        f"throttle ended after 10 s: {LAG}"
    )
    assert "  throttled    10 s by lag" in summary(stopped(throttled_seconds={"lag": 10.0})).splitlines()
