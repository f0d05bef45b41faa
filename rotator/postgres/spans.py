"""The spans that a rotation's owner has planned, and the helpers that claim them.

``clear``, ``plan``, ``add_helper`` and ``finish`` raise SupersededError where another process owns the
rotation or the span.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, LiteralString

from psycopg import AsyncConnection
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from rotator.postgres.connection import execute, fetch_as, fetch_column, fetch_row
from rotator.postgres.errors import superseded, translate_errors
from rotator.postgres.fence import SPAN_LOCK_CLASS, Lease, fence
from rotator.postgres.planner import gaps
from rotator.postgres.rotations import exclusive_lock
from rotator.postgres.table import TargetTable
from rotator.ranges import Key, KeyInterval

# A helper renews its leases long before they expire.
LEASE_SECONDS: Final = 20

# The rotation, where it runs with the generation of the lease.
_OWNED: Final = (
    "rotator_rotation r WHERE r.id = %(rotation)s AND r.generation = %(generation)s AND r.status = 'running'"
)
_CLAIMABLE: Final = (
    "finished_at IS NULL AND (lease_expires_at IS NULL OR lease_expires_at < clock_timestamp())"
)
_LEASE_END: Final = f"clock_timestamp() + make_interval(secs => {LEASE_SECONDS})"

_PLAN: Final = (
    "INSERT INTO rotator_span (rotation_id, after, through, checkpoints_before, generation, worker,"  # noqa: S608 - our own text
    " deferrals, retries, failed_keys) SELECT r.id, %(after)s::jsonb, %(through)s::jsonb,"
    f" COALESCE((SELECT max(id) FROM rotator_completedrange), 0), 0, '', 0, 0, '[]' FROM {_OWNED}"
)
_COLLECT_FINISHED: Final = (
    f"DELETE FROM rotator_span s USING {_OWNED} AND s.rotation_id = r.id AND s.finished_at IS NOT NULL"  # noqa: S608 - our own text
    " RETURNING s.deferrals, s.retries, s.failed_keys"
)
_READ_PROGRESS: Final = (
    "SELECT s.*, count(c.id) AS ranges, COALESCE(sum(c.rows), 0)::bigint AS rows,"  # noqa: S608 - our own text
    " count(c.id) FILTER (WHERE c.id <= s.settled) AS settled_ranges,"
    " COALESCE(sum(c.rows) FILTER (WHERE c.id <= s.settled), 0)::bigint AS settled_rows"
    " FROM (SELECT count(*) AS spans, COALESCE(sum(deferrals), 0)::bigint AS deferrals,"
    f" count(*) FILTER (WHERE {_CLAIMABLE}) AS claimable,"
    " COALESCE(min(checkpoints_before) FILTER (WHERE finished_at IS NULL), %(since)s::bigint) AS settled"
    " FROM rotator_span WHERE rotation_id = %(rotation)s) s"
    " LEFT JOIN rotator_completedrange c ON c.rotation_id = %(rotation)s AND c.id > %(since)s"
    " GROUP BY s.spans, s.deferrals, s.claimable, s.settled"
)
_ADD_HELPER: Final = (
    "WITH lost AS (DELETE FROM rotator_helper WHERE id = %(instead_of)s)"  # noqa: S608 - our own text
    f" INSERT INTO rotator_helper (rotation_id, error) SELECT r.id, '' FROM {_OWNED} RETURNING id"
)
_RENEW: Final = (
    f"WITH span AS (UPDATE rotator_span SET lease_expires_at = {_LEASE_END} WHERE id = %(span)s"  # noqa: S608 - our own text
    " AND generation = %(span_generation)s AND worker <> '' AND finished_at IS NULL)"
    f" UPDATE rotator_helper h SET expires_at = {_LEASE_END} FROM {_OWNED}"
    " AND h.rotation_id = r.id AND h.id = %(helper)s"
)
_CLAIM: Final = (
    "UPDATE rotator_span s SET generation = s.generation + 1, worker = %(worker)s,"  # noqa: S608 - our own text
    f" lease_expires_at = {_LEASE_END} FROM {_OWNED} AND s.id = (SELECT id FROM rotator_span"
    f" WHERE rotation_id = %(rotation)s AND {_CLAIMABLE} ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)"
    " RETURNING s.id, s.generation, s.after::text, s.through::text, s.checkpoints_before"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedSpan:
    """A span that a helper has finished; ``failed_keys`` have the reasons with them."""

    deferrals: int
    retries: int
    failed_keys: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The spans that are left, and the checkpoints since the owner last read them.

    Attributes:
        claimable: The number of spans among them that no living helper has claimed.
        settled: The id up to which no transaction in flight can add a checkpoint.
        ranges: The number of checkpoints after the given id.
        settled_ranges: The number of ranges among them up to the settled id.
    """

    spans: int
    deferrals: int
    claimable: int
    settled: int
    ranges: int
    rows: int
    settled_ranges: int
    settled_rows: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HelperState:
    """A message that asks for help, or the task that has received it.

    Attributes:
        is_alive: Whether a task has received it and has renewed its lease since.
        seconds_since_sent: The time since the message was sent; None where it is not sent.
        error: The reason why the task has stopped; empty where it has not failed.
    """

    id: int
    is_alive: bool
    seconds_since_sent: float | None
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimedSpan:
    """A span that this process works on, and the gaps in it that no checkpoint covers."""

    lease: Lease
    gaps: list[KeyInterval]


