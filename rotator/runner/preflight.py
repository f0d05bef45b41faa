"""The checks and measurements before a rotation writes anything."""

from dataclasses import dataclass, replace
from typing import Final

from psycopg import AsyncConnection

from rotator.events import Findings, LimitRaised, Observer, Sample
from rotator.exceptions import MissingPrivilegesError
from rotator.options import RunOptions, Selection, WaitLimits
from rotator.postgres import rotations
from rotator.postgres.catalog import check_server, missing_grants, read_table
from rotator.postgres.connection import Server, connected
from rotator.postgres.identity import check_session
from rotator.postgres.preflight import check_values, examine_server, examine_table, name_server, sample
from rotator.postgres.rotations import Completed, Unfinished
from rotator.postgres.table import TargetTable, count_partitions
from rotator.postgres.writer import RangeUpdate
from rotator.ranges import Key
from rotator.runner.context import RunTarget

# The server is under load, too, when many workers plan at the same time.
TIMES_PLANNING: Final = 2
MIN_PART_OF_LIMIT: Final = 0.1


async def measured_update(
    connection: AsyncConnection,
    table: TargetTable,
    target: RunTarget,
    limits: WaitLimits,
    key: Key,
    notify: Observer,
) -> RangeUpdate:
    """Return the update of the ranges, with a higher limit where the server takes long to plan it.

    Args:
        connection: In autocommit mode.
        table: The target's table.
        target: The target.
        limits: The limits of the options.
        key: Any key of the table.
        notify: The observer of :class:`LimitRaised`.
    """
    update = RangeUpdate(table, target.source, limits)
    if not table.is_partitioned:
        return update
    seconds = await update.planning_seconds(connection, key)
    if seconds < limits.statement_seconds * MIN_PART_OF_LIMIT:
        return update
    statement_seconds = limits.statement_seconds + TIMES_PLANNING * seconds
    partitions = await count_partitions(connection, table)
    notify(LimitRaised(planning_seconds=seconds, partitions=partitions, statement_seconds=statement_seconds))
    return RangeUpdate(table, target.source, replace(limits, statement_seconds=statement_seconds))


# Beside the workers': the heartbeat's, one for the planner and the pass over late rows, and VACUUM's.
OTHER_CONNECTIONS: Final = 3


async def check(connection: AsyncConnection, target: RunTarget, options: RunOptions) -> TargetTable:
    """Refuse what cannot work.

    Args:
        connection: In autocommit mode.
        target: What is to be rotated.
        options: How.

    Raises:
        RotatorError: It cannot, for the reason that its text gives; nothing was changed.
    """
    connections = options.concurrency + OTHER_CONNECTIONS
    await check_server(connection, connections=connections, concurrency=options.concurrency)
    return await read_target(connection, target)


async def read_target(connection: AsyncConnection, target: RunTarget) -> TargetTable:
    """Look the target's table up.

    Raises:
        TargetError: It cannot be rotated, or is not the one that Django's own connection uses.
    """
    if target.session is not None:
        await check_session(connection, target.path, target.session)
    return await read_table(
        connection,
        path=target.path,
        key=target.key,
        columns=target.columns,
        condition=target.condition,
        include_null=target.include_null,
        include_blank=target.include_blank,
    )


class Preflight:
    """Looks at a target and its server."""

    def __init__(
        self, connection: AsyncConnection, table: TargetTable, server: Server, target: RunTarget
    ) -> None:
        """Take a connection in autocommit mode."""
        self._connection = connection
        self._table = table
        self._server = server
        self._target = target

    async def unfinished(self) -> Unfinished | None:
        """The rotation that would go on, if there is one."""
        return await rotations.find_unfinished(self._connection, self._target.label, self._table.found_name)

    async def examine(self, options: RunOptions, *, counts: bool = False) -> Findings:
        """Find everything out.

        Args:
            options: How the rotation would be done.
            counts: Whether to count the rows, for a while at most.

        Raises:
            RotatorError: The server could not be asked.
        """
        unfinished = None if options.restart else await self.unfinished()
        table = await examine_table(self._connection, self._table, counts=counts)
        return Findings(
            target=self._target.label,
            database=self._target.database,
            server_name=await name_server(self._connection),
            table_name=self._table.found_name,
            concurrency=options.concurrency,
            rows_left=table.rows if unfinished is None else max(0, table.rows - unfinished.rows_done),
            unfinished=None if unfinished is None else unfinished.id,
            table=table,
            server=await examine_server(self._connection),
            sample=await self._sample(options, table.rows) if options.sample else Sample(),
            bypassed=self._target.bypassed,
            warnings=self._target.warnings,
            selection="" if self._target.selection == Selection() else str(self._target.selection),
        )

    async def _sample(self, options: RunOptions, rows: int) -> Sample:
        return await sample(
            self._connection,
            self._server,
            RangeUpdate(self._table, self._target.source, options.limits),
            rows=rows,
            batch=options.batch,
            concurrency=options.concurrency,
        )


async def dry_run(server: Server, target: RunTarget, options: RunOptions) -> Findings:
    """Examine a target; the rows of the sample, if there is to be one, are rewritten and rolled back.

    Raises:
        MissingPrivilegesError: The role lacks a privilege.
        RotatorError: It cannot be rotated, or the server cannot be asked.
    """
    async with connected(server) as connection:
        table = await check(connection, target, options)
        if grants := await missing_grants(connection, table):
            raise MissingPrivilegesError(grants)
        if options.sample and target.selection.generator:
            await check_values(connection, RangeUpdate(table, target.source, options.limits))
        return await Preflight(connection, table, server, target).examine(options, counts=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """The rotations of a target that a new run has to do with.

    Attributes:
        unfinished: The rotation to resume; None where there is none.
        completed: The latest completed rotation of the same rows and values; None where there is none.
    """

    unfinished: Unfinished | None
    completed: Completed | None


async def find_earlier(server: Server, target: RunTarget) -> Earlier:
    """Find the earlier rotations of a target.

    Raises:
        RotatorError: The target cannot be rotated, or the server cannot be reached.
    """
    async with connected(server) as connection:
        table = await read_target(connection, target)
        name = table.found_name
        return Earlier(
            unfinished=await rotations.find_unfinished(connection, target.label, name),
            completed=await rotations.find_last_completed(connection, target.label, name, target.selection),
        )
