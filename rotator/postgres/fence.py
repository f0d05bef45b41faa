"""The start of every transaction that writes for a rotation: settings, lock and fence."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Final

import psycopg
from psycopg import AsyncConnection

from rotator.options import WaitLimits
from rotator.postgres.connection import begin
from rotator.postgres.errors import ANSWER_SECONDS, SUPERSEDED, translate_errors

# "rota" in ASCII: the first half of the advisory locks' key; the second is the rotation's id.
LOCK_CLASS: Final = 0x726F7461
# "span", for the locks of a distributed rotation's spans.
SPAN_LOCK_CLASS: Final = 0x7370616E

# The text of some keys depends on these settings. They select the server's most exact forms.
KEY_SETTINGS: Final = {
    "extra_float_digits": "1",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
}

IDLE_SECONDS: Final = 10
# A setting of the transactions that write for a rotation: its id.
OWN_ROTATION: Final = "rotator.rotation"
# The settings of each writing transaction, except for its time limits.
SETTINGS: Final = {
    "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
    "client_connection_check_interval": "1s",
    # The parameters of the update are the new values.
    "log_parameter_max_length_on_error": "0",
    "log_parameter_max_length": "0",
    # A crash loses a range and its checkpoint together.
    "synchronous_commit": "off",
    # Raise an error instead of skipping rows that a policy hides.
    "row_security": "off",
    # Rows are locked in the order of the plan, and only an index gives the key's.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    # Compiling takes longer than the update of a range.
    "jit": "off",
    **KEY_SETTINGS,
}

_OF_ROTATION: Final = (
    "SELECT '1' FROM rotator_rotation r WHERE r.id = %(rotation)s AND r.generation = %(generation)s"
    " AND r.status = CASE WHEN %(repairs)s THEN 'completed' ELSE 'running' END"
)
# A statement of its own: without Celery, the role needs no privilege on the table of spans.
_OF_SPAN: Final = (
    f"{_OF_ROTATION} AND EXISTS (SELECT FROM rotator_span s WHERE s.rotation_id = r.id AND s.id = %(span)s"
    " AND s.generation = %(span_generation)s)"
)
_FENCE: Final = f"SELECT CAST(COALESCE(({_OF_ROTATION}), '{SUPERSEDED}') AS integer)"
_SPAN_FENCE: Final = f"SELECT CAST(COALESCE(({_OF_SPAN}), '{SUPERSEDED}') AS integer)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The permission of a process to write, valid until another process raises the generation.

    Attributes:
        generation: The rotation's generation when this process acquired it.
        span: The id of the only span that it can write to; None for all rows.
        span_generation: The span's generation when this process claimed it.
        repairs: Whether it is for survivors of a completed rotation, not for an unfinished one.
    """

    rotation: int
    generation: int
    span: int | None = None
    span_generation: int = 0
    repairs: bool = False


async def begin_fenced(
    connection: AsyncConnection,
    lease: Lease | None,
    limits: WaitLimits,
    plan_settings: Mapping[str, str] = {},
) -> None:
    """Begin a transaction that only this generation's owner can commit; without a lease, it must not commit.

    A process that takes over holds the lock in exclusive mode while it raises the generation. So a separate
    statement takes the lock before the fence, and what the fence reads is then true until the commit. The
    fence fails with an error, which in a pipeline also stops a COMMIT that was already sent.
    """
    settings = {
        **SETTINGS,
        "lock_timeout": f"{limits.lock_seconds * 1000:.0f}ms",
        "statement_timeout": f"{limits.statement_seconds * 1000:.0f}ms",
        **plan_settings,
    }
    if lease is not None:
        settings[OWN_ROTATION] = str(lease.rotation)
    await begin(connection)
    await connection.execute(
        "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)"
        # Every role may set the others. The function is for this one only.
        " WHERE name <> 'log_parameter_max_length' OR has_parameter_privilege(name, 'SET')",
        (list(settings), list(settings.values())),
    )
    if lease is not None:
        await fence(connection, lease)


async def fence(connection: AsyncConnection, lease: Lease) -> None:
    """Fail unless the lease is valid, and keep it valid until the transaction ends; see :func:`begin_fenced`.

    Raises:
        SupersededError: The lease is not valid. In a pipeline, this comes when the result is read.
    """
    await share_lock(connection, lease.rotation)
    if lease.span is not None:
        await share_lock(connection, lease.span, lock_class=SPAN_LOCK_CLASS)
    await connection.execute(_FENCE if lease.span is None else _SPAN_FENCE, asdict(lease))


@asynccontextmanager
async def rolled_back_on_error(
    connection: AsyncConnection, *, seconds: float | None = ANSWER_SECONDS
) -> AsyncIterator[None]:
    """Translate errors, and roll the open transaction back; see :func:`translate_errors`."""
    async with translate_errors(connection, seconds=seconds):
        try:
            yield
        except BaseException:
            with suppress(psycopg.Error):
                await connection.rollback()
            raise


async def share_lock(connection: AsyncConnection, number: int, *, lock_class: int = LOCK_CLASS) -> None:
    """Lock the rotation, or the span, in shared mode, so that a takeover waits for this transaction.

    This must come before any lock that a takeover would have to wait for.
    """
    await connection.execute(
        "SELECT pg_advisory_xact_lock_shared(%s::integer, %s::integer)", (lock_class, number)
    )