async def clear(connection: AsyncConnection, lease: Lease) -> int:
    """Remove the spans and the helpers of an earlier owner, and return the latest checkpoint's id."""
    async with translate_errors(connection), connection.transaction():
        await fence(connection, lease)
        await connection.execute("DELETE FROM rotator_span WHERE rotation_id = %s", (lease.rotation,))
        await connection.execute("DELETE FROM rotator_helper WHERE rotation_id = %s", (lease.rotation,))
        (latest,) = await fetch_column(connection, "SELECT COALESCE(max(id), 0) FROM rotator_completedrange")
    return int(latest)


async def plan(connection: AsyncConnection, lease: Lease, span: KeyInterval) -> None:
    """Add a span that helpers can claim."""
    parameters = {"after": span.after, "through": span.through, **asdict(lease)}
    if not await execute(connection, _PLAN, parameters):
        raise superseded()


async def collect_finished(connection: AsyncConnection, lease: Lease) -> list[FinishedSpan]:
    """Delete the finished spans, and return what their helpers have reported."""
    return await fetch_as(connection, class_row(FinishedSpan), _COLLECT_FINISHED, asdict(lease))


async def read_progress(connection: AsyncConnection, rotation: int, *, since: int) -> Progress:
    """Count the spans that are left, and the checkpoints with a higher id than ``since``.

    Checkpoints do not become visible in the order of their ids. But an id that is older than a span belongs
    to an earlier span, and its checkpoint is visible once that span is finished.
    """
    parameters = {"rotation": rotation, "since": since}
    (progress,) = await fetch_as(connection, class_row(Progress), _READ_PROGRESS, parameters)
    return progress


async def read_helpers(connection: AsyncConnection, rotation: int) -> list[HelperState]:
    """Return the messages and the tasks of a rotation."""
    return await fetch_as(
        connection,
        class_row(HelperState),
        "SELECT id, COALESCE(expires_at > clock_timestamp(), false) AS is_alive, error,"
        " EXTRACT(epoch FROM clock_timestamp() - sent_at)::double precision AS seconds_since_sent"
        " FROM rotator_helper WHERE rotation_id = %s ORDER BY id",
        (rotation,),
    )


