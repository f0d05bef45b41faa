"""Throttles: signals with a limit that hold the rotation while they are above it, or unknown."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final, TypeAlias

from psycopg import AsyncConnection

from rotator.exceptions import OptionError, unwrap_group
from rotator.options import RunOptions
from rotator.postgres.connection import Server
from rotator.postgres.throttles import (
    READ_SECONDS,
    Reading,
    Replica,
    check_archiving,
    check_slots,
    read_slot_wal,
    read_unarchived_wal,
    reading,
)
from rotator.runner.aio import run_in_daemon_thread
from rotator.runner.gate import Gate

POLL_SECONDS: Final = 1.0
# A throttle ends when its value has been below this part of the limit for some time.
RESUME_PART: Final = 0.8
RESUME_SECONDS: Final = 1.0

Call: TypeAlias = Callable[[], object]
"""A callable of the project that returns None, or the reason why the rotation must wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThrottleSources:
    """The replicas by Django's aliases, and the callables of ``ROTATOR["THROTTLES"]`` by their paths."""

    replicas: Mapping[str, Server] = field(default_factory=dict)
    calls: Mapping[str, Call] = field(default_factory=dict)


def show_seconds(seconds: float) -> str:
    """Return a lag, e.g. ``0.4 s`` or ``14 s``."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004 - as people write it


def show_bytes(number: float) -> str:
    """Return an amount of WAL, e.g. ``820 MB``."""
    return f"{number / 2**20:,.0f} MB"


@dataclass(slots=True)
class Budget:
    """Decides whether a signal holds the rotation.

    Above the limit it does. It ends when the value has been below ``RESUME_PART`` of the limit for
    ``RESUME_SECONDS``. An unknown value holds the rotation, too.

    Attributes:
        limit: The limit; None where the detail of a reading is the reason, and an empty one ends it.
        show: Returns a value with its unit.
    """

    name: str
    limit: float | None = None
    show: Callable[[float], str] = str
    _is_held: bool = False
    _clear_since: float | None = None

    def judge(self, found: Reading, now: float) -> str:
        """Return the reason to hold the rotation after a reading; empty where there is none."""
        if reason := self._excess(found):
            self._is_held, self._clear_since = True, None
            return reason
        if not self._is_held:
            return ""
        if self.limit is not None and found.value >= RESUME_PART * self.limit:
            self._clear_since = None
        elif self._clear_since is None:
            self._clear_since = now
        elif now - self._clear_since >= RESUME_SECONDS:
            self._is_held = False
            return ""
        return self._waiting(found)

    def _excess(self, found: Reading) -> str:
        if found.problem:
            return f"{self.name} unknown: {found.problem}; ends when it can be read"
        if self.limit is None:
            return f"{self.name}: {found.detail}; ends when it returns None" if found.detail else ""
        if found.value <= self.limit:
            return ""
        return (
            f"{self._signal(found)} {self.show(found.value)} > {self.show(self.limit)}; "
            f"ends below {self.show(RESUME_PART * self.limit)}"
        )

    def _waiting(self, found: Reading) -> str:
        if self.limit is None:
            return f"{self.name}: ends after {RESUME_SECONDS:.0f} s without a reason"
        return (
            f"{self._signal(found)} {self.show(found.value)}; "
            f"ends below {self.show(RESUME_PART * self.limit)} for {RESUME_SECONDS:.0f} s"
        )

    def _signal(self, found: Reading) -> str:
        return f"{self.name} {found.detail}" if found.detail else self.name


@dataclass(slots=True)
class CalledSignal:
    """A callable of the project, called in a thread of its own that may never return."""

    call: Call
    _running: asyncio.Task[object] | None = None

    async def read(self, _control: AsyncConnection | None = None, _rotation: int = 0) -> Reading:
        """Return the result of the call; a problem where it raises an error or does not return in time.

        While a call has not returned, there is no other one.
        """
        if self._running is None:
            self._running = asyncio.create_task(run_in_daemon_thread(self.call), name="rotator throttle")
        done, _ = await asyncio.wait([self._running], timeout=READ_SECONDS)
        if not done:
            return Reading(problem=f"it did not return within {READ_SECONDS:.0f} s")
        finished, self._running = self._running, None
        # The message of the error may contain anything.
        if error := finished.exception():
            return Reading(problem=f"it raised {type(error).__name__}")
        result = finished.result()
        if result is None:
            return Reading()
        if isinstance(result, str) and result:
            return Reading(detail=" ".join(result.split()))
        return Reading(problem=f"it returned {type(result).__name__}, not None or a text")

    def close(self) -> None:
        """Stop waiting for the call."""
        if self._running is not None:
            self._running.cancel()


Read: TypeAlias = Callable[[AsyncConnection, int], Awaitable[Reading]]


class Throttles:
    """Reads the signals of a run, and holds the gate while one of them is above its limit or unknown.

    Attributes:
        lags: The latest lag of each replica that could be read, in seconds, by Django's aliases.
    """

    def __init__(self, options: RunOptions, sources: ThrottleSources) -> None:
        self._options = options
        self._replicas = [
            Replica(alias, server, clock=time.monotonic) for alias, server in sources.replicas.items()
        ]
        self._calls = {path: CalledSignal(call) for path, call in sources.calls.items()}
        self.lags = dict[str, float]()
        self._signals = list[tuple[Budget, Read]]()
        for replica in self._replicas:
            budget = Budget(f"replica lag of {replica.alias}", options.max_lag_seconds, show_seconds)
            self._signals.append((budget, partial(self._read_lag, replica)))
        if options.max_unarchived_wal_bytes is not None:
            budget = Budget("WAL to archive", options.max_unarchived_wal_bytes, show_bytes)
            self._signals.append((budget, lambda control, _: reading(lambda: read_unarchived_wal(control))))
        if options.max_slot_wal_bytes is not None:
            budget = Budget("WAL kept by slot", options.max_slot_wal_bytes, show_bytes)
            self._signals.append((budget, lambda control, _: reading(lambda: read_slot_wal(control))))
        for path, called in self._calls.items():
            self._signals.append((Budget(path), called.read))

    async def _read_lag(self, replica: Replica, _control: AsyncConnection, rotation: int) -> Reading:
        found = await replica.read_lag(rotation)
        self.lags.pop(replica.alias, None)
        if not found.problem:
            self.lags[replica.alias] = found.value
        return found

    async def check(self, control: AsyncConnection) -> None:
        """Refuse a signal that cannot be read, before the rotation begins.

        Raises:
            OptionError: A signal cannot be read.
        """
        for replica in self._replicas:
            await replica.check(control)
        if self._options.max_unarchived_wal_bytes is not None:
            await check_archiving(control)
        if self._options.max_slot_wal_bytes is not None:
            await check_slots(control)
        for path, called in self._calls.items():
            found = await called.read()
            if found.problem:
                called.close()
                raise OptionError(
                    f'ROTATOR["THROTTLES"]: {path} was called, and {found.problem}. Fix it, or remove it.'
                )

    def note_beat(self, beat_at: datetime) -> None:
        """Record a heartbeat, with which the lag of the replicas is measured."""
        for replica in self._replicas:
            replica.note_beat(beat_at)

    async def look(self, control: AsyncConnection, rotation: int, gate: Gate) -> None:
        """Read every signal once, and hold or release the gate."""
        for budget, read in self._signals:
            gate.hold(budget.name, budget.judge(await read(control, rotation), time.monotonic()))

    async def watch(self, control: AsyncConnection, rotation: int, gate: Gate) -> None:
        """Read every signal again and again until cancelled; the connection may be shared."""
        try:
            with unwrap_group():
                async with asyncio.TaskGroup() as tasks:
                    for budget, read in self._signals:
                        looking = self._keep_looking(budget, partial(read, control, rotation), gate)
                        tasks.create_task(looking, name="rotator throttle")
        finally:
            for replica in self._replicas:
                await replica.close()
            for called in self._calls.values():
                called.close()

    async def _keep_looking(self, budget: Budget, read: Callable[[], Awaitable[Reading]], gate: Gate) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            gate.hold(budget.name, budget.judge(await read(), time.monotonic()))
