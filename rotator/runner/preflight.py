"""The checks and measurements before a rotation writes anything."""

from dataclasses import dataclass, replace
from typing import Final

from psycopg import AsyncConnection

from rotator.events import Findings, LimitRaised, Observer, Sample
from rotator.exceptions import MissingPrivilegesError
from rotator.options import RunOptions, Selection, read_pace
from rotator.postgres import rotations
from rotator.postgres.catalog import (
    check_server,
    count_partitions,
    missing_grants,
    read_table,
    read_update_triggers,
)
from rotator.postgres.connection import Server, connected
from rotator.postgres.identity import check_session, read_identity
from rotator.postgres.ledger import Ledger, check_not_guessable
from rotator.postgres.preflight import (
    check_condition,
    check_values,
    examine_server,
    examine_table,
    name_server,
    sample,
)
from rotator.postgres.rotations import Completed, RotationState
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import RangeUpdate
from rotator.ranges import Key
from rotator.runner.context import RunContext, RunTarget
from rotator.runner.locks import lock_holders_named
from rotator.runner.throttles import Throttles

# The measurement runs alone, but many workers plan at the same time.
PLANNING_TIMES: Final = 2
MIN_PART_OF_LIMIT: Final = 0.1
# In addition to the workers' connections: for the heartbeat, for the planner and late rows, and for VACUUM.
OTHER_CONNECTIONS: Final = 3


async def measured_update(
    connection: AsyncConnection,
    table: TargetTable,
    context: RunContext,
    key: Key,
    ledger: Ledger | None = None,
) -> RangeUpdate:
    """Return the update of the ranges, with a higher limit where the server takes long to plan it.

    The server keeps its plan where the table has neither partitions nor triggers. ``table`` can differ from
    the context's: a repair leaves its condition out. ``key`` is any key of the table. ``ledger`` is that of
    the rotation; None where the ranges enter no values.
    """
    source, limits = context.target.source, context.options.limits
    if not table.is_partitioned:
        has_triggers = bool(await read_update_triggers(connection, table))
        return RangeUpdate(table, source, limits, ledger, keeps_plan=not has_triggers)
    update = RangeUpdate(table, source, limits, ledger)
    seconds = await update.planning_seconds(connection, key)
    if seconds < limits.statement_seconds * MIN_PART_OF_LIMIT:
        return update
    # A transaction gets as much more time as a statement.
    more_seconds = PLANNING_TIMES * seconds
    limits = replace(
        limits,
        statement_seconds=limits.statement_seconds + more_seconds,
        transaction_seconds=limits.transaction_seconds + more_seconds,
    )
    context.notify(
        LimitRaised(
            planning_seconds=seconds,
            partitions=await count_partitions(connection, table),
            statement_seconds=limits.statement_seconds,
        )
    )
    return RangeUpdate(table, source, limits, ledger)


async def check(connection: AsyncConnection, context: RunContext) -> None:
    """Read the target's table into the context, and make the checks that refuse a rotation.

    Raises:
        MissingPrivilegesError: The role lacks a privilege.
        RotatorError: The rotation cannot run; nothing was changed.
    """
    target, options = context.target, context.options
    is_paced = read_pace(options.pace).latency_limit is not None
    connections = options.concurrency + OTHER_CONNECTIONS + is_paced
    await check_server(connection, connections=connections, concurrency=options.concurrency)
    context.table = table = await read_target(connection, target)
    if grants := await missing_grants(connection, table, proves=options.prove, guards=bool(options.guard)):
        raise MissingPrivilegesError(grants)
    filters = Selection(filters=target.selection.filters, excludes=target.selection.excludes)
    await check_condition(connection, table, str(filters))
    await Throttles(options, target.throttles).check(connection)
    if options.prove:
        await check_not_guessable(connection, table)


async def read_target(connection: AsyncConnection, target: RunTarget) -> TargetTable:
    """Return the target's table.

    Raises:
        TargetError: It cannot be rotated, or Django's own connection uses another table.
    """
    if target.session is not None:
        await check_session(connection, target.path, target.session)
    return await read_table(
        connection,
        path=target.path,
        key=target.key,
        columns=target.columns,
        condition=target.condition,
        include_null=target.selection.include_null,
        include_blank=target.selection.include_blank,
    )


async def examine(connection: AsyncConnection, context: RunContext, *, counts: bool = False) -> Findings:
    """Return the findings of the preflight, with the rows counted, for a limited time, or only estimated.

    Raises:
        RotatorError: The server cannot be asked.
    """
    target, table, options = context.target, context.table, context.options
    unfinished = None
    if not options.restart:
        unfinished = await rotations.find_unfinished(connection, target.label, table.found_name)
    found = await examine_table(connection, table, counts=counts)
    measured = Sample()
    if options.sample:
        measured = await sample(
            connection,
            context.server,
            RangeUpdate(table, target.source, options.limits),
            rows=found.rows,
            batch=options.batch,
            concurrency=options.concurrency,
        )
    return Findings(
        target=target.label,
        database=target.database,
        server_name=await name_server(connection),
        table_name=table.found_name,
        concurrency=options.concurrency,
        rows_left=found.rows if unfinished is None else max(0, found.rows - unfinished.rows_done),
        unfinished=None if unfinished is None else unfinished.id,
        table=found,
        server=await examine_server(connection),
        sample=measured,
        bypassed=target.bypassed,
        warnings=target.warnings,
        proves=options.prove,
        guard=options.guard,
        selection="" if target.selection == Selection() else str(target.selection),
    )


async def dry_run(server: Server, target: RunTarget, options: RunOptions, notify: Observer) -> Findings:
    """Return the findings about a target; the rows of a sample are rewritten and rolled back.

    Raises:
        RotatorError: The target cannot be rotated, or the server cannot be asked.
    """
    context = RunContext(server=server, target=target, options=options, notify=notify)
    async with connected(server) as connection, lock_holders_named(server, notify):
        await check(connection, context)
        if options.sample and target.selection.generator:
            await check_values(connection, RangeUpdate(context.table, target.source, options.limits))
        return await examine(connection, context, counts=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """The earlier rotations of a target that matter to a new run.

    Attributes:
        unfinished: The rotation to resume; None where there is none.
        completed: The latest completed rotation of the same rows and values; None where there is none.
    """

    unfinished: RotationState | None
    completed: Completed | None


async def find_earlier(server: Server, target: RunTarget, options: RunOptions, notify: Observer) -> Earlier:
    """Return the earlier rotations of a target.

    Raises:
        RotatorError: The target cannot be rotated, or the server is unreachable.
    """
    context = RunContext(server=server, target=target, options=options, notify=notify)
    async with connected(server) as connection, lock_holders_named(server, notify):
        context.table = await read_target(connection, target)
        terms = context.terms(await read_identity(connection, context.table))
        return Earlier(
            unfinished=await rotations.find_unfinished(connection, terms.target, terms.table_name),
            completed=await rotations.find_last_completed(connection, terms),
        )
