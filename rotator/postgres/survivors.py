"""Survivors: rows whose present value is in the ledger, and the controls of the search."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from rotator.exceptions import RotatorError
from rotator.postgres.connection import fetch_as, fetch_column, fetch_row, fetch_rows, first, set_local
from rotator.postgres.errors import superseded, translate_errors
from rotator.postgres.fence import KEY_SETTINGS, Lease
from rotator.postgres.last_writers import is_older
from rotator.postgres.ledger import Ledger
from rotator.postgres.rotations import exclusive_lock
from rotator.postgres.table import ROW, TargetTable, identifier, range_rows
from rotator.postgres.values import Place
from rotator.postgres.writer import OlderRow
from rotator.ranges import Key, KeyInterval

PLANTED_ROWS: Final = 3
CONTROL_ROWS: Final = 1000
KEYS_KEPT: Final = 10_000
# Rows that are read to choose those of the control.
_ROWS_READ: Final = 20_000
# A killed verification is resumed for so long; after that, the first part of the search is too old.
RESUMED_HOURS: Final = 24
# Longer than the server's own limit, below.
FIND_SECONDS: Final = 150.0
_SETTINGS: Final = {
    **KEY_SETTINGS,
    "statement_timeout": "60s",
    "enable_mergejoin": "off",
    "jit": "off",
    # A statement that the driver has prepared would keep the plan of other settings.
    "plan_cache_mode": "force_custom_plan",
}
# The plan reads a range by the key, and looks each value up in the ledger.
_PART: Final = {"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_hashjoin": "off"}
# The plan reads the table and the ledger once, which is faster for a small table.
_WHOLE: Final = {"enable_nestloop": "off"}


def is_in_ledger(ledger: Ledger, table: TargetTable) -> sql.Composable:
    """Return a condition about :data:`ROW`: one of its rotated values is in the ledger."""
    return sql.SQL("({})").format(
        sql.SQL(" OR ").join(
            sql.SQL("EXISTS (SELECT FROM {} AS rotator_entry WHERE rotator_entry.digest = {})").format(
                ledger.name, ledger.digest(column)
            )
            for column in table.columns
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The rows whose value is in the ledger, whatever row had it before.

    ``planted`` is the number of rows whose present values were entered for the search.
    """

    survivors: list[OlderRow]
    planted: int = 0
    planted_found: int = 0


async def find_survivors(
    connection: AsyncConnection,
    table: TargetTable,
    ledger: Ledger,
    interval: KeyInterval,
    *,
    is_whole: bool,
    processes: int,
    plants: bool,
) -> Found:
    """Search an interval for rows whose value is in the ledger, with this number of the server's processes.

    With ``plants``, present values of a few rows are entered first, and removed after the search.
    ``is_whole`` is whether the interval has all rows of the table.

    Raises:
        RowsLockedError: Another session has locked the table.
        RangeTooSlowError: The interval is too large.
    """
    parameters = asdict(interval)
    within = table.within(after_is_known=interval.after is not None)
    planted = dict[Key, list[int]]()
    async with (
        translate_errors(connection, seconds=FIND_SECONDS),
        connection.transaction(force_rollback=plants),
    ):
        await set_local(
            connection,
            {
                **_SETTINGS,
                **(_WHOLE if is_whole else _PART),
                "max_parallel_workers_per_gather": str(processes - 1),
            },
        )
        if plants:
            cursor = await connection.execute(_plant(table, ledger, within), parameters)
            planted = {Key(key): digests async for key, digests in cursor}
        parameters["planted"] = [digest for digests in planted.values() for digest in digests]
        cursor = await connection.execute(
            _search(table, ledger, within, has_planted=bool(planted)), parameters
        )
        found = [
            (OlderRow(place=Place(leaf=leaf, ctid=ctid), xid=xid, key=Key(key)), digests)
            async for leaf, ctid, xid, key, digests in cursor
        ]
    in_doubt = {digest for _, digests in found for digest in digests or ()}
    query = sql.SQL("SELECT digest FROM {} WHERE digest = ANY(%s)").format(ledger.name)
    entered = frozenset(await fetch_column(connection, query, (list(in_doubt),)))
    return Found(
        survivors=[row for row, digests in found if digests is None or not entered.isdisjoint(digests)],
        planted=len(planted),
        planted_found=len(planted.keys() & {row.key for row, _ in found}),
    )


