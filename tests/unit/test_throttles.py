"""When a throttle holds the rotation and when it ends, and callables of the project as throttles."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rotator.events import Event, HorizonHeld, Throttled, ThrottleEnded
from rotator.exceptions import OptionError
from rotator.fields.throttles import find_sources
from rotator.options import RunOptions
from rotator.postgres import throttles as signals
from rotator.postgres.activity import HorizonHolder
from rotator.postgres.connection import Server
from rotator.postgres.throttles import Reading, Replica, reading
from rotator.progress.bar import bar_text
from rotator.progress.lines import figures
from rotator.runner import throttles
from rotator.runner.heartbeat import HorizonWatch
from rotator.runner.throttles import (
    Budget,
    CalledSignal,
    Throttles,
    ThrottleSources,
    show_bytes,
    show_seconds,
)
from rotator.stats import Stats
from tests.unit.progress_fakes import Clock, completed, started

UNKNOWN = Reading(problem="no answer within 2 s")


def lag() -> Budget:
    return Budget("replica lag of standby", 10.0, show_seconds)


def test_a_value_above_the_limit_holds_and_says_what_ends_it() -> None:
    budget = lag()
    assert budget.judge(Reading(value=10.0), 0.0) == ""
    assert budget.judge(Reading(value=14.2), 0.5) == "replica lag of standby 14 s > 10 s; ends below 8.0 s"
    wal = Budget("WAL kept by slot", 2**30, show_bytes)
    assert wal.judge(Reading(value=3 * 2**30, detail="old (not active)"), 0.0) == (
        "WAL kept by slot old (not active) 3,072 MB > 1,024 MB; ends below 819 MB"
    )


def test_it_ends_after_a_second_below_four_fifths_of_the_limit() -> None:
    budget = lag()
    assert budget.judge(Reading(value=11.0), 0.0)
    # Below the limit is not enough, and neither is a moment.
    for now, value in [(1, 9.9), (5, 8.0), (6, 7.9), (6.5, 8.1), (7, 7.9), (7.9, 0.0)]:
        assert "; ends below 8.0 s for 1 s" in budget.judge(Reading(value=value), now)
    assert budget.judge(Reading(value=7.0), 8.0) == ""
    # The dead band is for the way down only.
    assert budget.judge(Reading(value=9.9), 8.5) == ""


@pytest.mark.parametrize("budget", [lag(), Budget("shop.metrics.errors")])
def test_an_unknown_value_holds_until_it_is_known_for_a_second(budget: Budget) -> None:
    assert budget.judge(UNKNOWN, 0.0) == (
        f"{budget.name} unknown: no answer within 2 s; ends when it can be read"
    )
    assert budget.judge(Reading(), 1.0)
    assert budget.judge(UNKNOWN, 1.5)
    assert budget.judge(Reading(), 2.0)
    assert budget.judge(Reading(), 2.9)
    assert budget.judge(Reading(), 3.0) == ""


def test_the_reason_of_a_callable_is_shown() -> None:
    budget = Budget("shop.metrics.errors")
    assert budget.judge(Reading(detail="errors 3 % > 1 %"), 0.0) == (
        "shop.metrics.errors: errors 3 % > 1 %; ends when it returns None"
    )
    assert budget.judge(Reading(), 1.0) == "shop.metrics.errors: ends after 1 s without a reason"
    assert budget.judge(Reading(), 2.0) == ""


async def test_a_reading_that_takes_too_long_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "READ_SECONDS", 0.01)

    async def hang() -> Reading:
        await asyncio.Event().wait()
        return Reading()

    assert (await reading(hang)).problem == "no answer within 0 s"


def _raise() -> None:
    raise ValueError("leaked")


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: None, Reading()),
        (lambda: "errors\n3 % > 1 %", Reading(detail="errors 3 % > 1 %")),
        (_raise, Reading(problem="it raised ValueError")),
        (lambda: True, Reading(problem="it returned bool, not None or a text")),
        (lambda: "", Reading(problem="it returned str, not None or a text")),
    ],
)
async def test_what_a_callable_returns(call: Callable[[], object], found: Reading) -> None:
    assert await CalledSignal(call).read() == found


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_a_callable_that_hangs_is_unknown_and_not_called_again(
    monkeypatch: pytest.MonkeyPatch, hanging: threading.Event
) -> None:
    monkeypatch.setattr(throttles, "READ_SECONDS", 0.05)
    calls = []

    def call() -> None:
        calls.append(1)
        hanging.wait()

    signal = CalledSignal(call)
    for _ in range(3):
        assert (await signal.read()).problem == "it did not return within 0 s"
    assert calls == [1]
    hanging.set()
    until = time.monotonic() + 60
    while (await signal.read()).problem:
        assert time.monotonic() < until
    signal.close()


def fine() -> None:
    """Return None, as a throttle that holds nothing."""


async def test_a_callable_that_vanishes_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{__name__}.fine"
    call = find_sources((), (path,), Server(parameters={})).calls[path]
    signal = CalledSignal(call)
    assert await signal.read() == Reading()
    monkeypatch.delattr(f"{__name__}.fine")
    assert (await signal.read()).problem == "it raised ImportError"


@pytest.mark.parametrize(
    ("paths", "complaint"),
    [
        (("tests.unit.nowhere.call",), "tests.unit.nowhere.call cannot be imported: No module named"),
        ((f"{__name__}.UNKNOWN",), f"{__name__}.UNKNOWN is not callable."),
    ],
)
def test_a_path_without_a_callable_is_refused(paths: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(OptionError, match=r'^ROTATOR."THROTTLES".: ') as raised:
        find_sources((), paths, Server(parameters={}))
    assert complaint in str(raised.value)


def test_an_alias_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^--lag-of: there is no database 'nowhere'. The project has "):
        find_sources(("nowhere",), (), Server(parameters={}))


async def test_a_replica_without_a_heartbeat_of_ours_is_unknown() -> None:
    replica = Replica("standby", Server(parameters={"host": "/nowhere"}), clock=lambda: 0.0)
    found = await replica.read_lag(1)
    assert found.problem.startswith("The server cannot be reached: ")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_lag": "10s"}, "--max-lag and --lag-of belong together: --max-lag 10s --lag-of replica."),
        ({"lag_of": ["a"]}, "--max-lag and --lag-of belong together: --max-lag 10s --lag-of replica."),
        (
            {"max_lag": "fast", "lag_of": ["a"]},
            "--max-lag must be a duration (100ms, 30s, 5m or 2h), not 'fast'.",
        ),
        (
            {"max_slot_wal": "1 GB"},
            "--max-slot-wal must be a size from 1MB to 1000TB (500MB, 1GB), not '1 GB'.",
        ),
        (
            {"max_unarchived_wal": "1kB"},
            "--max-unarchived-wal must be a size from 1MB to 1000TB (500MB, 1GB), not '1kB'.",
        ),
    ],
)
def test_limits_that_are_not_valid_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(OptionError) as raised:
        RunOptions.checked(**options)  # type: ignore[arg-type] # invalid on purpose
    assert str(raised.value) == complaint


def test_limits_survive_the_row_of_the_rotation() -> None:
    options = RunOptions.checked(max_lag="10s", lag_of=["a", "b"], max_unarchived_wal="1.5GB")
    assert (options.max_lag_seconds, options.max_unarchived_wal_bytes) == (10.0, 3 * 2**29)
    saved = options.to_json() | {"lag_of": list(options.lag_of)}
    assert RunOptions.from_json(saved) == options
    assert options.has_throttles
    assert not RunOptions().has_throttles


def test_a_signal_is_watched_only_where_it_has_a_limit() -> None:
    assert Throttles(RunOptions(), ThrottleSources())._signals == []  # noqa: SLF001 - its only state


# --- How it is shown --------------------------------------------------------------------------------

LAG = "replica lag of standby 14 s > 10 s; ends below 8.0 s"


def test_throttled_time_is_shown_separately_and_is_no_stall() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    stats.take(started())
    for second in range(1, 11):
        clock.now = second
        stats.take(completed(rows=1000, seconds=1.0))
    assert stats.eta_seconds == pytest.approx(990, rel=0.02)
    stats.take(Throttled(source="replica lag of standby", reason=LAG))
    stats.take(Throttled(source="pause", reason="paused by alice"))
    clock.now += 240
    # Much longer than a stall.
    assert stats.state == "throttled"
    assert stats.eta_seconds == pytest.approx(990, rel=0.02)
    text = f"ETA 16 min 30 s at the current rate; throttled 4 min 00 s so far ({LAG}; paused by alice)"
    assert f" rows (1%), {text}" in figures(stats)
    assert bar_text(stats, 200).endswith(text)
    assert bar_text(stats, 80).endswith("throttled 4 min 00 s so far")
    stats.take(ThrottleEnded(source="pause", reason="paused by alice", seconds=240))
    clock.now += 10
    stats.take(ThrottleEnded(source="replica lag of standby", reason=LAG, seconds=250))
    # Both at once are counted once.
    assert stats.held_seconds == 250
    assert stats.rows_per_second == pytest.approx(1000, rel=0.02)
    for second in range(1, 6):
        clock.now = 260 + second
        stats.take(completed(rows=1000, seconds=1.0))
    assert stats.rows_per_second == pytest.approx(1000, rel=0.02)


def test_the_horizon_is_reported_once_when_it_has_not_moved_for_five_seconds() -> None:
    now, events = [0.0], list[Event]()
    watch = HorizonWatch(events.append, clock=lambda: now[0])
    old = HorizonHolder(name="pid 7", xmin="100", phrase="pid 7, psql, idle in transaction")
    for second in range(0, 20, 2):
        now[0] = second
        # A busy session has another snapshot each time.
        busy = HorizonHolder(name="pid 8", xmin=str(200 + second), phrase="pid 8")
        watch.take((old, busy))
        assert len(events) == (second >= 5)
    assert events == [HorizonHeld(holders=("pid 7, psql, idle in transaction",))]
    watch.take(())
    for second in (20, 24, 26):
        now[0] = second
        watch.take((old,))
    assert len(events) == 2
