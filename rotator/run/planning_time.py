"""Adds the time that planning the update of many partitions takes to the time limit of a range."""

from dataclasses import replace
from typing import Final

from psycopg import AsyncConnection

from rotator.events import LimitRaised
from rotator.keys import Key
from rotator.postgres.relations import count_leaves
from rotator.postgres.transaction import WaitLimits
from rotator.postgres.writing import RangeUpdate

# The server is under load, too, when many workers plan at the same time.
TIMES_PLANNING: Final = 2
LEAST_PART_OF_LIMIT: Final = 0.1


async def raised_limit(
    connection: AsyncConnection, update: RangeUpdate, limits: WaitLimits, key: Key
) -> LimitRaised | None:
    """Measure the planning time, and return the limit that allows for it; None where it hardly matters.

    Args:
        connection: In autocommit mode.
        update: The update of the ranges.
        limits: The limits that were asked for.
        key: Any key of the table.
    """
    if not update.table.is_partitioned:
        return None
    seconds = await update.planning_seconds(connection, key)
    if seconds < limits.statement_seconds * LEAST_PART_OF_LIMIT:
        return None
    return LimitRaised(
        planning_seconds=seconds,
        partitions=await count_leaves(connection, update.table),
        statement_seconds=limits.statement_seconds + TIMES_PLANNING * seconds,
    )


def with_raised(limits: WaitLimits, raised: LimitRaised | None) -> WaitLimits:
    """Return the limits of the ranges from now on."""
    return limits if raised is None else replace(limits, statement_seconds=raised.statement_seconds)