async def add_helper(connection: AsyncConnection, lease: Lease, *, instead_of: int | None) -> int:
    """Add a message that will be sent instead of another helper's, if given; return its id."""
    row = await fetch_row(connection, _ADD_HELPER, {"instead_of": instead_of, **asdict(lease)})
    if row is None:
        raise superseded()
    return int(row[0])


async def mark_sent(connection: AsyncConnection, messages: Sequence[int]) -> None:
    """Record that messages were sent; a helper that has received one has deleted its row."""
    await execute(
        connection,
        "UPDATE rotator_helper SET sent_at = clock_timestamp() WHERE id = ANY (%s)",
        (list(messages),),
    )


async def renew(connection: AsyncConnection, lease: Lease, helper: int) -> bool:
    """Renew the leases of a helper and of the span that it works on.

    Return False where the helper is no longer needed: the rotation does not run with this generation, or
    another message was sent instead.
    """
    return await execute(connection, _RENEW, {"helper": helper, **asdict(lease)}) == 1


async def claim(
    connection: AsyncConnection, table: TargetTable, lease: Lease, *, worker: str
) -> ClaimedSpan | None:
    """Claim the next span; None where there is none, or the rotation does not run with this generation.

    When this returns, no transaction of an earlier helper of the same span can commit. Those that begin now
    fail at the fence, which reads the new generation. Those that have passed the fence hold the span's lock
    in shared mode until they end, and this waits for the exclusive mode before it reads the gaps.

    Raises:
        RowsLockedError: A transaction of an earlier helper keeps the lock and could not be terminated.
    """
    async with translate_errors(connection):
        async with connection.pipeline(), connection.transaction():
            # A crash must not reset the generation.
            await connection.execute("SET LOCAL synchronous_commit = on")
            cursor = await connection.execute(_CLAIM, {"worker": worker, **asdict(lease)})
        row = await cursor.fetchone()
    if row is None:
        return None
    number, generation, after, through, before = row
    left = [KeyInterval(after=after, through=through)]
    if generation > 1:
        async with exclusive_lock(connection, number, lock_class=SPAN_LOCK_CLASS):
            pass
        left = await gaps(connection, table, lease.rotation, through, after=after, checkpoints_before=before)
    return ClaimedSpan(lease=replace(lease, span=number, span_generation=generation), gaps=left)


async def report_deferrals(connection: AsyncConnection, lease: Lease, deferrals: int) -> None:
    """Add deferrals to those of a span that this process works on."""
    await _update_span(connection, lease, "", {"deferrals": deferrals, "retries": 0})


async def release(connection: AsyncConnection, lease: Lease, *, deferrals: int, retries: int) -> None:
    """Leave the rest of a span to another helper."""
    counts = {"deferrals": deferrals, "retries": retries}
    await _update_span(connection, lease, "worker = '', lease_expires_at = NULL,", counts)


async def finish(
    connection: AsyncConnection,
    lease: Lease,
    *,
    deferrals: int,
    retries: int,
    failed_keys: Sequence[tuple[Key, str]] = (),
) -> None:
    """Record that every row of a span was rotated or has failed."""
    values = {
        "deferrals": deferrals,
        "retries": retries,
        "failed": Jsonb([[str(key), reason] for key, reason in failed_keys]),
    }
    assignments: LiteralString = "finished_at = clock_timestamp(), failed_keys = %(failed)s,"
    if not await _update_span(connection, lease, assignments, values):
        raise superseded()


async def _update_span(
    connection: AsyncConnection, lease: Lease, assignments: LiteralString, values: Mapping[str, object]
) -> int:
    """Change a span, and add to its counts; return 0 where this process does not work on it any more."""
    return await execute(
        connection,
        f"UPDATE rotator_span SET {assignments} deferrals = deferrals + %(deferrals)s,"  # noqa: S608 - our own text
        " retries = retries + %(retries)s"
        " WHERE id = %(span)s AND generation = %(span_generation)s AND finished_at IS NULL",
        {**values, **asdict(lease)},
    )
