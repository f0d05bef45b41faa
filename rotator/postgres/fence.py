"""The start of every transaction that writes for a rotation: settings, lock and fence."""

from dataclasses import asdict, dataclass
from typing import Final

from psycopg import AsyncConnection, sql

from rotator.options import WaitLimits
from rotator.postgres.connection import begin
from rotator.postgres.errors import SUPERSEDED

# "rota" in ASCII: the first half of the advisory locks' key; the second is the rotation's id.
LOCK_CLASS: Final = 0x726F7461
# "span", for the locks of a distributed rotation's spans.
SPAN_LOCK_CLASS: Final = 0x7370616E

# What the text of some keys depends on; the server's most exact forms. Input is read in any of them.
KEY_SETTINGS: Final = {
    "extra_float_digits": "1",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
}

IDLE_SECONDS: Final = 10
CHECK_CONNECTION_SECONDS: Final = 1

_FENCE: Final = (
    sql.SQL(
        "SELECT CAST(COALESCE((SELECT '1' FROM rotator_rotation r WHERE r.id = %(rotation)s"
        " AND r.generation = %(generation)s AND r.status = 'running' AND (%(span)s::bigint IS NULL"
        " OR EXISTS (SELECT FROM rotator_span s WHERE s.rotation_id = r.id AND s.id = %(span)s"
        " AND s.generation = %(span_generation)s))), {}) AS integer)"
    )
    .format(sql.Literal(SUPERSEDED))
    .as_bytes()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """What a process may write for, until another one raises the generation.

    Attributes:
        rotation: The rotation's id.
        generation: The generation that this process was given.
        span: The span's id, where it may write for that alone.
        span_generation: The span's generation that it was given.
    """

    rotation: int
    generation: int
    span: int | None = None
    span_generation: int = 0


async def begin_fenced(
    connection: AsyncConnection, lease: Lease | None, limits: WaitLimits, *, disabled_joins: tuple[str, ...]
) -> None:
    """Begin a transaction that only this generation's owner can commit.

    The lock comes before the fence, and each is a statement of its own with a snapshot of its own: whoever
    takes over holds the lock exclusively while it raises the generation, so what the fence reads after the
    lock is true until the commit. The fence fails with an error, which in a pipeline also stops a COMMIT that
    is already on its way.

    Args:
        connection: In autocommit mode.
        lease: What this process owns; None where the transaction will be rolled back.
        limits: How long it may wait.
        disabled_joins: The server's names of joins that the update must not be planned with.
    """
    await begin(connection)
    await set_timeouts(connection, limits, disabled_joins=disabled_joins)
    if lease is not None:
        await fence(connection, lease)


async def fence(connection: AsyncConnection, lease: Lease) -> None:
    """Make sure that what this process owns is its own until the transaction ends; see :func:`begin_fenced`.

    Raises:
        SupersededError: It is not, as soon as the answer is read.
    """
    await share_lock(connection, lease.rotation)
    if lease.span is not None:
        await share_lock(connection, lease.span, lock_class=SPAN_LOCK_CLASS)
    await connection.execute(_FENCE, asdict(lease))


async def set_timeouts(
    connection: AsyncConnection, limits: WaitLimits, *, disabled_joins: tuple[str, ...]
) -> None:
    """Make a transaction that has just begun one that is in nobody's way; see :func:`begin_fenced`."""
    await connection.execute(
        "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)"
        # Every role may set the others, and may be asked about this one alone.
        " WHERE name <> 'log_parameter_max_length' OR has_parameter_privilege(name, 'SET')",
        _columns(
            {
                "lock_timeout": f"{limits.lock_seconds * 1000:.0f}ms",
                "statement_timeout": f"{limits.statement_seconds * 1000:.0f}ms",
                "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
                "client_connection_check_interval": f"{CHECK_CONNECTION_SECONDS}s",
                # The parameters of the update are the new values.
                "log_parameter_max_length_on_error": "0",
                "log_parameter_max_length": "0",
                # What a crash loses of a range, it loses of its checkpoint too.
                "synchronous_commit": "off",
                # Rows that a policy hides would keep their leaked values: an error instead.
                "row_security": "off",
                # Rows are locked in the order of the plan, and only an index gives the key's.
                "enable_seqscan": "off",
                "enable_bitmapscan": "off",
                "enable_hashjoin": "off",
                **{f"enable_{join}": "off" for join in disabled_joins},
                # Compiling takes longer than the update of a range.
                "jit": "off",
                **KEY_SETTINGS,
            }
        ),
    )


async def share_lock(connection: AsyncConnection, number: int, *, lock_class: int = LOCK_CLASS) -> None:
    """Make whoever takes the rotation, or the span, over wait until this transaction has ended, or end it.

    It has to come before anything that taking over would have to wait for.
    """
    await connection.execute(
        "SELECT pg_advisory_xact_lock_shared(%s::integer, %s::integer)", (lock_class, number)
    )


def _columns(settings: dict[str, str]) -> tuple[list[str], list[str]]:
    return list(settings), list(settings.values())
