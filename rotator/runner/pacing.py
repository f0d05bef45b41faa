"""Keeps the pace: measures what other sessions feel, and moves the gate's allowance accordingly."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Final

from psycopg import AsyncConnection

from rotator.events import Observer, PaceChanged
from rotator.exceptions import RotatorError
from rotator.options import read_pace
from rotator.postgres.connection import Server, connected
from rotator.postgres.probes import Activity, probe, read_activity, sessions_that_wait
from rotator.runner.aio import CLOSE_SECONDS
from rotator.runner.controller import MIN_SAMPLES, Controller, Progress, percentile
from rotator.runner.gate import Gate

PROBE_SECONDS: Final = 0.04
LOOK_SECONDS: Final = 0.25
REPORT_SECONDS: Final = 1.0
RECENT_SECONDS: Final = 5.0
MOST_COMMITS: Final = 250
REPORTED_FAILURE: Final = 2
RETRY_SECONDS: Final = 2.0
STEADY_SECONDS: Final = 10.0

# A session waits for a range of the usual size for less.
WAIT_SECONDS: Final = 0.05
LOCK_WAIT: Final = "lock wait"

BASELINE_SECONDS: Final = 0.3
EMPTY_SECONDS: Final = 1.0
BASELINE_EVERY_SECONDS: Final = 60.0
# Where even the least is too much, the load of other sessions may have changed.
BASELINE_AT_LOWEST_SECONDS: Final = 10.0
BASELINES: Final = 3

# Sessions add to the statistics once a second. So the commits of a short time can contain those of the second
# before, and it takes more of them to be sure that they are not our own.
MIN_ACTIVITY_SECONDS: Final = 0.3
# Until then, the sessions that were seen may not have added their commits.
ADDED_SECONDS: Final = 1.2
ACTIVE_WINDOWS: Final = ((1.0, 0.5), (3.0, 0.2))
QUIET_SECONDS: Final = 5.0
SHARE_WHEN_ACTIVE: Final = 0.1
OTHERS_PER_SECOND: Final = 5.0
# The queries before the first range: Django's, the preflight's, and those that create a ledger.
OWN_AT_START: Final = 110
START_SECONDS: Final = 5.0
OWN_AT_ONCE: Final = 50
# Planning and writing.
COMMITS_OF_RANGE: Final = 2
COMMITS_OF_PROBE: Final = 2
COMMITS_OF_LOOK: Final = 2
# Heartbeat, VACUUM, and what watches the horizon.
OWN_PER_SECOND: Final = 5.0
# A coordinator also reads spans, progress and helpers ten times a second.
OWN_PER_SECOND_WITH_CELERY: Final = 50.0

QUIET: Final = "no other sessions at work"
ACTIVE: Final = "other sessions at work"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    activity: Activity
    ranges: int
    own_commits: int


@dataclass(slots=True)
class OtherSessions:
    """Whether other sessions are at work: the database commits more than its rotations do.

    Attributes:
        own_per_second: The commits of the rotation that no statistics count.
    """

    own_per_second: float = OWN_PER_SECOND
    are_active: bool = False
    _counts: deque[_Counts] = field(default_factory=deque)
    _began_at: float = inf

    @property
    def are_known(self) -> bool:
        """Whether the counts cover enough time to say whether they are active."""
        if not self._counts:
            return False
        first, last = self._counts[0].activity, self._counts[-1].activity
        return last.at - first.at >= (ADDED_SECONDS if last.recent_sessions else MIN_ACTIVITY_SECONDS)

    def add(self, activity: Activity, *, ranges: int, own_commits: int) -> None:
        """Take the statistics, and the commits of the probes so far.

        The statistics may not have all ``ranges`` yet that this process has completed.
        """
        own_commits += activity.writes
        self._began_at = min(self._began_at, activity.at)
        self._counts.append(_Counts(activity=activity, ranges=ranges, own_commits=own_commits))
        while len(self._counts) > 1 and self._counts[1].activity.at <= activity.at - QUIET_SECONDS:
            self._counts.popleft()
        if self.are_active:
            is_known = activity.at - self._counts[0].activity.at >= QUIET_SECONDS
            self.are_active = not is_known or self._exceeds(QUIET_SECONDS, SHARE_WHEN_ACTIVE, 0)
        else:
            is_start = activity.at - self._began_at < START_SECONDS
            allowed = OWN_AT_START if is_start else OWN_AT_ONCE
            self.are_active = any(self._exceeds(*window, allowed) for window in ACTIVE_WINDOWS)

    def _exceeds(self, seconds: float, share: float, allowed: int) -> bool:
        """Return whether others have committed more, in the last ``seconds``, than we may have ourselves.

        A share of our own commits, and the allowed number, may be counted for theirs.
        """
        now = self._counts[-1]
        since = [counts for counts in self._counts if counts.activity.at <= now.activity.at - seconds]
        before = since[-1] if since else self._counts[0]
        elapsed = now.activity.at - before.activity.at
        ranges = max(now.activity.ranges - before.activity.ranges, now.ranges - before.ranges)
        own = COMMITS_OF_RANGE * ranges + now.own_commits - before.own_commits
        others = now.activity.commits - before.activity.commits - own
        limit = allowed + (OTHERS_PER_SECOND + self.own_per_second) * elapsed + share * own
        return elapsed >= MIN_ACTIVITY_SECONDS and others > limit


class Pacing:
    """Keeps the pace of a run or of a Celery worker, and never raises an error.

    Attributes:
        is_limited: Whether other sessions are at work, and the pace applies.
        waiting_sessions: The number of sessions that wait for a range; None where that is not measured.
    """

    def __init__(
        self,
        server: Server,
        gate: Gate,
        pace: str,
        notify: Observer,
        *,
        own_per_second: float = OWN_PER_SECOND,
    ) -> None:
        """Take the server for a connection of its own, and the gate whose allowance it moves."""
        self._server = server
        self._gate = gate
        self._pace = read_pace(pace)
        self._notify = notify
        self._other_sessions = OtherSessions(own_per_second)
        self._own_commits = 0
        self._controller: Controller | None = None
        self.is_limited = False
        self._baselines = deque[float](maxlen=BASELINES)
        self._baseline_at = 0.0
        self._look_at = self._report_at = 0.0
        self._busy = list[int]()
        self.waiting_sessions: int | None = None
        # Commits at all levels: the controller forgets them when the level changes.
        self._commits = deque[tuple[float, float]](maxlen=MOST_COMMITS)

    @property
    def pace(self) -> str:
        """The name of the pace."""
        return self._pace.name

    @property
    def commit_seconds(self) -> float | None:
        """The 90th percentile of the commits of the last seconds; None where none were measured."""
        since = time.monotonic() - RECENT_SECONDS
        recent = [seconds for at, seconds in self._commits if at >= since]
        return percentile(recent, 0.9) if recent else None

    @property
    def baseline_seconds(self) -> float | None:
        """The same without the rotation; None where it is not measured."""
        return self._controller.baseline if self._controller else None

    def count_commits(self, commits: int) -> None:
        """Count commits of this process that no statistics count."""
        self._own_commits += commits

    def set_pace(self, name: str) -> None:
        """Change the pace.

        Raises:
            OptionError: There is no such pace.
        """
        pace = read_pace(name)
        if pace == self._pace:
            return
        self._pace, self._controller = pace, None
        self.is_limited = False
        self._gate.allow()
        self._announce("the pace was changed")

    async def prepare(self, connection: AsyncConnection) -> None:
        """Count commits before the preflight, so that other sessions are known after it."""
        if self._pace.latency_limit is not None:
            with suppress(RotatorError):
                self._add_activity(await read_activity(connection))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the pace until the block ends."""
        if self._pace.latency_limit is not None and not self._other_sessions.are_known:
            # Until it is known whether they are at work.
            self._gate.allow(workers=1)
        keeping = asyncio.create_task(self.run(), name="rotator pace")
        try:
            yield
        finally:
            keeping.cancel()
            # A server that does not answer must not delay the end.
            await asyncio.wait([keeping], timeout=CLOSE_SECONDS)

    async def run(self) -> None:
        """Keep the pace until cancelled. Without measurements, the allowance stays what it is."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                if self._pace.latency_limit is not None:
                    async with connected(self._server) as connection:
                        await self._watch(connection)
            except RotatorError as error:
                if not self.is_limited:
                    self._gate.allow()
                failures = 1 if time.monotonic() - began > STEADY_SECONDS else failures + 1
                # The next attempt may succeed, so the first failure is not reported.
                if failures == REPORTED_FAILURE:
                    self._announce(f"no measurements: {str(error).rstrip('.')}")
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                self.waiting_sessions = None
                self._gate.release(LOCK_WAIT, slowly=False)
            await asyncio.sleep(LOOK_SECONDS)

    async def _watch(self, connection: AsyncConnection) -> None:
        """Look and probe on this connection until the pace is full."""
        while self._pace.latency_limit is not None:
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + LOOK_SECONDS
                await self._look(connection)
                await self._follow_other_sessions(connection)
            controller = self._controller
            if not self.is_limited or controller is None:
                await asyncio.sleep(LOOK_SECONDS)
            elif not self._gate.is_open:
                await asyncio.sleep(LOOK_SECONDS)
                controller.restart(time.monotonic())
            else:
                await self._measure(connection, controller)
                await asyncio.sleep(PROBE_SECONDS)

    async def _look(self, connection: AsyncConnection) -> None:
        """Hold while a session waits for a range, and see whether other sessions are at work."""
        waiting = await sessions_that_wait(connection, seconds=WAIT_SECONDS)
        self.waiting_sessions = waiting.sessions
        longest, limit = waiting.seconds * 1000, WAIT_SECONDS * 1000
        reason = f"{LOCK_WAIT} of other sessions {longest:.0f} ms > {limit:.0f} ms"
        self._gate.hold(LOCK_WAIT, reason if waiting.sessions else "", slowly=False)
        self._own_commits += COMMITS_OF_LOOK
        self._add_activity(await read_activity(connection))

    def _add_activity(self, activity: Activity) -> None:
        ranges = self._gate.ranges_completed
        self._other_sessions.add(activity, ranges=ranges, own_commits=self._own_commits)

    async def _follow_other_sessions(self, connection: AsyncConnection) -> None:
        """Limit the rotation while other sessions are at work."""
        if self._other_sessions.are_active and not self.is_limited:
            now = time.monotonic()
            if self._controller is None:
                self._controller = Controller(self._pace, max_workers=self._gate.concurrency, now=now)
            self.is_limited = True
            self._gate.allow(self._controller.workers, self._pace.range_limit)
            self._announce(ACTIVE)
            await self._measure_baseline(connection, self._controller)
        elif self.is_limited and not self._other_sessions.are_active:
            self.is_limited = False
            self._gate.allow()
            self._announce(QUIET)
        elif not self.is_limited and self._other_sessions.are_known:
            self._gate.allow()

    async def _measure(self, connection: AsyncConnection, controller: Controller) -> None:
        """Probe once, and let the controller decide."""
        gate = self._gate
        measured = await probe(connection)
        self._own_commits += COMMITS_OF_PROBE
        if controller is not self._controller:
            # The pace was changed in between.
            return
        now = time.monotonic()
        self._busy.append(gate.busy)
        controller.set_max_workers(gate.concurrency)
        controller.add_commit(measured.commit_seconds, now)
        self._commits.append((now, measured.commit_seconds))
        if len(self._busy) * PROBE_SECONDS >= LOOK_SECONDS:
            progress = Progress(at=now, rows=gate.rows_completed, ranges=gate.ranges_completed)
            busy = sum(self._busy) / len(self._busy)
            self._busy.clear()
            if controller.decide(progress, busy=busy):
                gate.allow(controller.workers, self._pace.range_limit)
                self._announce(controller.reason or ACTIVE)
        if now >= self._report_at:
            self._announce(controller.reason or ACTIVE, is_new=False)
        every = BASELINE_AT_LOWEST_SECONDS if controller.is_stuck else BASELINE_EVERY_SECONDS
        if now - self._baseline_at >= every:
            await self._measure_baseline(connection, controller)

    async def _measure_baseline(self, connection: AsyncConnection, controller: Controller) -> None:
        """Measure while no range is in flight, so that our own load never becomes the baseline."""
        async with self._gate.emptied(EMPTY_SECONDS) as is_empty:
            seconds, until = list[float](), time.monotonic() + BASELINE_SECONDS
            while is_empty and time.monotonic() < until:
                seconds.append((await probe(connection)).commit_seconds)
        self._own_commits += COMMITS_OF_PROBE * len(seconds)
        if len(seconds) >= MIN_SAMPLES:
            self._baselines.append(percentile(seconds, 0.9))
            # One checkpoint of the server is no new baseline.
            controller.set_baseline(median(self._baselines))
            self._baseline_at = time.monotonic()
        else:
            self._baseline_at = time.monotonic() - BASELINE_EVERY_SECONDS + BASELINE_AT_LOWEST_SECONDS
        controller.restart(time.monotonic())

    def _announce(self, reason: str, *, is_new: bool = True) -> None:
        self._report_at = time.monotonic() + REPORT_SECONDS
        gate = self._gate
        self._notify(
            PaceChanged(
                pace=self._pace.name,
                workers=gate.workers,
                concurrency=gate.concurrency,
                rows=gate.rows,
                reason=reason,
                is_limited=self.is_limited,
                is_new=is_new,
            )
        )
