"""The preflight's queries: the table, the server, and a sample of ranges that is rolled back."""

import asyncio
import time
from contextlib import suppress
from typing import Final

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import class_row, dict_row
from psycopg_pool import AsyncConnectionPool

from rotator.events import Copies, Index, KeptValues, Sample, ServerFindings, TableFindings
from rotator.exceptions import (
    OptionError,
    RangeRejectedError,
    RangeTooSlowError,
    RowsLockedError,
    ServerLostError,
    ServerRefusedError,
    unwrap_group,
)
from rotator.postgres.catalog import TRIGGER_FIRES, read_update_triggers
from rotator.postgres.connection import Server, fetch_as, fetch_column, fetch_rows, pooled, transaction_with
from rotator.postgres.errors import RangeGrewError, condition, translate_errors
from rotator.postgres.planner import IndexPlanner, count_rows, estimate_rows, fetch_within, last_key
from rotator.postgres.table import TargetTable
from rotator.postgres.writer import RangeUpdate, RewriteError
from rotator.ranges import Key, KeyInterval, KeyRange

COUNT_SECONDS: Final = 2.0
HOLDERS_NAMED: Final = 3
COPIES_NAMED: Final = 4
OLD_SECONDS: Final = 5

_INDEXES: Final = (
    "SELECT c.relname AS name, (SELECT sum(pg_relation_size(COALESCE(tree.relid, c.oid::regclass)))::bigint"
    " FROM (SELECT c.oid) AS root LEFT JOIN LATERAL pg_partition_tree(root.oid) AS tree ON tree.isleaf)"
    " AS size_bytes,"
    # An index of expressions may contain the column: they all count, since pg_get_indexdef is hard to parse.
    " i.indkey::int2[] && (SELECT array_agg(attnum) FROM pg_attribute WHERE attrelid = i.indrelid"
    " AND attname = ANY (%(columns)s::text[])) OR 0 = ANY (i.indkey) OR i.indpred IS NOT NULL"
    " AS holds_column FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " WHERE i.indrelid = {regclass} ORDER BY 2 DESC, 1"
)
# The server refuses every update of a published table without a replica identity.
_PUBLICATIONS: Final = (
    "SELECT p.pubname FROM pg_publication_tables p JOIN pg_publication d ON d.pubname = p.pubname"
    " JOIN pg_class c ON c.relname = p.tablename JOIN pg_namespace n ON n.oid = c.relnamespace"
    " AND n.nspname = p.schemaname"
    " WHERE c.oid IN (SELECT oid FROM {partitions} AS leaf UNION SELECT {regclass}) AND d.pubupdate"
    " AND (c.relreplident = 'n' OR c.relreplident = 'd'"
    " AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)"
    " OR c.relreplident = 'i' AND NOT EXISTS"
    " (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)) ORDER BY 1"
)
# Rows that a subscription writes have no new values, and can have old ones.
_SUBSCRIPTIONS: Final = (
    "SELECT DISTINCT s.subname FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid"
    " WHERE r.srrelid IN (SELECT oid FROM {partitions} AS leaf UNION SELECT {regclass}) AND s.subenabled"
    " ORDER BY 1"
)
# The source of a function contains the tables that it writes to, except where it builds its statements.
_WRITING_TRIGGERS: Final = (
    "SELECT DISTINCT t.tgname || ' on ' || t.tgrelid::regclass FROM pg_trigger t"
    " JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_class c ON c.oid = {regclass}"
    " WHERE NOT t.tgisinternal AND {fires}"
    " AND p.prosrc ~* ('\\m(update|insert\\s+into|merge\\s+into)\\s+(only\\s+)?(\\S+\\.)?\"?'"
    " || regexp_replace(c.relname, '(\\W)', '\\\\\\1', 'g') || '\"?(\\s|$)') ORDER BY 1"
)
# A history of whole rows, as text or JSON, has no column of the same name.
_COPIES: Final = (
    "WITH own AS (SELECT oid FROM {partitions} AS leaf UNION SELECT {regclass}),"
    " target AS (SELECT oid, relname, relnamespace FROM pg_class WHERE oid = {regclass}),"
    " written AS (SELECT string_agg(p.prosrc, ' ') AS source FROM pg_trigger t"
    " JOIN pg_proc p ON p.oid = t.tgfoid WHERE t.tgrelid IN (SELECT oid FROM own) AND NOT t.tgisinternal"
    " AND {fires}),"
    " others AS (SELECT c.oid, c.relname, c.relnamespace <> target.relnamespace"
    " AND c.relname = target.relname AS is_namesake,"
    " EXISTS (SELECT FROM pg_attribute a JOIN pg_attribute mine ON mine.attrelid = target.oid"
    " AND mine.attname = a.attname WHERE a.attrelid = c.oid AND NOT a.attisdropped"
    " AND a.attname = ANY (%(columns)s::text[]) AND a.atttypid = mine.atttypid) AS has_column,"
    " COALESCE(written.source ~* ('\\m(update|insert\\s+into|merge\\s+into)\\s+(only\\s+)?(\\S+\\.)?\"?'"
    " || regexp_replace(c.relname, '(\\W)', '\\\\\\1', 'g') || '\"?(\\W|$)'), false) AS is_written"
    " FROM pg_class c CROSS JOIN target CROSS JOIN written JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.oid NOT IN (SELECT oid FROM own)"
    " AND n.nspname !~ '^(pg_|information_schema$)' AND c.relname !~ '^(rotator|django)_'),"
    " kinds AS (SELECT oid, CASE WHEN is_written THEN 'trigger'"
    " WHEN has_column AND is_namesake THEN 'schema'"
    " WHEN has_column AND relname ~* '(histor|audit|version|revision|event|archive|backup|snapshot|_log)'"
    " OR relname ~* '(audit|reversion_version|pghistory)' THEN 'history'"
    " WHEN has_column THEN 'name' END AS kind FROM others)"
    " SELECT kind, (array_agg(oid::regclass::text ORDER BY oid::regclass::text))[:%(most)s], count(*)"
    " FROM kinds WHERE kind IS NOT NULL GROUP BY kind"
    " ORDER BY array_position(ARRAY['trigger', 'history', 'schema', 'name'], kind)"
)
_SETTINGS: Final = (
    "SELECT pg_size_bytes(current_setting('max_wal_size')) AS max_wal_size_bytes,"
    " EXTRACT(epoch FROM current_setting('checkpoint_timeout')::interval)::integer"
    " AS checkpoint_timeout_seconds, current_setting('full_page_writes')::boolean AS full_page_writes,"
    " CASE WHEN current_setting('archive_mode') = 'off' THEN '' ELSE COALESCE("
    " 'last archived ' || date_trunc('second', clock_timestamp() - last_archived_time) || ' ago',"
    " 'nothing archived yet')"
    " || CASE WHEN last_failed_time > COALESCE(last_archived_time, '-infinity') THEN"
    " ', FAILING since ' || to_char(last_failed_time AT TIME ZONE 'UTC', 'HH24:MI:SS') || ' UTC' ELSE '' END"
    " END AS archiving FROM pg_stat_archiver"
)
_REPLICAS: Final = (
    "SELECT COALESCE(NULLIF(application_name, ''), 'pid ' || pid) || ' (' ||"
    " COALESCE(sync_state || ', ' || pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn))"
    " || ' behind', 'its lag is not visible to this role') || ')'"
    " FROM pg_stat_replication ORDER BY 1"
)
_SLOTS: Final = (
    "SELECT slot_name || ' (' || CASE WHEN active THEN 'active' ELSE 'NOT ACTIVE' END"
    " || COALESCE(', keeps ' || pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), '')"
    " || ')' FROM pg_replication_slots ORDER BY 1"
)
_HOLDERS: Final = (
    "SELECT phrase FROM ("
    " SELECT 'pid ' || pid || COALESCE(', ' || NULLIF(application_name, ''), '')"
    " || COALESCE(', since ' || to_char(xact_start AT TIME ZONE 'UTC', 'HH24:MI:SS') || ' UTC', '')"
    " AS phrase, age(backend_xmin) AS age FROM pg_stat_activity"
    " WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()"
    # Sessions of other databases do not block VACUUM in this one.
    " AND datname = current_database()"
    " AND xact_start < clock_timestamp() - make_interval(secs => %(old_seconds)s)"
    " UNION ALL SELECT 'prepared transaction ' || gid, age(transaction) FROM pg_prepared_xacts"
    " WHERE database = current_database()"
    " UNION ALL SELECT 'replication slot ' || slot_name, age(COALESCE(xmin, catalog_xmin))"
    " FROM pg_replication_slots WHERE xmin IS NOT NULL"
    " UNION ALL SELECT 'replica ' || COALESCE(application_name, ''), age(backend_xmin)"
    " FROM pg_stat_replication WHERE backend_xmin IS NOT NULL) AS held ORDER BY age DESC LIMIT %(most)s"
)

