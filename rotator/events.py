"""What a rotation tells its observers: frozen facts, never values of the rotated column."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from signal import Signals
from typing import Literal, TypeAlias

from rotator.ranges import Key, KeyInterval


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
    def is_not_indexed(self) -> bool:
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
    row_bytes += 0 if table.is_not_indexed else _ENTRY_BYTES * len(table.indexes)
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


EndStatus: TypeAlias = Literal["completed", "queued", "interrupted", "failed"]


class StopReason(StrEnum):
    """Why a run stopped before its rotation was completed, as the database stores it."""

    STOP_AFTER = "--stop-after"
    SIGINT = "SIGINT"
    SIGTERM = "SIGTERM"
    SIGHUP = "SIGHUP"
    WORKER_SHUTDOWN = "shutdown of the Celery worker"
    CANCELLED = "cancellation by the calling program"


"""How a run can leave its rotation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What the target's table takes on the server's disk.

    Attributes:
        heap_bytes: The table without its indexes.
        index_bytes: All of its indexes.
        dead_rows: Row versions that nobody can see any more and whose values are still there; the server's
            own statistics, which are an estimate.
    """

    heap_bytes: int
    index_bytes: int
    dead_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflighted:
    """The rotation is about to begin, and this is what it will meet."""

    findings: Findings


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationStarted:
    """This process owns the rotation and is about to write.

    Attributes:
        rotation: The rotation's id.
        target: The target as the user writes it, e.g. ``tickets.Ticket.token``.
        rows_total: Rows up to the frozen upper bound.
        rows_total_is_exact: False where the total is the server's estimate.
        rows_done: Rows that earlier runs of this rotation have committed; 0 for a new one.
        seconds_before: Active seconds that earlier runs spent.
        stopped_at: When the last run was last heard of; None for a new rotation.
        concurrency: How many workers this run has.
        batch: How many rows a range holds in this run.
    """

    rotation: int
    target: str
    rows_total: int
    rows_total_is_exact: bool
    rows_done: int
    seconds_before: float
    stopped_at: datetime | None
    concurrency: int
    batch: int

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left this rotation unfinished."""
        return self.stopped_at is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeCompleted:
    """A range and its checkpoint were committed together.

    Attributes:
        rows: Rows that got a new value.
        seconds: From the range's first statement to its commit, retries left out.
        retries: How often this range was tried before in vain.
        ranges: How many ranges these were: several where others work on them and are asked now and then.
    """

    rows: int
    seconds: float
    retries: int
    ranges: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsRotated:
    """Rows have new values, and that is committed: a range of them, or some that were committed late.

    Attributes:
        rotation: The rotation's id.
        after: The last key before the range; None at the table's start, and for late rows.
        through: The range's last key; None for late rows.
        keys: The keys of late rows; empty for a range.
        rows: How many got a new value.
    """

    rotation: int
    after: Key | None = None
    through: Key | None = None
    keys: tuple[Key, ...] = ()
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeDeferred:
    """Somebody else holds rows of a range; it went to the back of the queue."""

    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeRetried:
    """The server refused a range and it will be tried again, whole or in halves.

    Attributes:
        rows: Rows that the range held when it was planned.
        reason: The server's condition, e.g. ``deadlock_detected``; never its message's detail.
        split: Whether it is tried again in two halves.
    """

    rows: int
    reason: str
    split: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFailed:
    """One row cannot be rotated; the others go on.

    Attributes:
        key: The row's key.
        reason: The server's condition and, where there is one, the constraint's name.
    """

    key: Key
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OutageStarted:
    """The server cannot be reached; ranges wait.

    Attributes:
        reason: One sentence, without values.
        budget_seconds: How long the run waits before it gives up.
    """

    reason: str
    budget_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OutageEnded:
    """The server answers again and the gaps were read anew from the checkpoints.

    Attributes:
        seconds: How long it was away.
        rows_done: Rows that the checkpoints now vouch for; may be fewer than were reported before.
    """

    seconds: float
    rows_done: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerUnreachable:
    """The broker cannot be reached; spans wait to be published, and what workers have goes on.

    Attributes:
        reason: One sentence.
    """

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSilent:
    """Nothing was heard of any span for long; they are published again.

    Attributes:
        seconds: For how long.
    """

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnerWatched:
    """Another process owns this rotation; its heartbeat is being watched before taking over.

    Attributes:
        owner: One phrase that names it: user, host and pid.
        seconds: How long it is watched at the most.
    """

    owner: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLogShowsValues:
    """The server is set up to write the new values to its own log.

    Attributes:
        settings: What makes it do so, e.g. ``log_statement = all``.
    """

    settings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LateCommitsAwaited:
    """Transactions older than the rotation may still commit rows of the target.

    Attributes:
        holders: One phrase for each of them (pid or prepared id, user, application, since when).
    """

    holders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LateCommitsOver:
    """The last of those transactions has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LateRowsRotated:
    """Rows that were committed late were found and rotated."""

    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmationStarted:
    """Every range is completed, and the table is read once to see who wrote each row last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfirmed:
    """No row is left that nothing has written since the rotation began.

    Attributes:
        confirmed: The rows that this rotation wrote last.
        unconfirmed: The rows that other sessions or triggers have written since.
    """

    confirmed: int
    unconfirmed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VacuumStarted:
    """The rotation is completed, and its table is being vacuumed for the last time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vacuumed:
    """The table was vacuumed while the rotation went on, or after it.

    Attributes:
        seconds: How long it took.
    """

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VacuumSkipped:
    """The table was not vacuumed, or not to the end; the rotation goes on all the same.

    Attributes:
        reason: Why.
        is_once: Whether only this one was skipped, and the next may well succeed.
    """

    reason: str
    is_once: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverFailed:
    """A receiver of the signal raised an exception; told once for each receiver and type.

    Attributes:
        receiver: The receiver's dotted name.
        error: The name of the exception's type; never its message.
    """

    receiver: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitRaised:
    """Planning the update alone takes a good part of a range's time limit, which was raised.

    Attributes:
        planning_seconds: The time that the server takes to plan the update of a range.
        partitions: The number of the table's partitions.
        statement_seconds: The time limit of a range from now on.
    """

    planning_seconds: float
    partitions: int
    statement_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHeld:
    """Other sessions have blocked a range for some seconds.

    Attributes:
        holders: One phrase for each of them (pid, application, state, for how long).
    """

    holders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainStarted:
    """No more ranges are planned; those in flight commit.

    Attributes:
        reason: The cause of the stop.
    """

    reason: StopReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A second has passed; observers without a clock of their own may speak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """Who ran a rotation, when, where and on which rows.

    Attributes:
        started_at: The time of the run's start.
        ended_at: The time of its end.
        user: The user of the process.
        host: The host of the process.
        server_name: The role, the host or socket, the port and the database, as ``app@host:5432/name``.
        table_name: The table's name, as the server has it.
        filters: The Django lookups that all rotated rows match.
        excludes: The Django lookups that no rotated row matches.
        generator: The dotted path of what makes the values; empty for the fields' own defaults.
        include_null: Whether a NULL gets a value, too.
    """

    started_at: datetime
    ended_at: datetime
    user: str
    host: str
    server_name: str
    table_name: str
    filters: tuple[str, ...]
    excludes: tuple[str, ...]
    generator: str
    include_null: bool

    @property
    def is_filtered(self) -> bool:
        """Whether some rows of the table are not rotated on purpose."""
        return bool(self.filters or self.excludes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationStopped:
    """The run is over; the database says the same.

    Attributes:
        rotation: The rotation's id.
        target: The target as the user writes it.
        status: ``completed``, ``queued`` for Celery workers, ``interrupted`` or ``failed``.
        rows: Rows rotated in all runs of this rotation.
        rows_total: Rows up to the frozen upper bound.
        rows_total_is_exact: False where the total is the server's estimate.
        rows_this_run: Rows rotated by this run.
        late_rows: Rows, among ``rows``, that no range had written: they were committed late, say.
        unconfirmed_rows: Rows that other sessions or triggers wrote last, after the rotation's start; None
            unless it is completed.
        ranges: Ranges committed by this run.
        seconds: What this run took, from its start to its last status.
        seconds_total: Active seconds over all runs.
        rows_per_second: ``rows_this_run`` over the seconds from the first range to the last.
        retries: Ranges tried again, whatever the reason.
        outage_seconds: How long this run waited for the server.
        peak_memory_bytes: High-water mark of this process's resident memory; 0 where unknown.
        concurrency: Workers of this run.
        batch: Rows a range.
        resumed: Whether an earlier run began this rotation.
        failed_keys: Keys of rows that could not be rotated, each with the reason.
        storage_before: What the table took when this run began; None where that is not known.
        storage: What it takes now; None where that is not known.
        vacuums: How often this run vacuumed the table.
        vacuum_seconds: How long these took.
        stop_reason: The reason of a stop that was requested; None for any other end.
        error: One sentence that says what went wrong; empty where nothing did.
        superseded: Whether another process has taken the rotation over; then this one knows nothing of
            how it stands.
        run: Who ran it, when, where and on which rows; None where that is not known.
        spans: The spans of keys that the rotation has written, in key order, where it is unfinished.
        table_rows: The rows of the whole table, where only some are rotated and the rotation is completed;
            None otherwise.
        table_rows_is_exact: False where that is the server's estimate.
    """

    rotation: int
    target: str
    status: EndStatus
    rows: int
    rows_total: int
    rows_total_is_exact: bool
    rows_this_run: int
    late_rows: int
    ranges: int
    seconds: float
    seconds_total: float
    rows_per_second: float
    retries: int
    outage_seconds: float
    peak_memory_bytes: int
    concurrency: int
    batch: int
    resumed: bool
    unconfirmed_rows: int | None = None
    failed_keys: tuple[tuple[Key, str], ...] = ()
    storage_before: Storage | None = None
    storage: Storage | None = None
    vacuums: int = 0
    vacuum_seconds: float = 0.0
    stop_reason: StopReason | None = None
    error: str = ""
    superseded: bool = False
    run: RunFacts | None = None
    spans: tuple[KeyInterval, ...] = ()
    table_rows: int | None = None
    table_rows_is_exact: bool = True

    @property
    def exit_status(self) -> int:
        """The exit status of a command: 0 completed or stopped by an option, 128 + the signal, or 1."""
        if self.status == "completed":
            return 0
        if self.status != "interrupted" or self.stop_reason is None:
            return 1
        if self.stop_reason is StopReason.STOP_AFTER:
            return 0
        return 128 + Signals[self.stop_reason] if self.stop_reason in Signals.__members__ else 1


Event: TypeAlias = (
    Preflighted
    | RotationStarted
    | RangeCompleted
    | RangeDeferred
    | RangeRetried
    | RowFailed
    | OutageStarted
    | OutageEnded
    | BrokerUnreachable
    | WorkersSilent
    | OwnerWatched
    | ServerLogShowsValues
    | LateCommitsAwaited
    | LateCommitsOver
    | LateRowsRotated
    | ConfirmationStarted
    | RowsConfirmed
    | VacuumStarted
    | Vacuumed
    | VacuumSkipped
    | ReceiverFailed
    | LimitRaised
    | LockHeld
    | DrainStarted
    | Tick
    | RotationStopped
)

Observer: TypeAlias = Callable[[Event], None]
