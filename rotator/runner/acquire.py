"""Acquires a target's rotation: starts one, resumes one, or takes one over."""

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from psycopg import AsyncConnection

from rotator.events import OwnerWatched
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
from rotator.postgres.rotations import NewRotation, NewSelection, Unfinished
from rotator.postgres.table import TargetTable
from rotator.runner.context import RunContext

WATCH_SECONDS: Final = 10.0
WATCH_EVERY_SECONDS: Final = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Acquired:
    """What this process has become the owner of.

    Attributes:
        lease: What it may write for.
        stopped_at: The last heartbeat of the run before; None for a new rotation.
        is_completed: Whether it turned out to be completed, by a transaction whose reply was lost.
    """

    lease: Lease
    stopped_at: datetime | None
    is_completed: bool = False


class Acquisition:
    """One process's attempt to own the rotation of a target."""

    def __init__(self, connection: AsyncConnection, table: TargetTable, context: RunContext) -> None:
        """Take a connection in autocommit mode."""
        self._connection = connection
        self._table = table
        self._context = context

    async def acquire(self) -> Acquired:
        """Own the unfinished rotation of the target, or a new one where there is none.

        Raises:
            OwnedElsewhereError: Its owner is alive, or finished it just now; or another unfinished rotation
            has
                some of the same fields.
            OptionError: The unfinished rotation is for other rows or values.
            TargetError: The target is not what it was when the rotation began.
            RotationRepeatedError: A completed rotation had the same fields, rows and values.
            RotationFinishedError: It is not the one that was asked for.
            StoppedBeforeStartError: A stop was asked for while its owner was being watched.
        """
        target, owner = self._context.target, self._context.owner
        options = self._context.options.to_json()
        identity = await read_identity(self._connection, self._table)
        while True:
            unfinished = await self._find()
            self._check_identity(unfinished)
            if unfinished is None:
                terms = NewRotation(
                    target=target.label,
                    table_name=self._table.found_name,
                    database=target.database,
                    options=options,
                    selection=target.selection.to_json(),
                    identity=identity.to_json(),
                )
                lease = await rotations.begin_rotation(
                    self._connection,
                    terms,
                    owner,
                    repeats=self._context.options.restart,
                    after=self._context.options.after,
                )
                if lease is not None:
                    return Acquired(lease=lease, stopped_at=None)
                continue
            if await self._is_alive(unfinished):
                raise self._owned_elsewhere(unfinished)
            seen = Lease(rotation=unfinished.id, generation=unfinished.generation)
            if self._context.options.restart:
                await rotations.abandon(self._connection, seen)
                continue
            selection = await self._selection(unfinished)
            await self._check_target(unfinished, identity)
            lease = await rotations.take_over(
                self._connection,
                seen,
                database=target.database,
                owner=owner,
                options=options,
                selection=selection,
            )
            if lease is not None:
                return Acquired(lease=lease, stopped_at=unfinished.updated_at)

    async def _find(self) -> Unfinished | None:
        label = self._context.target.label
        return await rotations.find_unfinished(self._connection, label, self._table.found_name)

    async def _is_alive(self, seen: Unfinished) -> bool:
        """Whether the rotation's owner still works on it; takes up to ``WATCH_SECONDS`` to say no."""
        if seen.status != "running" or self._context.options.take_over or seen.owner.is_gone():
            return False
        self._context.notify(OwnerWatched(owner=str(seen.owner), seconds=WATCH_SECONDS))
        clock = asyncio.get_running_loop().time
        until = clock() + WATCH_SECONDS
        while clock() < until:
            if await self._context.stop_signal.wait(WATCH_EVERY_SECONDS):
                raise StoppedBeforeStartError(self._context.stop_signal.signal)
            now = await self._find()
            if now is None and not self._context.options.restart:
                raise OwnedElsewhereError(
                    f"Rotation {seen.id} of {self._context.target.label} was finished by {seen.owner} just "
                    "now. To rotate the same rows again, use --restart."
                )
            if now is None or (now.id, now.generation, now.status) != (seen.id, seen.generation, seen.status):
                # It is another one's by now, or nobody's: taking over will find out.
                return False
            if now.updated_at != seen.updated_at:
                return True
        return False

    def _check_identity(self, found: Unfinished | None) -> None:
        wanted = self._context.options.rotation
        if wanted is not None and (found is None or found.id != wanted):
            raise RotationFinishedError(
                f"Rotation {wanted} of {self._context.target.label} is not unfinished any more."
            )

    async def _selection(self, found: Unfinished) -> NewSelection:
        """Return the selection to resume with; refuse what the rotation was not begun for.

        While no row has a new value, another generator can make them.
        """
        label, chosen = self._context.target.label, self._context.target.selection
        saved = Selection.from_json(found.selection)
        if chosen == saved:
            return NewSelection(saved=chosen.to_json())
        is_other_maker = replace(chosen, generator=saved.generator) == saved
        if not is_other_maker or await rotations.has_rows_done(self._connection, found.id):
            raise OptionError(
                f"Rotation {found.id} of {label} was begun with {saved}, and this command has {chosen}: give "
                "it the same, or abandon that rotation with --restart."
            )
        return NewSelection(saved=chosen.to_json(), unless_begun=True)

    async def _check_target(self, found: Unfinished, identity: TargetIdentity) -> None:
        """Refuse to resume on a target whose checkpoints mean something else now."""
        saved = TargetIdentity.from_json(found.identity)
        if saved is None:
            return
        difference = saved.difference(identity)
        if not difference and (rewritten := saved.rewritten(identity)):
            writers = await count_last_writers(
                self._connection,
                self._table,
                rotation=found.id,
                started_xid=found.started_xid,
                rewritten=rewritten,
            )
            difference = REWRITTEN if writers.renewed else ""
        if difference:
            raise changed_target(found.id, self._context.target.label, difference)

    def _owned_elsewhere(self, found: Unfinished) -> OwnedElsewhereError:
        return OwnedElsewhereError(
            f"Rotation {found.id} of {self._context.target.label} is being worked on by {found.owner} since "
            f"{found.owned_since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, with {found.rows_done:,} of "
            f"{found.rows_total:,} rows done: wait for it, or take it over with --take-over."
        )


async def reacquire(
    connection: AsyncConnection, acquired: Acquired, table: TargetTable, context: RunContext
) -> Acquired:
    """Own again what this process owned before it lost a connection.

    Nobody knows what the lost connections were about to commit: a range, the taking over itself, completion.
    Under the exclusive lock, with a new generation, they have committed it or never will.

    Raises:
        SupersededError: Another process owns it.
        TargetError: What answers now is another server, or another table.
    """
    rotation, owner = acquired.lease.rotation, context.owner
    options = context.options.to_json()
    lease = await rotations.take_over_from_self(connection, rotation, owner=owner, options=options)
    if lease is not None:
        saved = TargetIdentity.from_json((await rotations.read_state(connection, lease)).identity)
        difference = saved and saved.difference(await read_identity(connection, table))
        if difference:
            raise changed_target(rotation, context.target.label, difference)
        return replace(acquired, lease=lease)
    completed = await rotations.find_completed(connection, rotation, owner)
    if completed is None:
        raise superseded()
    return replace(acquired, lease=completed, is_completed=True)