# See chapter "Error Reporting and Logging" of PostgreSQL's manual, and the manuals of the two modules. Where
# this role may change log_parameter_max_length, begin_fenced() turns logging off for each transaction.
_SHOWING_VALUES: Final = (
    "SELECT name || ' = ' || setting FROM pg_settings WHERE"
    " (CASE name WHEN 'log_statement' THEN setting IN ('mod', 'all')"
    " WHEN 'log_min_duration_statement' THEN setting <> '-1'"
    " WHEN 'log_min_duration_sample' THEN setting <> '-1'"
    " WHEN 'log_transaction_sample_rate' THEN setting <> '0' ELSE false END"
    " AND current_setting('log_parameter_max_length') <> '0'"
    " AND NOT has_parameter_privilege('log_parameter_max_length', 'SET'))"
    " OR (name = 'auto_explain.log_min_duration' AND setting <> '-1'"
    " AND COALESCE(current_setting('auto_explain.log_parameter_max_length', true), '0') <> '0')"
    " OR (name = 'pgaudit.log_parameter' AND setting = 'on') ORDER BY name"
)


async def examine_table(connection: AsyncConnection, table: TargetTable, *, counts: bool) -> TableFindings:
    """Return the findings on the table, with its rows counted, for a limited time, or only estimated."""
    rows, is_exact = 0 if counts else await estimate_rows(connection, table), False
    # Without an estimate, the table was never analyzed, or it is empty.
    if not rows:
        bound = await last_key(connection, table)
        rows, is_exact = (
            (0, True) if bound is None else await count_rows(connection, table, bound, seconds=COUNT_SECONDS)
        )
    size = table.compose("SELECT sum(pg_relation_size(oid))::bigint FROM {partitions} AS leaf")
    ((heap_bytes,),) = await fetch_rows(connection, size)
    parameters = {"columns": table.column_names, "most": COPIES_NAMED}
    fires = sql.SQL(TRIGGER_FIRES)
    copies = await fetch_rows(connection, table.compose(_COPIES, fires=fires), parameters)
    return TableFindings(
        rows=rows,
        rows_is_exact=is_exact,
        heap_bytes=heap_bytes,
        indexes=tuple(await fetch_as(connection, class_row(Index), table.compose(_INDEXES), parameters)),
        triggers=await read_update_triggers(connection, table),
        skipped_triggers=await read_update_triggers(connection, table, skipped=True),
        writing_triggers=await fetch_column(connection, table.compose(_WRITING_TRIGGERS, fires=fires)),
        subscriptions=await fetch_column(connection, table.compose(_SUBSCRIPTIONS)),
        refusing_publications=await fetch_column(connection, table.compose(_PUBLICATIONS)),
        kept=await _count_kept(connection, table),
        copies=tuple(
            Copies(kind=kind, tables=tuple(names), more=count - len(names)) for kind, names, count in copies
        ),
    )


