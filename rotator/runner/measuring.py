"""Stores what the owner measures, for the page and the metrics, which only read the database."""

import time
from collections.abc import Callable
from typing import Final

from psycopg import AsyncConnection

from rotator.events import ActionKind, Event, Vacuumed, VacuumSkipped
from rotator.postgres.control import log_action
from rotator.postgres.measurements import Measured, record
from rotator.runner.context import RunContext
from rotator.runner.horizon import HorizonWatch
from rotator.runner.throttles import Throttles

EVERY_SECONDS: Final = 5.0


class Measuring:
    """Stores a measurement every few seconds, and when the state or what holds the run changes.

    It also adds each VACUUM to the log of the rotation.
    """

    def __init__(
        self,
        context: RunContext,
        throttles: Throttles,
        horizon: HorizonWatch,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._throttles = throttles
        self._horizon = horizon
        self._clock = clock
        self._recorded_at: float | None = None
        self._before: tuple[str, tuple[str, ...]] | None = None
        self._vacuums: list[tuple[ActionKind, str, float]] = []

    def take(self, event: Event) -> None:
        """Keep a VACUUM until ``log_vacuums()``; the last one ends after the last heartbeat."""
        match event:
            case Vacuumed():
                self._vacuums.append((ActionKind.VACUUMED, f"{event.seconds:.1f} s", self._clock()))
            case VacuumSkipped():
                self._vacuums.append((ActionKind.VACUUM_SKIPPED, event.reason, self._clock()))
            case _:
                pass

    async def log_vacuums(self, connection: AsyncConnection, rotation: int) -> None:
        """Add the VACUUMs since the last call to the log of the rotation."""
        while self._vacuums:
            # Removed before the await: the heartbeat and the end of the run can call this at the same time.
            vacuum = self._vacuums.pop(0)
            kind, detail, at = vacuum
            seconds_ago = self._clock() - at
            try:
                await log_action(connection, rotation, kind, detail=detail, seconds_ago=seconds_ago)
            except BaseException:
                self._vacuums.insert(0, vacuum)
                raise

    async def record_if_due(self, control: AsyncConnection, rotation: int) -> None:
        """Store a measurement, if one is due, on a connection in autocommit mode."""
        await self.log_vacuums(control, rotation)
        stats, gate, pacing = self._context.stats, self._context.gate, self._context.pacing
        now, shown = self._clock(), (stats.state, tuple(gate.holds))
        is_due = self._recorded_at is None or now - self._recorded_at >= EVERY_SECONDS
        is_change = shown != self._before
        if not is_due and not is_change:
            return
        self._recorded_at, self._before = now, shown
        state, held_by = shown
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
                replica_lags=self._throttles.lags,
                horizon_holders=self._horizon.held,
            ),
        )