def _search(table: TargetTable, ledger: Ledger, within: sql.Composable, *, has_planted: bool) -> sql.Composed:
    """Select rows of an interval, and the digests of those that planted entries may have matched."""
    digests = sql.SQL(
        "(SELECT array_agg(digest) FROM {} WHERE is_rotated"
        " HAVING bool_or(digest = ANY(%(planted)s::bigint[])))"
    ).format(ledger.digests(table))
    return table.compose(
        "SELECT {leaf}::bigint, {ctid}::text, {xmin}::text, {row_json}, {digests} FROM {row}"
        " WHERE {within} AND {is_in_ledger} ORDER BY {row_key}",
        digests=digests if has_planted else None,
        within=within,
        is_in_ledger=is_in_ledger(ledger, table),
    )


def _plant(table: TargetTable, ledger: Ledger, within: sql.Composable) -> sql.Composed:
    """Enter the present values of a few rows of an interval; return their keys and digests."""
    return table.compose(
        "WITH chosen AS (SELECT {row_json} AS key, ARRAY(SELECT digest FROM {digests} WHERE is_rotated)"
        " AS digests FROM {row} WHERE {within}),"
        " planted AS (SELECT key, digests FROM chosen WHERE cardinality(digests) > 0 LIMIT {limit}),"
        " entered AS (INSERT INTO {name} SELECT unnest(digests) FROM planted)"
        " SELECT key, digests FROM planted",
        digests=ledger.digests(table),
        within=within,
        limit=PLANTED_ROWS,
        name=ledger.name,
    )


