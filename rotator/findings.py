"""What is known of a rotation before its first write: facts, of which others make sentences."""

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """One index of the target's table.

    Attributes:
        name: Its name.
        size_bytes: What it takes.
        holds_column: Whether the rotated column is in it, so that new values go to pages all over it.
    """

    name: str
    size_bytes: int
    holds_column: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptValues:
    """The values of one column that the rotation leaves as they are.

    Attributes:
        column: The column's name.
        null: The number of rows that are NULL.
        blank: The number of rows that are the empty text.
    """

    column: str
    null: int
    blank: int


CopyKind: TypeAlias = Literal["trigger", "history", "schema", "name"]
"""Why a table may hold copies of the values: a trigger of the target writes to it, its name says that it is a
history, it has the same name in another schema, or it has a column of the same name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Tables that may hold copies of the rotated values.

    Attributes:
        kind: The reason why.
        tables: The names of the first tables, with their schemas where needed.
        more: The number of tables without a name here.
    """

    kind: CopyKind
    tables: tuple[str, ...]
    more: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFindings:
    """The target's table.

    Attributes:
        rows: How many rows it has.
        rows_is_exact: False where that is the server's estimate.
        heap_bytes: What it takes without its indexes.
        indexes: All of them, the largest first.
        triggers: The names of those that every update fires.
        writing_triggers: Triggers, of this or another table, whose functions write to it, one phrase each.
        subscriptions: The names of the subscriptions that write to it.
        refusing_publications: Publications for which the server refuses every update, since the table has no
            replica identity.
        kept: The values that the rotation leaves as they are, by column; None where they could not be counted
            in time.
        copies: Other tables that may hold copies of the values.
    """

    rows: int
    rows_is_exact: bool
    heap_bytes: int
    indexes: tuple[Index, ...]
    triggers: tuple[str, ...]
    writing_triggers: tuple[str, ...] = ()
    subscriptions: tuple[str, ...] = ()
    refusing_publications: tuple[str, ...] = ()
    kept: tuple[KeptValues, ...] | None = ()
    copies: tuple[Copies, ...] = ()

    @property
    def index_bytes(self) -> int:
        """What all its indexes take."""
        return sum(index.size_bytes for index in self.indexes)

    @property
    def random_bytes(self) -> int:
        """What the indexes take whose pages are written in no order."""
        return sum(index.size_bytes for index in self.indexes if index.holds_column)

    @property
    def stays_out_of_indexes(self) -> bool:
        """Whether an update need not touch any index, where the page has room for the new row."""
        return not any(index.holds_column for index in self.indexes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFindings:
    """The server's settings, and who depends on its WAL and on its old row versions.

    Attributes:
        max_wal_size_bytes: How much WAL forces a checkpoint.
        checkpoint_timeout_seconds: How often there is one in any case.
        full_page_writes: Whether a page is written whole after each checkpoint.
        archiving: How WAL archiving is doing, in a phrase; empty where there is none.
        replicas: One phrase for each, with its lag.
        slots: One phrase for each replication slot, with the WAL it keeps.
        holders: One phrase for each of the oldest that keep VACUUM from removing old row versions.
        log_settings: What makes the server log new values; mostly nothing.
    """

    max_wal_size_bytes: int
    checkpoint_timeout_seconds: int
    full_page_writes: bool
    archiving: str
    replicas: tuple[str, ...]
    slots: tuple[str, ...]
    holders: tuple[str, ...]
    log_settings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Some ranges that were rewritten and rolled back.

    Attributes:
        rows: How many rows they held.
        rows_per_second: How fast that went, with all workers at it; 0 where nothing was measured.
        skipped: Why nothing was measured; empty where it was.
    """

    rows: int = 0
    rows_per_second: float = 0.0
    skipped: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything.

    Attributes:
        target: The target as the user writes it.
        database: Django's alias of the database.
        server_name: The role, the host or socket, the port and the database, as ``app@host:5432/name``.
        table_name: The table's name, as the server has it.
        concurrency: How many workers there will be.
        rows_left: How many rows are still to be done; those of the table, but for an unfinished rotation.
        unfinished: The id of the rotation that would go on; None for a new one.
        table: The table.
        server: The server.
        sample: What the time is estimated from.
        bypassed: What of Django's model would have acted upon each save(), one phrase each.
        selection: The options that chose rows and values; empty where there were none.
        warnings: What the names of the fields warn of, one sentence each.
    """

    target: str
    database: str
    server_name: str
    table_name: str
    concurrency: int
    rows_left: int
    unfinished: int | None
    table: TableFindings
    server: ServerFindings
    sample: Sample
    bypassed: tuple[str, ...]
    selection: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def estimated_seconds(self) -> float | None:
        """How long it will take, from the first range to the last; None where nothing was measured."""
        rate = self.sample.rows_per_second
        return self.rows_left / rate if rate else None


@dataclass(frozen=True, kw_only=True, slots=True)
class WalEstimate:
    """What will be written to the WAL.

    Attributes:
        wal_bytes: How much.
        forced_checkpoints: How many checkpoints that forces.
        calm_bytes: How much it would be if it forced none.
    """

    wal_bytes: int
    forced_checkpoints: int
    calm_bytes: int


# What a row's update writes beside the new row itself: heads of records, and an entry in each index. Fitted
# to what benchmarks/speed.py shows.
_ROW_OVERHEAD_BYTES = 130
_ENTRY_BYTES = 90
_PAGE_BYTES = 8192
# CalculateCheckpointSegments() in the server's src/backend/access/transam/xlog.c, with the default of
# checkpoint_completion_target.
_CHECKPOINT_SHARE = 1 / 1.9


def estimate_wal(table: TableFindings, server: ServerFindings, rows: int) -> WalEstimate:
    """Estimate the WAL that rewriting so many rows of the table writes.

    After a checkpoint the first change of each page writes it whole. The pages of heap and key are changed in
    order and so but once, those of an index of random values again after each checkpoint.
    """
    row_bytes = table.heap_bytes / max(table.rows, 1) + _ROW_OVERHEAD_BYTES
    row_bytes += 0 if table.stays_out_of_indexes else _ENTRY_BYTES * len(table.indexes)
    part = min(1.0, rows / max(table.rows, 1))
    once_bytes = rows * row_bytes
    if server.full_page_writes:
        once_bytes += part * (table.heap_bytes + table.index_bytes - table.random_bytes)
    # At the worst each new value meets a page that has not been written since the last checkpoint.
    most_random_bytes = rows * _PAGE_BYTES * sum(index.holds_column for index in table.indexes)
    most_bytes = once_bytes + most_random_bytes
    random_bytes = min(table.random_bytes, most_random_bytes) if server.full_page_writes else 0
    between_bytes = server.max_wal_size_bytes * _CHECKPOINT_SHARE
    calm_bytes = once_bytes + random_bytes
    if calm_bytes <= between_bytes:
        wal_bytes = calm_bytes
    elif between_bytes > random_bytes:
        wal_bytes = min(most_bytes, once_bytes * between_bytes / (between_bytes - random_bytes))
    else:
        wal_bytes = most_bytes
    return WalEstimate(
        wal_bytes=round(wal_bytes),
        forced_checkpoints=int(wal_bytes / between_bytes),
        calm_bytes=round(calm_bytes),
    )
