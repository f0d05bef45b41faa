"""The events of a rotation that observers get. No event contains a value of the rotated column."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from signal import Signals
from typing import Any, Literal, TypeAlias

from rotator.options import Selection, known_fields
from rotator.ranges import Key, KeyInterval


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSize:
    """The size of an index of the target's table."""

    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Index(IndexSize):
    """An index. If it holds the rotated column, new values go to pages all over it."""

    holds_column: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptValues:
    """The numbers of rows whose value in one column stays NULL or blank (the empty string)."""

    column: str
    null: int
    blank: int


CopyKind: TypeAlias = Literal["trigger", "history", "schema", "name"]
"""Why a table may hold copies of the values: a trigger of the target writes to it, its name suggests a
history, it has the same name in another schema, or it has a column of the same name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """The first tables that may hold copies of the rotated values, and the number of more."""

    kind: CopyKind
    tables: tuple[str, ...]
    more: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFindings:
    """The findings of the preflight on the target's table.

    Attributes:
        indexes: All indexes, the largest first.
        skipped_triggers: Those that no update fires while ``session_replication_role`` is ``replica``.
        writing_triggers: Triggers, of this or another table, whose functions write to it, one phrase each.
        refusing_publications: Publications for which the server rejects every update, since the table has no
            replica identity.
        kept: The values that stay unchanged, by column; None where they could not be counted in time.
    """

    rows: int
    rows_is_exact: bool
    heap_bytes: int
    indexes: tuple[Index, ...]
    triggers: tuple[str, ...]
    skipped_triggers: tuple[str, ...] = ()
    writing_triggers: tuple[str, ...] = ()
    subscriptions: tuple[str, ...] = ()
    refusing_publications: tuple[str, ...] = ()
    kept: tuple[KeptValues, ...] | None = ()
    copies: tuple[Copies, ...] = ()

    @property
    def index_bytes(self) -> int:
        """The size of all indexes."""
        return sum(index.size_bytes for index in self.indexes)

    @property
    def random_bytes(self) -> int:
        """The size of the indexes whose pages are written in no order."""
        return sum(index.size_bytes for index in self.indexes if index.holds_column)

    @property
    def is_not_indexed(self) -> bool:
        """Whether an update need not touch any index, where the page has room for the new row."""
        return not any(index.holds_column for index in self.indexes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFindings:
    """The server's settings, and phrases on what depends on its WAL and on old row versions.

    Attributes:
        archiving: The state of WAL archiving; empty where it is off.
        holders: The oldest transactions that keep VACUUM from removing row versions.
        log_settings: The settings that make the server log new values.
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
    """Ranges that all workers rewrote and that were rolled back, or why nothing was measured.

    Attributes:
        rows_per_second: The rate of all workers together; 0 where nothing was measured.
    """

    rows: int = 0
    rows_per_second: float = 0.0
    skipped: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """The results of the preflight.

    Attributes:
        server_name: The role, the host or socket, the port and the database, as ``app@host:5432/name``.
        rows_left: The rows that are not yet rotated: all rows of the table for a new rotation.
        unfinished: The id of the rotation that would be resumed; None for a new one.
        bypassed: The effects of ``save()`` that the rotation does not have, one phrase each.
        selection: The options that choose rows and values; empty where there are none.
        warnings: Warnings that follow from the names of the fields, one sentence each.
        guard: ``refuse`` or ``keep``; empty for no guard.
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
    proves: bool = False
    guard: str = ""

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Findings | None":
        """Return saved findings; None where another version has saved them without what this one needs."""
        lists = {"indexes": Index, "kept": KeptValues, "copies": Copies}
        try:
            table = known_fields(TableFindings, saved["table"])
            table |= {
                name: tuple(kind(**known_fields(kind, each)) for each in table[name])
                for name, kind in lists.items()
                if table.get(name) is not None
            }
            parts = {
                "table": TableFindings(**table),
                "server": ServerFindings(**known_fields(ServerFindings, saved["server"])),
                "sample": Sample(**known_fields(Sample, saved["sample"])),
            }
            return cls(**known_fields(cls, saved) | parts)
        except (KeyError, TypeError):
            return None

    @property
    def estimated_seconds(self) -> float | None:
        """The time from the first range to the last; None where nothing was measured."""
        rate = self.sample.rows_per_second
        return self.rows_left / rate if rate else None


EndStatus: TypeAlias = Literal["completed", "queued", "interrupted", "failed"]
"""The status in which a run can leave its rotation."""


class StopReason(StrEnum):
    """The reason why a run stopped before its rotation was completed, as the database stores it."""

    STOP_AFTER = "--stop-after"
    SIGINT = "SIGINT"
    SIGTERM = "SIGTERM"
    SIGHUP = "SIGHUP"
    WORKER_SHUTDOWN = "shutdown of the Celery worker"
    CANCELLED = "cancellation by the calling program"
    CANCEL = "rotations cancel"


class ActionKind(StrEnum):
    """What a user or a process did with a rotation, as the database stores it."""

    STARTED = "started"
    RESUMED = "resumed"
    TAKEN_OVER = "taken over"
    PAUSED = "paused"
    PAUSE_ENDED = "pause ended"
    CHANGED = "changed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    COMPLETED = "completed"
    ABANDONED = "abandoned"
    VACUUMED = "vacuumed"
    VACUUM_SKIPPED = "VACUUM skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """The disk space of the target's table.

    Attributes:
        dead_rows: Row versions that no transaction can see, and whose values are still on disk; an estimate
            of the server.
        indexes: Each index, in the order of the names, which have schemas and are quoted.
    """

    heap_bytes: int
    index_bytes: int
    dead_rows: int
    indexes: tuple[IndexSize, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflighted:
    """The preflight is complete, and the rotation is about to begin."""

    findings: Findings


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationStarted:
    """This process owns the rotation and is about to write.

    Attributes:
        rows_total: Rows up to the frozen upper bound.
        rows_done: Rows that earlier runs of this rotation have committed, late rows included.
        stopped_at: The last heartbeat of the last run; None for a new rotation.
    """

    rotation: int
    target: str
    rows_total: int
    rows_total_is_exact: bool
    rows_done: int
    late_rows: int
    seconds_before: float
    stopped_at: datetime | None
    concurrency: int
    batch: int
    deferrals_before: int = 0
    retries_before: int = 0
    throttled_seconds_before: float = 0.0
    pace: str = "balanced"

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left this rotation unfinished."""
        return self.stopped_at is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeCompleted:
    """A range and its checkpoint were committed, ``seconds`` after its last attempt began."""

    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersProgressed:
    """Celery workers have committed or deferred ranges since the owner last read the checkpoints."""

    ranges: int
    rows: int
    deferrals: int
    retries: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsRotated:
    """New values of a range, or of some late rows, are committed.

    Attributes:
        after: The last key before the range; None at the table's start, and for late rows.
        through: The range's last key; None for late rows.
        keys: The keys of late rows; empty for a range.
    """

    rotation: int
    after: Key | None = None
    through: Key | None = None
    keys: tuple[Key, ...] = ()
    rows: int


