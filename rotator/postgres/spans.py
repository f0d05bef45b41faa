"""The spans of a distributed rotation: claiming, progress and the end of each."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from rotator.exceptions import SupersededError
from rotator.postgres.errors import superseded, translate_errors
from rotator.postgres.fence import SPAN_LOCK_CLASS, Lease, fence
from rotator.postgres.planner import gaps
from rotator.postgres.rotations import exclusive_lock
from rotator.postgres.table import TargetTable
from rotator.ranges import Key, KeyInterval

_STILL_OWNED: Final = sql.SQL(
    " FROM rotator_rotation r WHERE r.id = %(rotation)s AND r.generation = %(generation)s"
    " AND r.status = 'running'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanProgress:
    """How far the work on a span is.

    Attributes:
        id: The span's id.
        generation: How often a task has begun with it.
        is_held: Whether a task has it, as far as is known.
        rows: How many rows were rotated.
        ranges: In how many ranges.
        retries: How often one had to be tried again; known at the end.
        is_finished: Whether its last task has nothing left to do.
        failed_keys: Keys that could not be rotated, each with the reason.
        error: Why its task gave up; empty where it did not.
    """

    id: int
    generation: int
    is_held: bool
    rows: int
    ranges: int
    retries: int
    is_finished: bool
    failed_keys: Sequence[tuple[str, str]]
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimedSpan:
    """A span that this process works on.

    Attributes:
        lease: What it may write for.
        span: Which rows these are.
        gaps: What of it is left to do.
    """

    lease: Lease
    span: KeyInterval
    gaps: list[KeyInterval]


async def clear(connection: AsyncConnection, lease: Lease) -> None:
    """Remove what an earlier owner has planned; its tasks find nothing to do any more.

    Raises:
        SupersededError: This process does not own the rotation any more.
    """
    async with translate_errors(connection), connection.transaction():
        await fence(connection, lease)
        await connection.execute("DELETE FROM rotator_span WHERE rotation_id = %s", (lease.rotation,))


async def plan(connection: AsyncConnection, lease: Lease, span: KeyInterval) -> int:
    """Note a span that is about to be published, and return its id.

    Raises:
        SupersededError: This process does not own the rotation any more.
    """
    async with translate_errors(connection):
        cursor = await connection.execute(
            sql.SQL(
                "INSERT INTO rotator_span (rotation_id, after, through, checkpoints_before, generation, "
                "worker, rows, ranges, retries, failed_keys, error)"
                " SELECT r.id, %(after)s::jsonb, %(through)s::jsonb,"
                " COALESCE((SELECT max(id) FROM rotator_completedrange), 0), 0, '', 0, 0, 0, '[]', ''"
                "{} RETURNING id"
            ).format(_STILL_OWNED),
            {"after": span.after, "through": span.through, **asdict(lease)},
        )
        row = await cursor.fetchone()
    if row is None:
        raise superseded()
    return int(row[0])


async def read_progress(connection: AsyncConnection, ids: Sequence[int]) -> list[SpanProgress]:
    """How far these spans are."""
    async with translate_errors(connection):
        cursor = connection.cursor(row_factory=dict_row)
        await cursor.execute(
            "SELECT id, generation, worker <> '' AS is_held, rows, ranges, retries,"
            " finished_at IS NOT NULL AS is_finished, failed_keys, error"
            " FROM rotator_span WHERE id = ANY (%s) ORDER BY id",
            (list(ids),),
        )
        return [
            SpanProgress(**row | {"failed_keys": [(key, reason) for key, reason in row["failed_keys"]]})
            async for row in cursor
        ]


async def claim_span(
    connection: AsyncConnection, table: TargetTable, lease: Lease, span: int, *, worker: str
) -> ClaimedSpan | None:
    """Become the one task that works on a span; None where there is nothing to do for it any more.

    When this returns, no transaction of another task of the same span can commit: each holds the span's lock
    shared until its end, and this waited for the exclusive one. So what its gaps are stays true.

    Args:
        connection: In autocommit mode.
        table: The target's table.
        lease: The rotation's, as the task's message has it.
        span: The span's id.
        worker: The host and pid of this process.
    """
    async with exclusive_lock(connection, span, lock_class=SPAN_LOCK_CLASS):
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE rotator_span s SET generation = s.generation + 1, worker = %(worker)s,"
                " updated_at = clock_timestamp(){} AND s.rotation_id = r.id AND s.id = %(wanted)s"
                " AND s.finished_at IS NULL"
                " RETURNING s.generation, s.after::text, s.through::text, s.checkpoints_before"
            ).format(_STILL_OWNED),
            {"wanted": span, "worker": worker, **asdict(lease)},
        )
        row = await cursor.fetchone()
        if row is None:
            return None
        generation, after, through, checkpoints_before = row
        left = await gaps(
            connection,
            table,
            lease.rotation,
            Key(through),
            after=None if after is None else Key(after),
            checkpoints_before=checkpoints_before,
        )
    return ClaimedSpan(
        lease=replace(lease, span=span, span_generation=generation),
        span=KeyInterval(after=None if after is None else Key(after), through=Key(through)),
        gaps=left,
    )


async def release(connection: AsyncConnection, lease: Lease, *, retries: int) -> None:
    """Leave a span to another task."""
    async with translate_errors(connection):
        await connection.execute(
            "UPDATE rotator_span SET worker = '', updated_at = clock_timestamp(),"
            " retries = retries + %(retries)s"
            " WHERE id = %(span)s AND generation = %(span_generation)s AND finished_at IS NULL",
            {"retries": retries, **asdict(lease)},
        )


async def finish(
    connection: AsyncConnection,
    lease: Lease,
    *,
    retries: int,
    failed_keys: Sequence[tuple[Key, str]] = (),
    error: str = "",
) -> None:
    """Say that there is nothing left to do for a span, or that it cannot be done.

    Raises:
        SupersededError: Another task works on it.
    """
    async with translate_errors(connection):
        cursor = await connection.execute(
            "UPDATE rotator_span SET finished_at = clock_timestamp(), updated_at = clock_timestamp(),"
            " retries = retries + %(retries)s, failed_keys = %(failed_keys)s, error = %(error)s"
            " WHERE id = %(span)s AND generation = %(span_generation)s",
            {
                "retries": retries,
                "failed_keys": Jsonb([[str(key), reason] for key, reason in failed_keys]),
                "error": error,
                **asdict(lease),
            },
        )
    if not cursor.rowcount:
        raise SupersededError(str(superseded()))
