"""Runs of a rotation of a table that is no model's, in this process or in one that kills itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final
from unittest.mock import patch
from uuid import uuid4

import uvloop

from rotator.events import (
    ConfirmationStarted,
    Event,
    LateCommitsAwaited,
    LateRowsRotated,
    Observer,
    RangeCompleted,
    RangeDeferred,
    RotationStarted,
    RotationStopped,
)
from rotator.fields.generators import uuid4_block
from rotator.options import RunOptions
from rotator.postgres import last_writers, writer
from rotator.postgres.connection import Server
from rotator.postgres.values import FromRows, InBulk, Place, UuidBlock, Values, ValueSource
from rotator.ranges import Key
from rotator.runner import late_rows, session
from rotator.runner.context import RunTarget
from rotator.runner.runner import Run
from tests.integration.killed import kill_itself, until_killed

# The events that are counted before the process kills itself; each run has some of them.
_STEPS: Final = (
    RotationStarted,
    RangeCompleted,
    RangeDeferred,
    LateCommitsAwaited,
    LateRowsRotated,
    ConfirmationStarted,
    RotationStopped,
)


async def _make_uuids(count: int) -> tuple[Values, ...]:
    return (UuidBlock(uuid4_block(count)),)


async def _make_texts(count: int) -> tuple[Values, ...]:
    return ([f"new {uuid4()}" for _ in range(count)],)


async def _make_for_rows(keys: Sequence[Key]) -> tuple[list[Key], tuple[Values, ...]]:
    return list(keys), await _make_texts(len(keys))


async def _make_at(places: Sequence[Place]) -> tuple[list[Place], tuple[Values, ...]]:
    return list(places), await _make_texts(len(places))


async def _make_uuids_for_rows(keys: Sequence[Key]) -> tuple[list[Key], tuple[Values, ...]]:
    return list(keys), ([uuid4() for _ in keys],)


async def _make_uuids_at(places: Sequence[Place]) -> tuple[list[Place], tuple[Values, ...]]:
    return list(places), ([uuid4() for _ in places],)


def value_source(value_type: str, *, from_rows: bool) -> ValueSource:
    """Return what makes values of a type."""
    if value_type == "uuid":
        return FromRows(_make_uuids_for_rows, _make_uuids_at) if from_rows else InBulk(_make_uuids)
    return FromRows(_make_for_rows, _make_at) if from_rows else InBulk(_make_texts)


@contextmanager
def scaled_down(slice_rows: int) -> Iterator[None]:
    """Give a small table several slices in a range, and several chunks in the scan for older rows."""
    with ExitStack() as stack:
        for module, name, value in (
            (writer, "SLICE_ROWS", slice_rows),
            (last_writers, "CHUNK_BLOCKS", 1),
            # Do not wait for open transactions before the bound is read.
            (session, "OLDER_WRITERS_SECONDS", 0),
            (late_rows, "POLL_SECONDS", 0.02),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


def rotate(
    server: Server, target: RunTarget, options: RunOptions, observer: Observer, *, slice_rows: int
) -> RotationStopped:
    """Rotate until the run ends."""

    async def main() -> RotationStopped:
        return await Run(server, target, options, observer).rotate()

    with scaled_down(slice_rows):
        return uvloop.run(main())


def rotate_until_killed(
    server: Server, target: RunTarget, options: RunOptions, *, slice_rows: int, events: int
) -> None:
    """Rotate in a process of its own, which dies by SIGKILL after so many events, or at the end."""
    until_killed(_rotate, server, target, options, slice_rows, events)


def _rotate(server: Server, target: RunTarget, options: RunOptions, slice_rows: int, events: int) -> None:
    try:
        rotate(server, target, options, _killer(events), slice_rows=slice_rows)
    finally:
        # The run ended, or was refused, before that event.
        kill_itself()


def _killer(events: int) -> Callable[[Event], None]:
    left = events

    def observer(event: Event) -> None:
        nonlocal left
        left -= isinstance(event, _STEPS)
        if not left:
            kill_itself()

    return observer