OnCommit: TypeAlias = Callable[[RowsRotated], Awaitable[None]]
"""The worker awaits it after each commit of rows, before its next range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeDeferred:
    """A range was put back because of another session's lock; 0 rows if that prevented its planning."""

    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeRetried:
    """The server rejected a range, which is retried: in two parts if it is ``split``.

    Attributes:
        reason: The server's condition, e.g. ``deadlock_detected``; not its message, which may hold values.
    """

    rows: int
    reason: str
    split: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRejected:
    """The server rejects the new value of one row; the rotation of the other rows continues.

    Attributes:
        reason: The server's condition and, where there is one, the constraint's name; not its message.
    """

    key: Key
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OutageStarted:
    """The server is unreachable; the run gives up after ``budget_seconds``."""

    reason: str
    budget_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OutageEnded:
    """The server is reachable again. Checkpoints can confirm fewer rows than were reported before."""

    seconds: float
    rows_done: int
    late_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerUnreachable:
    """The broker cannot be reached; workers that have received a message continue."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSilent:
    """No Celery worker has worked on the rotation for ``seconds``; another message is sent."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnerWatched:
    """Another process owns this rotation; this one watches its heartbeat for up to ``seconds``."""

    owner: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLogShowsValues:
    """The server will log the new values because of settings such as ``log_statement = all``."""

    settings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LateCommitsAwaited:
    """Transactions older than the rotation can still commit rows of the target."""

    holders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LateCommitsOver:
    """The last of those transactions has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LateRowsRotated:
    """Late rows were found and rotated: rows that no range has written."""

    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmationStarted:
    """Every range is completed, and the table is read once to find the last writer of each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfirmed:
    """No row is older than the rotation."""

    confirmed: int
    unconfirmed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VacuumStarted:
    """The rotation is completed, and the final VACUUM has started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vacuumed:
    """A VACUUM of the table has ended, during the rotation or after it."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VacuumSkipped:
    """The table was not vacuumed, or not completely. The next VACUUM is tried if ``is_once``."""

    reason: str
    is_once: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Analyzed:
    """ANALYZE has replaced the table's statistics, which held old values."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeSkipped:
    """The table's statistics still hold old values, until the user runs the statement."""

    reason: str
    statement: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReindexStarted:
    """The rotation is completed, and this number of indexes is being rebuilt."""

    indexes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRebuilt:
    """An index was rebuilt; its name has its schema and is quoted."""

    name: str
    seconds: float
    bytes_before: int
    bytes_now: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReindexSkipped:
    """An index was not rebuilt, or an invalid one not dropped; all indexes if the name is empty."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverFailed:
    """A receiver raised an error of this type; reported once for each receiver and type.

    Attributes:
        error: The name of the type, without the message, which may hold values.
    """

    receiver: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitRaised:
    """The time limit of a range was raised, because planning the update takes a large part of it."""

    planning_seconds: float
    partitions: int
    statement_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHeld:
    """The sessions that have blocked ranges for some seconds; sent about twice a second while there are any.

    Attributes:
        holders: One phrase for each of them (pid, application, state, duration); empty after the last one.
        is_new: Whether one of them was not reported before.
    """

    holders: tuple[str, ...]
    is_new: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PaceChanged:
    """The pace allows another number of workers, or the rows in a range or the reason have changed.

    Attributes:
        reason: One phrase, e.g. ``commit p90 4.1 ms > 3.0 ms``.
        is_limited: Whether the pace applies: other sessions are at work.
        is_new: False where only the rows in a range or the reason have changed.
    """

    pace: str
    workers: int
    concurrency: int
    rows: int
    reason: str
    is_limited: bool
    is_new: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Throttled:
    """A throttle holds the rotation: no more ranges begin. If not ``is_new``, only its reason is."""

    source: str
    reason: str
    is_new: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ThrottleEnded:
    """A throttle does not hold the rotation any more; another one may."""

    source: str
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsChanged:
    """A user has changed the limits of the running rotation."""

    concurrency: int
    batch: int
    by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HorizonHeld:
    """Sessions, slots, replicas or prepared transactions keep VACUUM from removing dead rows."""

    holders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainStarted:
    """The run stops: ranges in flight are committed. ``by`` is the user who cancelled the rotation."""

    reason: StopReason
    by: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A second has passed, so that observers without a timer can show their figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """The user, place and time of a run, and its choice of rows and values."""

    started_at: datetime
    ended_at: datetime
    user: str
    host: str
    server_name: str
    table_name: str
    selection: Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakedValuesFound:
    """A search has found the leaked values that rows have.

    Attributes:
        found: The number of them that rows had in a search of this run.
        found_lines: The lines of these values, e.g. ``("5", "17-19")``; at most 10,000 ranges.
        other_lines: The lines of the others, in the same form. Earlier runs can have rotated their rows.
    """

    values: int
    found: int
    found_lines: tuple[str, ...]
    other_lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerStarted:
    """The old values are being entered into the ledger, before the first row is rotated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerProgressed:
    """The values of a range are in the ledger."""

    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerReady:
    """Every old value is in the ledger; a search found all ``control_rows`` of a sample in it."""

    seconds: float
    control_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardAdded:
    """A trigger keeps old values from coming back."""

    action: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationStarted:
    """The table is searched for old values; an interrupted search has done ``rows`` before."""

    rows_total: int
    rows: int
    repairs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationProgressed:
    """A range was searched."""

    rows: int
    survivors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """The rows that a rotation has written, and those that it has not, in the words of docs/glossary.md.

    Attributes:
        gaps: The first intervals of keys that no checkpoint covers.
        gap_rows: The rows to rotate in all gaps.
        unknown: Why confirmed, unconfirmed and older rows are unknown, i.e. None; empty where they are known.
        excluded_rows: The rows that do not match the filters now.
    """

    status: str
    gaps: tuple[KeyInterval, ...]
    gap_rows: int
    confirmed_rows: int | None
    unconfirmed_rows: int | None
    older_rows: int | None
    unknown: str
    rejected_keys: tuple[tuple[Key, str], ...]
    table_rows: int
    excluded_rows: int
    null_rows: int
    blank_rows: int

    @property
    def is_whole(self) -> bool:
        """Whether no row is left that the rotation has to write."""
        is_written = not (self.gaps or self.gap_rows or self.rejected_keys or self.older_rows)
        return is_written and self.status == "completed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """The tests of the search itself: it must find what is certainly in the ledger.

    Attributes:
        sampled: The rows of a sample that were searched for before the rotation, and all of them found.
        entries_found: The entries that the ledger has.
        is_salt_right: Whether the first entry, whose text is known, was made with this salt.
        planted: The rows whose present values were entered for a moment.
        planted_found: The number of these rows that the search found.
    """

    sampled: int
    entries: int
    entries_found: int
    is_salt_right: bool
    planted: int
    planted_found: int

    @property
    def have_passed(self) -> bool:
        """Whether the search can be trusted."""
        return (
            self.is_salt_right and self.entries == self.entries_found and self.planted == self.planted_found
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """The end of a verification.

    Attributes:
        number: The id of the verification; None where it did not begin.
        survivors: The rows whose value is in the ledger; None where this is unknown.
        survivor_keys: The keys of the first survivors.
        repaired: The survivors that have new values, in a verification that repairs.
        guard_hits: How often a guard met an old value.
        false_matches: The expected number of survivors that are none, because only their digests are equal.
        vacuumed_at: The last VACUUM of the table, in ISO 8601; empty where unknown.
        dead_rows: The server's estimate of dead rows, which hold old values until VACUUM removes them.
        error: One sentence where it did not finish.
    """

    rotation: int
    target: str
    number: int | None
    started_at: datetime
    ended_at: datetime
    rows: int = 0
    survivors: int | None = None
    survivor_keys: tuple[Key, ...] = ()
    repaired: int = 0
    coverage: Coverage | None = None
    controls: Controls | None = None
    guard_hits: int = 0
    false_matches: float = 0.0
    vacuumed_at: str = ""
    dead_rows: int = 0
    server_name: str = ""
    server_version: str = ""
    user: str = ""
    host: str = ""
    error: str = ""

    @property
    def is_verified(self) -> bool:
        """Whether the search can be trusted, no survivor was found, and no row is left to write."""
        return (
            not self.error
            and self.survivors == 0
            and self.controls is not None
            and self.controls.have_passed
            and self.coverage is not None
            and self.coverage.is_whole
        )

    def to_json(self) -> dict[str, Any]:
        """Return the verification as JSON types."""
        facts = asdict(self)
        for name in ("started_at", "ended_at"):
            facts[name] = facts[name].astimezone(UTC).isoformat(timespec="milliseconds")
        if self.coverage is not None:
            facts["coverage"]["rejected_keys"] = [
                {"key": key, "reason": reason} for key, reason in self.coverage.rejected_keys
            ]
        if self.controls is not None:
            facts["controls"]["have_passed"] = self.controls.have_passed
        return {"is_verified": self.is_verified, **facts}

    @property
    def exit_status(self) -> int:
        """The exit status of a command: 0 only where everything is verified."""
        return 0 if self.is_verified else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationStopped:
    """The end of a run. docs/output.md describes its figures, which are those of the report.

    Attributes:
        rows: Rows rotated in all runs of this rotation; out of date where it is ``superseded``.
        rows_per_second: The rate while writing: rows of this run's ranges, divided by the seconds from the
            start of the first range to the end of the last one.
        peak_memory_bytes: The peak resident memory of this process; 0 where unknown.
        stop_reason: The reason of a stop that was requested; None for any other end.
        superseded: Whether another process has taken the rotation over.
        spans: The key intervals that an unfinished rotation has written, in key order.
        table_rows: The rows of the whole table, if a completed rotation excludes some; None otherwise.
        reindex_statements: The statements that make the indexes as small as before, each to be run alone.
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
    deferrals: int
    retries: int
    outage_seconds: float
    peak_memory_bytes: int
    concurrency: int
    batch: int
    resumed: bool
    run: RunFacts
    unconfirmed_rows: int | None = None
    rejected_keys: tuple[tuple[Key, str], ...] = ()
    storage_before: Storage | None = None
    storage: Storage | None = None
    vacuums: int = 0
    vacuum_seconds: float = 0.0
    stop_reason: StopReason | None = None
    error: str = ""
    superseded: bool = False
    leaked: LeakedValuesFound | None = None
    spans: tuple[KeyInterval, ...] = ()
    table_rows: int | None = None
    table_rows_is_exact: bool = True
    analyze_statement: str = ""
    reindex_statements: tuple[str, ...] = ()
    throttled_seconds: Mapping[str, float] = field(default_factory=dict)
    cancelled_by: str = ""
    pace: str = "balanced"
    limited_seconds: float = 0.0
    verification: Verified | None = None

    @property
    def exit_status(self) -> int:
        """The exit status of a command: 0 completed or stopped by --stop-after, 128 + the signal, or 1.

        A completed rotation that is not verified, although it has a ledger, has the status 1.
        """
        if self.status == "completed":
            return 0 if self.verification is None else self.verification.exit_status
        if self.status != "interrupted" or self.stop_reason is None:
            return 1
        if self.stop_reason is StopReason.STOP_AFTER:
            return 0
        if self.stop_reason is StopReason.CANCEL:
            # It ends like Ctrl-C.
            return 128 + Signals.SIGINT
        return 128 + Signals[self.stop_reason] if self.stop_reason in Signals.__members__ else 1


Event: TypeAlias = (
    Preflighted
    | RotationStarted
    | RangeCompleted
    | WorkersProgressed
    | RangeDeferred
    | RangeRetried
    | RowRejected
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
    | Analyzed
    | AnalyzeSkipped
    | ReindexStarted
    | IndexRebuilt
    | ReindexSkipped
    | ReceiverFailed
    | LimitRaised
    | LockHeld
    | PaceChanged
    | Throttled
    | ThrottleEnded
    | LimitsChanged
    | HorizonHeld
    | DrainStarted
    | LedgerStarted
    | LedgerProgressed
    | LedgerReady
    | GuardAdded
    | LeakedValuesFound
    | VerificationStarted
    | VerificationProgressed
    | Verified
    | Tick
    | RotationStopped
)

Observer: TypeAlias = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Do nothing: the observer of a run that no one watches."""
