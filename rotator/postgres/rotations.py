"""The rotation's row: begin, take over, heartbeat, complete and stop.

``read_state``, ``freeze_bound``, ``beat``, ``stop`` and ``complete`` raise SupersededError where another
process owns the rotation. Options, selections and identities are mappings of JSON types.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from psycopg import AsyncConnection, Rollback, errors
from psycopg.abc import Params
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from rotator.events import ActionKind, EndStatus, Findings, StopReason
from rotator.exceptions import OwnedElsewhereError, RotationRepeatedError, RowsLockedError
from rotator.options import Selection, given_options
from rotator.postgres.connection import IS_OWN_SESSION, execute, fetch_as, fetch_row, first, transaction_with
from rotator.postgres.control import log_action
from rotator.postgres.errors import superseded
from rotator.postgres.fence import IDLE_SECONDS, LOCK_CLASS, Lease, share_lock
from rotator.postgres.owner import Owner
from rotator.postgres.planner import gaps
from rotator.postgres.table import TargetTable
from rotator.ranges import Key

_TAKE_OVER_LOCK_SECONDS: Final = 2
_TAKE_OVER_ATTEMPTS: Final = 5
# A session of the application that has chosen the same number is left alone. Some poolers give each session
# the same name.
_END_LOCK_HOLDERS: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_locks AS held JOIN pg_stat_activity USING (pid)"  # noqa: S608 - our own text
    " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
    " AND database = datid AND classid = %(class)s::oid AND objid = %(number)s::oid"
    " AND objsubid = 2 AND pid <> pg_backend_pid()"
    f" AND ({IS_OWN_SESSION} OR EXISTS (SELECT FROM pg_locks AS used WHERE used.pid = held.pid"
    " AND used.relation = 'rotator_rotation'::regclass))"
)
# Ids begin at 1, so the lock of this one is free for the start of a rotation.
_NO_ROTATION: Final = 0

# The server ends a transaction that is idle for long.
_SYNCHRONOUS: Final = {
    "synchronous_commit": "on",
    "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
}
_HAS_ROWS_DONE: Final = (
    "EXISTS (SELECT FROM rotator_completedrange WHERE rotation_id = %(rotation)s AND rows > 0)"
    " OR EXISTS (SELECT FROM rotator_latetransaction WHERE rotation_id = %(rotation)s)"
)
_CONFIRMED_ROWS: Final = (
    "late_rows + COALESCE((SELECT sum(rows) FROM rotator_completedrange WHERE rotation_id = %(rotation)s), 0)"
)
# A run that has not yet read the figures of earlier runs has only its own.
_FIGURES: Final = (
    "active_seconds = GREATEST(active_seconds, %(active_seconds)s),"
    " deferrals = GREATEST(deferrals, %(deferrals)s), retries = GREATEST(retries, %(retries)s),"
    " throttled_seconds = GREATEST(throttled_seconds, %(throttled_seconds)s)"
)
_NOT_HELD: Final = "throttle_reason = '', throttled_since = NULL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The figures of a rotation over all of its runs, as its owner has counted them."""

    active_seconds: float
    deferrals: int = 0
    retries: int = 0
    throttled_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnerReport:
    """The report of the owner with its heartbeat.

    Attributes:
        throttle_reason: What holds it, except for a pause; empty where nothing does.
        held_seconds: The time since which it is held; 0 where it is not.
        rejected_keys: The keys that the server has rejected in this run, with the reason; None where they
            are stored already.
    """

    rows_done: int
    figures: Figures
    applied_revision: int = 0
    throttle_reason: str = ""
    held_seconds: float = 0.0
    rejected_keys: Sequence[tuple[Key, str]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationState:
    """A rotation in the database.

    Attributes:
        owner: The latest owner, of this generation.
        owned_since: The time at which the owner acquired it.
        updated_at: The latest heartbeat, on the database's clock.
        started_xid: The transaction that began the rotation, epoch included.
        bound: The upper key bound; None where it is not frozen yet, or the table was empty.
        rows_total: The rows up to the bound, counted or estimated.
        rows_done: The completed rows: at the latest heartbeat, or confirmed now, see :func:`read_state`.
        late_rows: The rows among them that late transactions confirm.
        figures: The figures of its runs up to the latest heartbeat.
        selection: The rows and the source of their values.
        identity: The :class:`rotator.postgres.identity.TargetIdentity` at the start.
        rejected_keys: The keys that the server rejected in the latest run, with the reason.
    """

    id: int
    generation: int
    status: str
    owner: Owner
    owned_since: datetime
    updated_at: datetime
    started_xid: int
    bound: Key | None
    rows_total: int
    rows_total_is_exact: bool
    rows_done: int
    late_rows: int
    figures: Figures
    selection: Mapping[str, Any]
    identity: Mapping[str, Any]
    rejected_keys: Sequence[Sequence[str]]

    @property
    def lease(self) -> Lease:
        """The lease of the latest owner."""
        return Lease(rotation=self.id, generation=self.generation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """A completed rotation in the database, and the time since then, on the database's clock."""

    id: int
    target: str
    finished_at: datetime
    seconds_ago: float


async def find_unfinished(connection: AsyncConnection, target: str, table_name: str) -> RotationState | None:
    """Return the unfinished rotation of a target; a constraint allows only one."""
    condition = "target = %s AND table_name = %s AND status IN ('running', 'queued', 'interrupted', 'failed')"
    return first(await _find(connection, condition, (target, table_name)))


async def read_rotation(connection: AsyncConnection, rotation: int) -> RotationState:
    """Return the rotation with this id, which exists."""
    (found,) = await _find(connection, "id = %s", (rotation,))
    return found


async def read_state(connection: AsyncConnection, lease: Lease) -> RotationState:
    """Return a rotation that this process owns, with the rows that its checkpoints confirm."""
    condition = "id = %(rotation)s AND generation = %(generation)s"
    found = first(await _find(connection, condition, asdict(lease), counts=True))
    if found is None:
        raise superseded()
    return found


async def _find(
    connection: AsyncConnection, condition: LiteralString, parameters: Params, *, counts: bool = False
) -> list[RotationState]:
    rows_done: LiteralString = _CONFIRMED_ROWS if counts else "rows_done"
    query = (
        "SELECT id, generation, status, owner_host AS host, owner_pid AS pid, owner_process AS process,"  # noqa: S608 - our own text
        " owner_user AS user, version, owned_since, updated_at, started_xid, bound::text, rows_total,"
        f" rows_total_is_exact, ({rows_done})::bigint AS rows_done, late_rows, active_seconds, deferrals,"
        " retries, throttled_seconds, selection, identity, rejected_keys"
        f" FROM rotator_rotation WHERE {condition}"
    )
    found = []
    for row in await fetch_as(connection, dict_row, query, parameters):
        owner = Owner(**{name: row.pop(name) for name in Owner.__dataclass_fields__})
        figures = Figures(**{name: row.pop(name) for name in Figures.__dataclass_fields__})
        found.append(RotationState(owner=owner, figures=figures, **row))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """The terms of a rotation.

    Attributes:
        target: The target as the user writes it.
        table_name: The table's name, as the server quotes it.
        database: Django's alias of the database.
        findings: The findings of the preflight; None without one.
    """

    target: str
    table_name: str
    database: str
    options: Mapping[str, Any]
    selection: Mapping[str, Any]
    identity: Mapping[str, Any]
    findings: Findings | None = None


async def find_last_completed(connection: AsyncConnection, terms: Terms) -> Completed | None:
    """Return the latest completed rotation of the same fields, rows and values.

    Two models can have the same table. So a rotation of the same columns is one of the same fields.
    """
    selection = Selection.from_json(terms.selection)
    if selection.leaked:
        # The file may have other values, and rows that were rotated since have none of them.
        return None
    rows = await fetch_as(
        connection,
        dict_row,
        "SELECT id, target, selection, finished_at,"
        " GREATEST(0, EXTRACT(epoch FROM clock_timestamp() - finished_at))::double precision AS seconds_ago"
        " FROM rotator_rotation WHERE status = 'completed' AND table_name = %(table_name)s"
        " AND (target = %(target)s OR (%(identity)s::jsonb ? 'table_oid'"
        " AND identity -> 'system' = %(identity)s::jsonb -> 'system'"
        " AND identity -> 'table_oid' = %(identity)s::jsonb -> 'table_oid'"
        " AND identity -> 'columns' @> (%(identity)s::jsonb -> 'columns')"
        " AND identity -> 'columns' <@ (%(identity)s::jsonb -> 'columns')))"
        " ORDER BY id DESC",
        _parameters(terms),
    )
    for row in rows:
        if Selection.from_json(row.pop("selection")) == selection:
            return Completed(**row)
    return None


async def check_repetition(connection: AsyncConnection, terms: Terms, *, after: int | None) -> None:
    """Raise RotationRepeatedError for a completed rotation of the same, except that with the id ``after``."""
    completed = await find_last_completed(connection, terms)
    if completed is not None and completed.id != after:
        raise RotationRepeatedError(completed.id, completed.target, completed.finished_at)


async def begin_rotation(
    connection: AsyncConnection,
    terms: Terms,
    owner: Owner,
    *,
    repeats: bool = False,
    after: int | None = None,
) -> Lease | None:
    """Insert a new rotation and own it; return None where another process was faster.

    Its row stores the transaction that inserted it. A row that an older transaction wrote, however late it
    commits, was not rotated by this rotation. With ``repeats``, it can repeat any completed rotation;
    otherwise only the one with the id ``after``, if given.

    Raises:
        OwnedElsewhereError: Another unfinished rotation has some of the same columns.
        RotationRepeatedError: A completed rotation had the same fields, rows and values.
    """
    async with exclusive_lock(connection, _NO_ROTATION):
        await _check_overlap(connection, terms)
        if not repeats:
            await check_repetition(connection, terms, after=after)
        row = await fetch_row(
            connection,
            "INSERT INTO rotator_rotation (target, table_name, database, options, selection, identity,"
            " findings, status, generation, active_seconds, rows_total, rows_total_is_exact, rows_done,"
            " late_rows, stop_reason, error, started_xid, owner_host, owner_pid, owner_process, owner_user,"
            " version) VALUES (%(target)s, %(table_name)s, %(database)s, %(options)s, %(selection)s,"
            " %(identity)s, %(findings)s, 'running', 1, 0, 0, true, 0, 0, '', '',"
            " pg_current_xact_id()::text::bigint, %(host)s, %(pid)s, %(process)s, %(user)s, %(version)s)"
            " ON CONFLICT (target, table_name) WHERE status IN ('running', 'queued', 'interrupted', 'failed')"
            " DO NOTHING RETURNING id",
            {**_parameters(terms), **asdict(owner)},
        )
        if row:
            detail = str(given_options(terms.options, terms.selection))
            await log_action(connection, row[0], ActionKind.STARTED, detail=detail)
        if row and not repeats:
            # A rotation that was unfinished at the first check may have been completed since. Now that this
            # row is inserted, no other one is unfinished.
            await check_repetition(connection, terms, after=after)
    return Lease(rotation=row[0], generation=1) if row else None


def _parameters(terms: Terms) -> dict[str, Any]:
    return {name: Jsonb(value) if isinstance(value, dict) else value for name, value in asdict(terms).items()}


async def _check_overlap(connection: AsyncConnection, terms: Terms) -> None:
    """Refuse a target that shares a column with another one's unfinished rotation."""
    row = await fetch_row(
        connection,
        "SELECT id, target FROM rotator_rotation WHERE table_name = %(table_name)s AND target <> %(target)s"
        " AND status IN ('running', 'queued', 'interrupted', 'failed')"
        " AND (string_to_array(target, ' ') && string_to_array(%(target)s, ' ')"
        # Two models can have the same table.
        " OR (identity -> 'table_oid' = %(identity)s::jsonb -> 'table_oid' AND EXISTS ("
        "SELECT FROM jsonb_array_elements(identity -> 'columns') AS number"
        " WHERE %(identity)s::jsonb -> 'columns' @> number))) ORDER BY id LIMIT 1",
        _parameters(terms),
    )
    if row:
        raise OwnedElsewhereError(
            f"Cannot begin the rotation: rotation {row[0]} of {row[1]} is unfinished and has one of the same "
            "columns. Finish it, or abandon it with --restart."
        )


async def has_rows_done(connection: AsyncConnection, rotation: int) -> bool:
    """Return whether the rotation has given any row a new value."""
    return await fetch_row(connection, f"SELECT {_HAS_ROWS_DONE}", {"rotation": rotation}) == (True,)


async def take_over(
    connection: AsyncConnection,
    lease: Lease,
    terms: Terms,
    owner: Owner,
    *,
    unless_begun: bool = False,
    action: ActionKind,
) -> Lease | None:
    """Raise the generation of a rotation and own it; return None where ``lease`` is out of date.

    When this returns, no transaction of an older generation can commit: each holds the rotation's lock in
    shared mode until its end, and this function has waited for the exclusive mode. With ``unless_begun``, it
    returns None if the rotation has completed rows.

    Raises:
        RowsLockedError: Another session's transaction holds the lock and could not be terminated.
    """
    return await _raise_generation(
        connection,
        lease.rotation,
        "status = 'running', stop_reason = '', error = '', updated_at = clock_timestamp(),"
        " owned_since = clock_timestamp(), options = %(options)s, database = %(database)s,"
        " owner_host = %(host)s, owner_pid = %(pid)s, owner_process = %(process)s, owner_user = %(user)s,"
        " version = %(version)s, selection = %(selection)s",
        f"generation = %(generation)s AND NOT (%(unless_begun)s AND ({_HAS_ROWS_DONE}))",
        {**_parameters(terms), "unless_begun": unless_begun, **asdict(lease), **asdict(owner)},
        action,
        str(given_options(terms.options, terms.selection)),
    )


async def take_over_from_self(
    connection: AsyncConnection, rotation: int, *, owner: Owner, options: dict[str, Any]
) -> Lease | None:
    """Raise the generation of a rotation that this process owns; return None where it does not.

    The present generation is unknown after a lost reply, which may have been the reply to a takeover. It
    waits, and raises RowsLockedError, as :func:`take_over` does.
    """
    return await _raise_generation(
        connection,
        rotation,
        "status = 'running', stop_reason = '', error = '', updated_at = clock_timestamp(),"
        " options = %(options)s",
        "(owner_host, owner_pid, owner_process) = (%(host)s, %(pid)s, %(process)s)",
        {"options": Jsonb(options), **asdict(owner)},
    )


async def find_completed(connection: AsyncConnection, rotation: int, owner: Owner) -> Lease | None:
    """Return the lease with which this process completed a rotation; None where it has not."""
    row = await fetch_row(
        connection,
        "SELECT generation FROM rotator_rotation WHERE id = %(rotation)s AND status = 'completed'"
        " AND (owner_host, owner_pid, owner_process) = (%(host)s, %(pid)s, %(process)s)",
        {"rotation": rotation, **asdict(owner)},
    )
    return Lease(rotation=rotation, generation=row[0]) if row else None


async def abandon(connection: AsyncConnection, lease: Lease) -> bool:
    """End an unfinished rotation permanently; return False where ``lease`` is out of date."""
    abandoned = await _raise_generation(
        connection,
        lease.rotation,
        "status = 'abandoned', finished_at = clock_timestamp()",
        "generation = %(generation)s",
        asdict(lease),
        ActionKind.ABANDONED,
    )
    return abandoned is not None


async def _raise_generation(
    connection: AsyncConnection,
    rotation: int,
    assignments: LiteralString,
    condition: LiteralString,
    parameters: Mapping[str, Any],
    action: ActionKind | None = None,
    detail: str = "",
) -> Lease | None:
    """Change an unfinished rotation under its exclusive lock; return None where the condition is false."""
    async with exclusive_lock(connection, rotation):
        query = (
            f"UPDATE rotator_rotation SET generation = generation + 1, {assignments}"  # noqa: S608 - our own text
            f" WHERE id = %(rotation)s AND {condition}"
            " AND status IN ('running', 'queued', 'interrupted', 'failed') RETURNING generation"
        )
        row = await fetch_row(connection, query, {**parameters, "rotation": rotation})
        if row and action is not None:
            await log_action(connection, rotation, action, detail=detail)
    return Lease(rotation=rotation, generation=row[0]) if row else None


async def freeze_bound(
    connection: AsyncConnection, lease: Lease, *, bound: Key | None, rows_total: int, is_exact: bool
) -> None:
    """Store the upper key bound and the number of rows up to it."""
    await _update(
        connection,
        lease,
        "bound = %(bound)s::jsonb, rows_total = %(rows_total)s, rows_total_is_exact = %(is_exact)s",
        {"bound": bound, "rows_total": rows_total, "is_exact": is_exact},
    )


async def beat(connection: AsyncConnection, lease: Lease, report: OwnerReport) -> datetime:
    """Write a heartbeat, and return its time on the database's clock."""
    _, beat_at = await _update(
        connection,
        lease,
        f"rows_done = %(rows_done)s, {_FIGURES}, throttle_reason = %(throttle_reason)s,"
        " throttled_since = CASE WHEN %(throttle_reason)s = '' THEN NULL"
        # The reason may change with each heartbeat, while the rotation is held all the time.
        " ELSE COALESCE(throttled_since, clock_timestamp() - make_interval(secs => %(held_seconds)s)) END,"
        " rejected_keys = COALESCE(%(rejected_keys)s, rejected_keys),"
        " applied_revision = %(applied_revision)s, applied_at ="
        " CASE WHEN applied_revision = %(applied_revision)s THEN applied_at ELSE clock_timestamp() END",
        {
            **asdict(report),
            **asdict(report.figures),
            "rejected_keys": None if report.rejected_keys is None else _rejected(report.rejected_keys),
        },
    )
    return beat_at


async def stop(
    connection: AsyncConnection,
    lease: Lease,
    *,
    status: EndStatus,
    error: str,
    figures: Figures,
    stop_reason: StopReason | None = None,
    rejected_keys: Sequence[tuple[Key, str]] = (),
) -> int:
    """End the run and leave the rotation unfinished; return the rows that the checkpoints confirm."""
    async with transaction_with(connection, _SYNCHRONOUS):
        rows_done, _ = await _update(
            connection,
            lease,
            "status = %(status)s, stop_reason = %(stop_reason)s, error = %(error)s,"
            f" rejected_keys = %(rejected_keys)s, {_FIGURES}, {_NOT_HELD}, rows_done = {_CONFIRMED_ROWS}",
            {
                "status": status,
                "stop_reason": stop_reason or "",
                "error": error,
                "rejected_keys": _rejected(rejected_keys),
                **asdict(figures),
            },
        )
        detail = stop_reason or error or status
        await log_action(connection, lease.rotation, ActionKind.STOPPED, detail=detail)
    return rows_done


def _rejected(keys: Sequence[tuple[Key, str]]) -> Jsonb:
    return Jsonb([[str(key), reason] for key, reason in keys])


async def complete(
    connection: AsyncConnection,
    table: TargetTable,
    lease: Lease,
    bound: Key | None,
    *,
    figures: Figures,
    unconfirmed_rows: int | None = None,
) -> int | None:
    """Mark the rotation completed, synchronously, if the checkpoints leave no gap.

    In the WAL, its commit record follows those of all ranges, so it cannot survive a crash that loses one.

    Returns:
        The rows that the checkpoints confirm; None where they leave a gap.
    """
    async with transaction_with(connection, _SYNCHRONOUS):
        # If this process dies before it commits, the next owner can end this transaction.
        await share_lock(connection, lease.rotation)
        rows_done, _ = await _update(
            connection,
            lease,
            "status = 'completed', finished_at = clock_timestamp(), stop_reason = '', error = '',"
            f" rejected_keys = '[]', {_FIGURES}, {_NOT_HELD}, rows_done = {_CONFIRMED_ROWS},"
            " unconfirmed_rows = %(unconfirmed_rows)s",
            {"unconfirmed_rows": unconfirmed_rows, **asdict(figures)},
        )
        await log_action(connection, lease.rotation, ActionKind.COMPLETED)
        if await gaps(connection, table, lease.rotation, bound):
            raise Rollback
        return rows_done
    return None


async def record_figures(connection: AsyncConnection, lease: Lease, *, figures: Figures) -> None:
    """Record the figures of a completed rotation; its time includes the final VACUUM."""
    statement = (
        f"UPDATE rotator_rotation SET {_FIGURES}"  # noqa: S608 - our own text
        " WHERE id = %(rotation)s AND generation = %(generation)s AND status = 'completed'"
    )
    await execute(connection, statement, {**asdict(figures), **asdict(lease)})


async def _update(
    connection: AsyncConnection, lease: Lease, assignments: LiteralString, values: dict[str, Any]
) -> tuple[int, datetime]:
    """Change the row of a rotation that this process owns; return its completed rows and the time."""
    query = (
        f"UPDATE rotator_rotation SET updated_at = clock_timestamp(), {assignments}"  # noqa: S608 - our own text
        " WHERE id = %(rotation)s AND generation = %(generation)s AND status = 'running'"
        " RETURNING rows_done, updated_at"
    )
    row = await fetch_row(connection, query, {**values, **asdict(lease)})
    if row is None:
        raise superseded()
    return row[0], row[1]


@asynccontextmanager
async def exclusive_lock(
    connection: AsyncConnection, number: int, *, lock_class: int = LOCK_CLASS
) -> AsyncIterator[None]:
    """Open a transaction that holds the lock of a rotation, or of a span, in exclusive mode.

    By then, the transactions of its ranges have ended.
    """
    parameters = {"class": lock_class, "number": number}
    settings = _SYNCHRONOUS | {"lock_timeout": f"{_TAKE_OVER_LOCK_SECONDS}s"}
    async with transaction_with(connection, settings):
        for _ in range(_TAKE_OVER_ATTEMPTS):
            with suppress(errors.LockNotAvailable):
                async with connection.transaction():
                    await connection.execute(
                        "SELECT pg_advisory_xact_lock(%(class)s::integer, %(number)s::integer)", parameters
                    )
                break
            # The backend of a frozen client never exits, and keeps its locks. That of another role may need a
            # privilege; it may also end by itself until the next attempt.
            with suppress(errors.InsufficientPrivilege):
                async with connection.transaction():
                    await connection.execute(_END_LOCK_HOLDERS, parameters)
        else:
            raise RowsLockedError(
                "Cannot acquire the rotation: sessions that are not the rotator's, or that this role cannot "
                f"terminate, hold its advisory lock (classid {lock_class}, objid {number} in pg_locks). End "
                "them, then run the same command again."
            )
        yield