async def _count_kept(connection: AsyncConnection, table: TargetTable) -> tuple[KeptValues, ...] | None:
    """Count the rows whose NULL or empty text is not rotated; return None where that takes too long."""
    columns = [column for column in table.columns if column.keeps_null or column.keeps_blank]
    if not columns:
        return ()
    count = sql.SQL("count(*) FILTER (WHERE {}), count(*) FILTER (WHERE {})")
    query = table.compose(
        "SELECT {counts} FROM {row} WHERE {condition}",
        counts=sql.SQL(", ").join(count.format(*column.kept) for column in columns),
        condition=table.condition or sql.SQL("true"),
    )
    found = await fetch_within(connection, COUNT_SECONDS, query)
    if found is None:
        return None
    return tuple(
        KeptValues(column=column.name, null=null, blank=blank)
        for column, null, blank in zip(columns, found[0][::2], found[0][1::2], strict=True)
        if null or blank
    )


async def examine_server(connection: AsyncConnection) -> ServerFindings:
    """Return the settings and dependents of the server, as far as this role may see them."""
    (settings,) = await fetch_as(connection, dict_row, _SETTINGS)
    return ServerFindings(
        **settings,
        replicas=await fetch_column(connection, _REPLICAS),
        slots=await fetch_column(connection, _SLOTS),
        holders=await fetch_column(connection, _HOLDERS, {"old_seconds": OLD_SECONDS, "most": HOLDERS_NAMED}),
        log_settings=await settings_that_show_values(connection),
    )


