"""The owner's heartbeat: applies requests of users, reports what was done, and stores what is measured.

It also watches the xmin horizon, and commits that wait for a synchronous standby.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from psycopg import AsyncConnection

from rotator.events import ActionKind, Event, HorizonHeld, Observer, Tick, Vacuumed, VacuumSkipped
from rotator.exceptions import RotatorError, ServerLostError
from rotator.postgres import rotations
from rotator.postgres.activity import HorizonHolder, horizon_holders, missing_standbys
from rotator.postgres.connection import connected
from rotator.postgres.control import Measured, log_action, read_requested, record
from rotator.postgres.fence import Lease
from rotator.postgres.rotations import OwnerReport
from rotator.ranges import Key
from rotator.runner.context import RunContext
from rotator.runner.control import PAUSE, LiveControl
from rotator.runner.engine import MAX_FAILED_ROWS
from rotator.runner.throttles import Throttles

HEARTBEAT_SECONDS: Final = 1.0
TICK_SECONDS: Final = 1.0
# The longest time of a commit that waits for a synchronous standby.
LATE_BEAT_SECONDS: Final = 5.0
MEASURE_SECONDS: Final = 5.0
HORIZON_LOOK_SECONDS: Final = 2.0
# Shorter transactions hold the horizon for a moment all the time.
HORIZON_HELD_SECONDS: Final = 5.0


@dataclass(slots=True)
class HorizonWatch:
    """Reports holders of the xmin horizon that have not advanced for ``HORIZON_HELD_SECONDS``.

    Rows that were deleted or updated after the horizon stay in the table, whatever VACUUM does.

    Attributes:
        held: One phrase for each holder that has not advanced for long.
    """

    notify: Observer
    clock: Callable[[], float] = time.monotonic
    held: tuple[str, ...] = ()
    _since: dict[tuple[str, str], float] = field(default_factory=dict)
    _reported: frozenset[str] = frozenset()

    async def watch(self, control: AsyncConnection) -> None:
        """Look for holders until cancelled, on a connection that may be shared."""
        while True:
            try:
                self.take(await horizon_holders(control))
            except ServerLostError:
                raise
            except RotatorError:
                # A role that may not read the views rotates all the same.
                return
            await asyncio.sleep(HORIZON_LOOK_SECONDS)

    def take(self, holders: tuple[HorizonHolder, ...]) -> None:
        """Compare the holders, the oldest first, with those that were seen before, and report new ones."""
        now, seen = self.clock(), self._since
        self._since = {(each.name, each.xmin): seen.get((each.name, each.xmin), now) for each in holders}
        held = [each for each in holders if now - self._since[each.name, each.xmin] >= HORIZON_HELD_SECONDS]
        self.held = tuple(each.phrase for each in held)
        names = frozenset(each.name for each in held)
        if names - self._reported:
            self.notify(HorizonHeld(holders=self.held))
        self._reported = names


@dataclass(slots=True)
class Heartbeat:
    """The owner's heartbeat, once a second.

    It also stores a measurement every few seconds, and when the state or what holds the run changes, and adds
    each VACUUM to the log of the rotation.
    """

    context: RunContext
    live: LiveControl
    throttles: Throttles
    horizon: HorizonWatch
    _beat_at: float = 0.0
    # Until the first heartbeat of this run, the row has the rejected keys of an earlier one.
    _stored_rejected: tuple[tuple[Key, str], ...] | None = None
    _recorded_at: float = 0.0
    _before: tuple[str, tuple[str, ...]] | None = None
    _vacuums: list[tuple[ActionKind, str, float]] = field(default_factory=list)

    async def run(self, control: AsyncConnection, lease: Lease) -> None:
        """Write heartbeats until cancelled, on a connection in autocommit mode that may be shared."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self.beat(control, lease)
            self.context.notify(Tick())

    async def beat(self, control: AsyncConnection, lease: Lease) -> None:
        """Apply what users request, and write a heartbeat that says so."""
        self.live.apply(await read_requested(control, lease.rotation))
        stats, holds = self.context.stats, self.context.gate.holds
        # Helpers read a pause from the control row.
        held = [hold for source, hold in holds.items() if source != PAUSE]
        rejected = tuple(stats.rejected_keys[:MAX_FAILED_ROWS])
        beat_at = await rotations.beat(
            control,
            lease,
            OwnerReport(
                rows_done=stats.rows_done,
                figures=self.context.figures,
                applied_revision=self.live.revision,
                throttle_reason="; ".join(hold.reason for hold in held),
                held_seconds=time.monotonic() - held[0].since if held else 0.0,
                rejected_keys=None if rejected == self._stored_rejected else rejected,
            ),
        )
        self._stored_rejected = rejected
        self._beat_at = time.monotonic()
        self.throttles.note_beat(beat_at)
        await self.log_vacuums(control, lease.rotation)
        await self._record_if_due(control, lease.rotation)

    async def watch_commits(self) -> None:
        """Notice within seconds that each commit waits for a synchronous standby.

        Raises:
            ServerLostError: Commits wait for a synchronous standby.
        """
        self._beat_at = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if time.monotonic() - self._beat_at < LATE_BEAT_SECONDS:
                continue
            self.context.notify(Tick())
            reason = ""
            # The heartbeat itself notices the loss of a connection.
            with suppress(RotatorError):
                async with connected(self.context.server) as connection:
                    reason = await missing_standbys(connection, counts_waits=False)
            if reason:
                raise ServerLostError(reason)

    def take(self, event: Event) -> None:
        """Keep a VACUUM until ``log_vacuums()``; the last one ends after the last heartbeat."""
        if isinstance(event, Vacuumed):
            self._vacuums.append((ActionKind.VACUUMED, f"{event.seconds:.1f} s", time.monotonic()))
        elif isinstance(event, VacuumSkipped):
            self._vacuums.append((ActionKind.VACUUM_SKIPPED, event.reason, time.monotonic()))

    async def log_vacuums(self, connection: AsyncConnection, rotation: int) -> None:
        """Add the VACUUMs since the last call to the log of the rotation."""
        while self._vacuums:
            # Removed before the await: the heartbeat and the end of the run can call this at the same time.
            vacuum = self._vacuums.pop(0)
            kind, detail, at = vacuum
            seconds_ago = time.monotonic() - at
            try:
                await log_action(connection, rotation, kind, detail=detail, seconds_ago=seconds_ago)
            except BaseException:
                self._vacuums.insert(0, vacuum)
                raise

    async def _record_if_due(self, control: AsyncConnection, rotation: int) -> None:
        stats, gate, pacing = self.context.stats, self.context.gate, self.context.pacing
        now, state, held_by = time.monotonic(), stats.state, tuple(gate.holds)
        is_change = self._before != (state, held_by)
        if now - self._recorded_at < MEASURE_SECONDS and not is_change:
            return
        self._recorded_at, self._before = now, (state, held_by)
        await record(
            control,
            rotation,
            Measured(
                rows_done=stats.rows_done,
                state=state,
                held_by=held_by,
                is_change=is_change,
                workers=gate.workers,
                commit_seconds=pacing.commit_seconds,
                baseline_seconds=pacing.baseline_seconds,
                waiting_sessions=pacing.waiting_sessions,
                replica_lags=self.throttles.lags,
                horizon_holders=self.horizon.held,
            ),
        )
