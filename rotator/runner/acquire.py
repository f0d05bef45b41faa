"""Acquires a target's rotation: starts one, resumes one, or takes one over."""

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from psycopg import AsyncConnection

from rotator.events import ActionKind, OwnerWatched
from rotator.exceptions import (
    OptionError,
    OwnedElsewhereError,
    RotationFinishedError,
    StoppedBeforeStartError,
)
from rotator.options import Selection
from rotator.postgres import rotations
from rotator.postgres.errors import superseded
from rotator.postgres.fence import Lease
from rotator.postgres.identity import REWRITTEN, TargetIdentity, changed_target, read_identity
from rotator.postgres.last_writers import count_last_writers
from rotator.postgres.owner import SILENT_SECONDS
from rotator.postgres.rotations import RotationState
from rotator.runner.context import RunContext

WATCH_EVERY_SECONDS: Final = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Acquired:
    """A rotation that this process owns.

    Attributes:
        stopped_at: The last heartbeat of the run before; None for a new rotation.
        is_completed: Whether it is completed; the reply of that transaction may have been lost.
    """

    lease: Lease
    stopped_at: datetime | None
    is_completed: bool = False


async def acquire(connection: AsyncConnection, context: RunContext) -> Acquired:
    """Acquire the unfinished rotation of the target, or start a new one where there is none.

    Raises:
        OwnedElsewhereError: Its owner is alive, or has just completed it; or another unfinished rotation has
            some of the same fields.
        OptionError: The unfinished rotation is for other rows or values.
        TargetError: The target has changed since the rotation began.
        RotationRepeatedError: A completed rotation had the same fields, rows and values.
        RotationFinishedError: The rotation of the options is finished.
        StoppedBeforeStartError: A stop was requested while its owner was being watched.
    """
    target, table, options = context.target, context.table, context.options
    identity = await read_identity(connection, table)
    terms = context.terms(identity)
    while True:
        found = await rotations.find_unfinished(connection, target.label, table.found_name)
        if options.rotation is not None and (found is None or found.id != options.rotation):
            raise RotationFinishedError(
                f"There is no unfinished rotation {options.rotation} of {target.label}."
            )
        if found is None:
            lease = await rotations.begin_rotation(
                connection, terms, context.owner, repeats=options.restart, after=options.after
            )
            if lease is not None:
                return Acquired(lease=lease, stopped_at=None)
            continue
        if await _is_alive(connection, context, found):
            raise OwnedElsewhereError(
                f"Rotation {found.id} of {target.label} is being worked on by {found.owner} since "
                f"{found.owned_since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, with {found.rows_done:,} of "
                f"{found.rows_total:,} rows done: wait for it, or take it over with --take-over."
            )
        if options.restart:
            await rotations.abandon(connection, found.lease)
            continue
        unless_begun = await _changes_generator(connection, context, found)
        await _check_target(connection, context, found, identity)
        lease = await rotations.take_over(
            connection,
            found.lease,
            terms,
            context.owner,
            unless_begun=unless_begun,
            action=ActionKind.TAKEN_OVER if found.status == "running" else ActionKind.RESUMED,
        )
        if lease is not None:
            return Acquired(lease=lease, stopped_at=found.updated_at)


async def _is_alive(connection: AsyncConnection, context: RunContext, seen: RotationState) -> bool:
    """Watch the heartbeat of the owner for up to ``SILENT_SECONDS``, and return whether it moves."""
    if seen.status != "running" or context.options.take_over or seen.owner.is_gone():
        return False
    context.notify(OwnerWatched(owner=str(seen.owner), seconds=SILENT_SECONDS))
    clock = asyncio.get_running_loop().time
    until = clock() + SILENT_SECONDS
    while clock() < until:
        if await context.stop_signal.wait(WATCH_EVERY_SECONDS):
            raise StoppedBeforeStartError(context.stop_signal.signal)
        now = await rotations.find_unfinished(connection, context.target.label, context.table.found_name)
        if now is None and not context.options.restart:
            raise OwnedElsewhereError(
                f"Rotation {seen.id} of {context.target.label} was finished by {seen.owner} just "
                "now. To rotate the same rows again, use --restart."
            )
        if now is None or (now.id, now.generation, now.status) != (seen.id, seen.generation, seen.status):
            # It has another owner by now, or none. The takeover finds out which.
            return False
        if now.updated_at != seen.updated_at:
            return True
    return False


async def _changes_generator(connection: AsyncConnection, context: RunContext, found: RotationState) -> bool:
    """Return whether the generator is another one, as it may be while no row has a new value."""
    chosen, saved = context.target.selection, Selection.from_json(found.selection)
    if chosen == saved:
        return False
    differs_in_generator = replace(chosen, generator=saved.generator) == saved
    if not differs_in_generator or await rotations.has_rows_done(connection, found.id):
        raise OptionError(
            f"Rotation {found.id} of {context.target.label} was begun with {saved}, and this command has "
            f"{chosen}. Use the same options, or abandon that rotation with --restart."
        )
    return True


async def _check_target(
    connection: AsyncConnection, context: RunContext, found: RotationState, identity: TargetIdentity
) -> None:
    """Refuse to resume on a target to which the checkpoints do not apply."""
    saved = TargetIdentity.from_json(found.identity)
    if saved is None:
        return
    difference = saved.difference(identity)
    if not difference and (rewritten := saved.rewritten(identity)):
        writers = await count_last_writers(
            connection, context.table, rotation=found.id, started_xid=found.started_xid, rewritten=rewritten
        )
        difference = REWRITTEN if writers.renewed else ""
    if difference:
        raise changed_target(found.id, context.target.label, difference)


async def reacquire(connection: AsyncConnection, acquired: Acquired, context: RunContext) -> Acquired:
    """Acquire again a rotation that this process owned before it lost a connection.

    The lost connections may have committed a range, the takeover or the completion. Under the exclusive lock
    and with a new generation, they have committed it or never will.

    Raises:
        SupersededError: Another process owns it.
        TargetError: Another server answers, or the table is another one.
    """
    rotation, owner = acquired.lease.rotation, context.owner
    options = context.options.to_json()
    lease = await rotations.take_over_from_self(connection, rotation, owner=owner, options=options)
    if lease is None:
        completed = await rotations.find_completed(connection, rotation, owner)
        if completed is None:
            raise superseded()
        return replace(acquired, lease=completed, is_completed=True)
    saved = TargetIdentity.from_json((await rotations.read_state(connection, lease)).identity)
    if saved and (difference := saved.difference(await read_identity(connection, context.table))):
        raise changed_target(rotation, context.target.label, difference)
    return replace(acquired, lease=lease)