async def control_ledger(
    connection: AsyncConnection,
    table: TargetTable,
    ledger: Ledger,
    *,
    started_xid: int,
    bound: Key,
    rows: int,
) -> tuple[int, int]:
    """Search for a sample of rows that no session has written since the rotation's start.

    Call it before the first row is rotated. A row of the sample that is younger than the oldest transaction
    that was open when loading began may lack its entry: that transaction may have committed it since. Such a
    row counts only if it is found.

    Returns:
        The number of rows that count, and the number of them that the search found.
    """
    xmin, never_attached = identifier(ROW, "xmin"), sql.SQL("NULL::xid")
    query = table.compose(
        "SELECT count(*) FILTER (WHERE is_found OR was_loaded), count(*) FILTER (WHERE is_found)"
        " FROM (SELECT {is_found} AS is_found, {was_loaded} AS was_loaded"
        " FROM {row} TABLESAMPLE SYSTEM (%(percent)s)"
        " WHERE {within} AND {is_older}{and_matches} LIMIT {limit}) AS sample",
        is_found=is_in_ledger(ledger, table),
        within=table.within(after_is_known=False),
        is_older=is_older(xmin, never_attached),
        was_loaded=is_older(xmin, never_attached, started="loading_xid"),
        limit=CONTROL_ROWS,
    )
    parameters = {
        "percent": min(100.0, 100 * _ROWS_READ / max(rows, 1)),
        "through": bound,
        "started_xid": started_xid,
        "loading_xid": ledger.started_xid,
    }
    ((sampled, found),) = await fetch_rows(connection, query, parameters, seconds=None)
    return int(sampled), int(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A verification in the database.

    Attributes:
        bound: The highest key when it began; None where the table was empty.
        through: The key up to which it has searched; None before the first range.
    """

    id: int
    bound: Key | None
    through: Key | None
    rows: int
    survivors: int
    repaired: int


_SEARCH: Final = "id, bound::text, through::text, rows, survivors, repaired"


async def resume_search(connection: AsyncConnection, rotation: int, *, repairs: bool) -> Search | None:
    """Return the search of an interrupted verification; None where there is none to resume."""
    query = (
        f"SELECT {_SEARCH} FROM rotator_verification WHERE rotation_id = %s AND repairs = %s"  # noqa: S608 - our own text
        " AND finished_at IS NULL AND started_at > clock_timestamp() - make_interval(hours => %s)"
        " ORDER BY id DESC LIMIT 1"
    )
    return first(await fetch_as(connection, class_row(Search), query, (rotation, repairs, RESUMED_HOURS)))


async def begin_search(
    connection: AsyncConnection, rotation: int, bound: Key | None, *, repairs: bool
) -> Search:
    """Record the start of a verification."""
    query = (
        "INSERT INTO rotator_verification (rotation_id, bound, repairs, rows, survivors, survivor_keys,"  # noqa: S608 - our own text
        f" repaired, result) VALUES (%s, %s::jsonb, %s, 0, 0, '[]', 0, '{{}}') RETURNING {_SEARCH}"
    )
    (search,) = await fetch_as(connection, class_row(Search), query, (rotation, bound, repairs))
    return search


async def advance_search(
    connection: AsyncConnection, search: Search, through: Key, *, rows: int, survivors: Sequence[Key]
) -> Search:
    """Record a range that was searched, and return the search after it.

    Raises:
        RotatorError: Another process has continued the same verification.
    """
    query = (
        "UPDATE rotator_verification SET through = %(through)s::jsonb, rows = rows + %(rows)s,"  # noqa: S608 - our own text
        " survivors = survivors + %(count)s, survivor_keys = CASE WHEN"
        " jsonb_array_length(survivor_keys) < %(kept)s THEN survivor_keys || %(keys)s ELSE survivor_keys"
        " END WHERE id = %(id)s AND through IS NOT DISTINCT FROM %(before)s::jsonb"
        f" AND finished_at IS NULL RETURNING {_SEARCH}"
    )
    parameters = {
        "through": through,
        "rows": rows,
        "count": len(survivors),
        "keys": Jsonb([str(key) for key in survivors[:KEYS_KEPT]]),
        "kept": KEYS_KEPT,
        "id": search.id,
        "before": search.through,
    }
    advanced = first(await fetch_as(connection, class_row(Search), query, parameters))
    if advanced is None:
        raise RotatorError(
            "Another process has continued this verification. Wait for it, then run the same command again."
        )
    return advanced


async def finish_search(
    connection: AsyncConnection, search: Search, result: dict[str, Any]
) -> tuple[Key, ...]:
    """Record the result of a verification, and return the keys of the survivors that were kept."""
    row = await fetch_row(
        connection,
        "UPDATE rotator_verification SET result = %s, finished_at = clock_timestamp() WHERE id = %s"
        " RETURNING survivor_keys",
        (Jsonb(result), search.id),
    )
    return tuple(Key(key) for key in row[0]) if row else ()


async def count_rows_of(
    connection: AsyncConnection, table: TargetTable, intervals: Sequence[KeyInterval]
) -> int:
    """Return the number of rows to rotate in some intervals."""
    rows = 0
    for interval in intervals:
        of_interval = range_rows(table, after_is_known=interval.after is not None)
        query = sql.SQL("SELECT count(*) FROM {}").format(of_interval)
        ((found,),) = await fetch_rows(connection, query, asdict(interval), seconds=None)
        rows += int(found)
    return rows


async def count_left_out(connection: AsyncConnection, table: TargetTable) -> tuple[int, int, int, int]:
    """Count the rows that the rotation leaves out on purpose; read the table once.

    Returns:
        The number of rows in the table; of those that the filters leave out; of those of which a value is
        NULL and stays NULL; and of those of which a value is the empty string and stays so.
    """
    nulls, blanks = zip(*(column.kept for column in table.columns), strict=True)
    query = table.compose(
        "SELECT count(*), count(*) FILTER (WHERE ({condition}) IS NOT TRUE),"
        " count(*) FILTER (WHERE ({condition}) AND ({null})),"
        " count(*) FILTER (WHERE ({condition}) AND ({blank})) FROM {row}",
        condition=table.condition or sql.SQL("true"),
        null=sql.SQL(" OR ").join(nulls),
        blank=sql.SQL(" OR ").join(blanks),
    )
    ((table_rows, excluded, null, blank),) = await fetch_rows(connection, query, seconds=None)
    return table_rows, excluded, null, blank


async def read_vacuumed(connection: AsyncConnection, table: TargetTable) -> tuple[str, int, str]:
    """Return the end of the latest VACUUM, the estimated dead rows that are left, and the server's version.

    Dead rows hold old values. The end is in ISO 8601, that of the partition that waits for the longest; empty
    where there was none.
    """
    query = table.compose(
        "SELECT min(GREATEST(last_vacuum, last_autovacuum)), COALESCE(sum(n_dead_tup), 0)::bigint,"
        " bool_or(GREATEST(last_vacuum, last_autovacuum) IS NULL), current_setting('server_version')"
        " FROM pg_stat_all_tables WHERE relid IN {partitions}"
    )
    ((at, dead_rows, is_missing, version),) = await fetch_rows(connection, query)
    return "" if at is None or is_missing else at.isoformat(timespec="seconds"), dead_rows, version


async def own_repair(connection: AsyncConnection, rotation: int) -> Lease:
    """Take the right to repair a completed rotation from every earlier process, and return the lease.

    Raises:
        SupersededError: The rotation is not completed.
    """
    async with exclusive_lock(connection, rotation):
        row = await fetch_row(
            connection,
            "UPDATE rotator_rotation SET generation = generation + 1 WHERE id = %s AND status = 'completed'"
            " RETURNING generation",
            (rotation,),
        )
    if row is None:
        raise superseded()
    return Lease(rotation=rotation, generation=row[0], repairs=True)