async def name_server(connection: AsyncConnection) -> str:
    """Return the role, the host or socket, the port and the database, as ``app@host:5432/name``."""
    ((role, database),) = await fetch_rows(connection, "SELECT current_user, current_database()")
    return f"{role}@{connection.info.host}:{connection.info.port}/{database}"


async def settings_that_show_values(connection: AsyncConnection) -> tuple[str, ...]:
    """Return the settings that make the server log new values, e.g. ``log_statement = all``."""
    return await fetch_column(connection, _SHOWING_VALUES)


# The sample leaves dead rows, so it is limited to a small part of the table.
MOST_RANGES: Final = 24
MOST_PART: Final = 1 / 30
LEAST_RANGES: Final = 8
MOST_SECONDS: Final = 1.5
# The first change of a page writes it whole, which happens more often in a sample than in a rotation.
WARMING_PART: Final = 1 / 3
_ROWS_READ: Final = 2000
TRY_SECONDS: Final = 1.0
# Two rows reveal a generator that returns a constant.
TRIED_ROWS: Final = 2
FILTERED_ROWS: Final = 100
_INVALID_CONDITIONS: Final = (
    psycopg.DataError,
    psycopg.ProgrammingError,
    psycopg.NotSupportedError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
)


async def check_condition(connection: AsyncConnection, table: TargetTable, filters: str) -> None:
    """Have the server evaluate the filters for the first rows, because Django cannot check every value.

    Raises:
        OptionError: The server refuses the filters, for example a regular expression.
    """
    if table.condition is None:
        return
    query = table.compose(
        "SELECT count(*) FROM (SELECT * FROM {table} LIMIT {most}) AS {row_name} WHERE {condition}",
        most=FILTERED_ROWS,
        condition=table.condition,
    )
    # The first pages of the table can be empty.
    with suppress(RangeTooSlowError):
        async with transaction_with(connection, {"statement_timeout": f"{TRY_SECONDS * 1000:.0f}ms"}):
            try:
                await connection.execute(query, ())
            except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable):
                raise
            except _INVALID_CONDITIONS as error:
                sentence = f"The server cannot use {filters}: {condition(error)}. Correct the filter."
                raise OptionError(" ".join(sentence.split())) from None


async def check_values(connection: AsyncConnection, update: RangeUpdate) -> None:
    """Rewrite the first rows and roll them back, to find out whether their new values can be made.

    Raises:
        ValuesError: The new values are invalid.
        ServerLostError: The server cannot be reached.
    """
    # The rotation handles errors of single rows.
    with suppress(RangeRejectedError, RowsLockedError, RangeGrewError, RewriteError, ServerRefusedError):
        table = update.table
        query = table.compose(
            "SELECT {row_json} FROM {row} WHERE true{and_matches} ORDER BY {row_key} LIMIT {most}",
            most=TRIED_ROWS,
        )
        keys = [Key(key) for (key,) in await fetch_within(connection, TRY_SECONDS, query) or []]
        if keys:
            key_range = KeyRange(after=None, through=keys[-1], rows=len(keys))
            await update.attempt(connection, None, key_range, key_range.rows)
            await connection.rollback()


async def sample(
    connection: AsyncConnection,
    server: Server,
    update: RangeUpdate,
    *,
    rows: int,
    batch: int,
    concurrency: int,
) -> Sample:
    """Measure the rows per second that all workers rewrite together, and leave nothing but dead rows.

    The connection is for planning. ``rows`` is the approximate number of rows in the table.
    """
    ranges = min(MOST_RANGES, int(rows * MOST_PART / batch))
    if ranges < LEAST_RANGES:
        return Sample(skipped="the table is too small for a sample")
    try:
        planned = await _plan(connection, update.table, rows=rows, batch=batch, ranges=ranges)
        return await _measure(server, update, planned, concurrency)
    except RangeRejectedError as refused:
        skipped = f"the server rejected a range: {refused.condition}"
    except (RowsLockedError, RangeGrewError):
        skipped = "other sessions wrote to its rows"
    except RewriteError as error:
        skipped = error.condition
    except (ServerRefusedError, ServerLostError) as error:
        skipped = str(error).rstrip(".")
    return Sample(skipped=skipped)


async def _measure(server: Server, update: RangeUpdate, planned: list[KeyRange], concurrency: int) -> Sample:
    async with pooled(server, concurrency) as pool:
        warming = planned[: int(len(planned) * WARMING_PART)]
        await _rewrite(pool, update, warming, concurrency)
        started = time.monotonic()
        rewritten = await _rewrite(pool, update, planned[len(warming) :], concurrency)
        seconds = time.monotonic() - started
    if not rewritten:
        return Sample(skipped="no rows were found")
    return Sample(rows=sum(key_range.rows for key_range in planned), rows_per_second=rewritten / seconds)


async def _plan(
    connection: AsyncConnection, table: TargetTable, *, rows: int, batch: int, ranges: int
) -> list[KeyRange]:
    """Plan ranges without common rows, from all parts of the table, in no order."""
    query = table.compose(
        "SELECT {json} FROM (SELECT {key} FROM (SELECT {key} FROM {table}"
        " TABLESAMPLE SYSTEM (%(percent)s)) AS read ORDER BY random() LIMIT %(ranges)s) AS chosen"
        " ORDER BY {chosen_key}",
        json=table.key_json(),
        chosen_key=table.key_columns("chosen"),
    )
    parameters = {"percent": min(100.0, 100 * _ROWS_READ / max(rows, 1)), "ranges": ranges}
    keys = [Key(key) for key in await fetch_column(connection, query, parameters)]
    last = await last_key(connection, table)
    if last is None:
        return []
    planner = IndexPlanner(connection, table)
    planned = [
        await planner.next_range(KeyInterval(after=after, through=through), batch)
        for after, through in zip(keys, [*keys[1:], last], strict=True)
        if after != through
    ]
    # Every second range first, so that the ranges for warming up are from all parts of the table, too.
    return planned[::2] + planned[1::2]


async def _rewrite(
    pool: AsyncConnectionPool, update: RangeUpdate, ranges: list[KeyRange], concurrency: int
) -> int:
    """Rewrite ranges until none is left or the time is up; return the number of rows."""
    until = time.monotonic() + MOST_SECONDS
    left = iter(ranges)

    async def work() -> int:
        rewritten = 0
        for key_range in left:
            if time.monotonic() > until:
                break
            async with translate_errors(seconds=None), pool.connection() as connection:
                rewritten += (await update.attempt(connection, None, key_range, key_range.rows)).rows
                await connection.rollback()
        return rewritten

    with unwrap_group():
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(work(), name="rotator sample") for _ in range(concurrency)]
    return sum(worker.result() for worker in workers)
