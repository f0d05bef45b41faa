"""The preflight report as text, and its estimate of the WAL."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import Final

from rotator.events import Copies, CopyKind, Findings, ServerFindings, TableFindings
from rotator.progress.text import GUARD_EFFECTS, count, duration, plural, rate, size


@dataclass(frozen=True, kw_only=True, slots=True)
class WalEstimate:
    """The WAL that a rotation will write, and the checkpoints that this forces.

    Attributes:
        calm_bytes: The amount without forced checkpoints.
    """

    wal_bytes: int
    forced_checkpoints: int
    calm_bytes: int


# What a row's update writes in addition to the new row: record headers, and an entry in each index. Measured
# with benchmarks/speed.py.
_ROW_OVERHEAD_BYTES = 130
_ENTRY_BYTES = 90
_PAGE_BYTES = 8192
# With its index; measured with benchmarks/proof.py.
_LEDGER_ROW_BYTES = 59
# CalculateCheckpointSegments() in the server's src/backend/access/transam/xlog.c, with the default of
# checkpoint_completion_target.
_CHECKPOINT_SHARE = 1 / 1.9


def estimate_wal(table: TableFindings, server: ServerFindings, rows: int) -> WalEstimate:
    """Estimate the WAL of an update of so many rows of the table.

    After a checkpoint, the first change of a page writes the whole page. The pages of heap and key are
    changed in order, so each is written once. The pages of an index of random values are written again after
    each checkpoint.
    """
    row_bytes = table.heap_bytes / max(table.rows, 1) + _ROW_OVERHEAD_BYTES
    row_bytes += 0 if table.is_not_indexed else _ENTRY_BYTES * len(table.indexes)
    part = min(1.0, rows / max(table.rows, 1))
    once_bytes = rows * row_bytes
    if server.full_page_writes:
        once_bytes += part * (table.heap_bytes + table.index_bytes - table.random_bytes)
    # In the worst case each new value changes a page that was not changed since the last checkpoint.
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


_INDEXES_NAMED: Final = 4
_NOT_CONFIRMED: Final = "rows that they write are reported as not confirmed"
_CONSEQUENCES: Final = (
    "Old values cannot be restored, and clients that use them lose access at once.",
    "Old values remain in WAL, backups, replicas and caches, and in dead rows until a VACUUM.",
    "auto_now, history tables and the signals of save() are bypassed.",
    "A save() of an object that the application loaded earlier writes an old value back.",
)


def preflight(findings: Findings) -> str:
    """Return the findings as text of several lines, without a final line end."""
    lines = [f"Before the first write to {findings.target} in the database '{findings.database}':"]
    for label, values in _facts(findings):
        # Only the first line of several has the label.
        lines += [f"  {label if not at else '':<12} {value}" for at, value in enumerate(values)]
    lines.append("Consequences:")
    lines += [f"  - {sentence}" for sentence in _CONSEQUENCES]
    return "\n".join(lines)


def preflight_facts(findings: Findings) -> list[tuple[str, str]]:
    """Return the report as pairs of a label and a text, without the selection, which can contain keys."""
    facts = _facts(replace(findings, selection=""))
    return [(label, reduce(_joined, map(str.strip, values))) for label, values in facts]


def _joined(text: str, following: str) -> str:
    return f"{text} {following}" if text.endswith((":", ";")) else f"{text}; {following}"


def _facts(findings: Findings) -> list[tuple[str, list[str]]]:
    """Return the report as pairs of a label and its lines, without those that have none."""
    facts = [*_table(findings), *_disk(findings), *_others(findings), *_run(findings)]
    return [(label, lines) for label, lines in facts if lines]


def _table(findings: Findings) -> list[tuple[str, list[str]]]:
    table = findings.table
    rows = f"{count(table.rows)} counted" if table.rows_is_exact else f"about {count(table.rows)} (estimate)"
    if findings.unfinished is not None:
        rows += f"; rotation {findings.unfinished} resumes, with about {count(findings.rows_left)} left"
    named = [f"{index.name} {size(index.size_bytes)}" for index in table.indexes[:_INDEXES_NAMED]]
    if len(table.indexes) > _INDEXES_NAMED:
        named.append(f"{count(len(table.indexes) - _INDEXES_NAMED)} more")
    touched = (
        "not updated where the page has room, since none contains the column: "
        if table.is_not_indexed
        else f"each update writes to {'all ' + str(len(table.indexes)) if named[1:] else 'the one'}: "
    )
    indexes = [touched, *(f"  {name}" for name in named)] if named[2:] else [touched + ", ".join(named)]
    ledger = f"about {size(_LEDGER_ROW_BYTES * findings.rows_left)}, which is loaded before the first row"
    return [
        ("server", [findings.server_name]),
        ("rows", [rows]),
        ("chosen by", [findings.selection] if findings.selection else []),
        ("table", [f"{findings.table_name}: {size(table.heap_bytes)}, indexes {size(table.index_bytes)}"]),
        ("indexes", indexes),
        ("kept", _kept(findings)),
        ("copies", [phrase for copies in table.copies for phrase in _copies(copies)]),
        *(("warning", [warning]) for warning in findings.warnings),
        ("ledger", [ledger] if findings.proves else []),
        ("guard", [f"a trigger is added: {GUARD_EFFECTS[findings.guard]}"] if findings.guard else []),
        *_writers(table),
    ]


def _writers(table: TableFindings) -> list[tuple[str, list[str]]]:
    """Return the lines on what each update fires, and on what else writes to the table."""
    fired, writing = ", ".join(table.triggers), ", ".join(table.writing_triggers)
    skipped = f"session_replication_role is replica: updates do not fire {', '.join(table.skipped_triggers)}"
    subscriptions, publications = ", ".join(table.subscriptions), ", ".join(table.refusing_publications)
    by_triggers = [f"the triggers {writing} write to this table:", _NOT_CONFIRMED]
    by_subscriptions = [
        f"the subscriptions {subscriptions} write to this table:",
        f"disable them, or they can restore old values; {_NOT_CONFIRMED}",
    ]
    refused = f"by {publications}, WITHOUT A REPLICA IDENTITY: set one, or the server rejects updates"
    return [
        ("triggers", [f"each update fires {fired}"] if fired else []),
        ("warning", [skipped] if table.skipped_triggers else []),
        ("warning", by_triggers if writing else []),
        ("warning", by_subscriptions if subscriptions else []),
        ("published", [refused] if publications else []),
    ]


def _kept(findings: Findings) -> list[str]:
    """Return the lines on rows that get no new value."""
    kept = findings.table.kept
    if kept is None:
        return ["values that are NULL or blank; counting them took too long"]
    return [
        f"{values.column} stays {state} in {plural(rows, 'row')} without --include-{state.lower()}"
        for values in kept
        for state, rows in (("NULL", values.null), ("blank", values.blank))
        if rows
    ]


_COPIES: Final[dict[CopyKind, str]] = {
    "trigger": "  a trigger of the table writes new values there too; old values remain there",
    "history": "  a history: old values remain there, and a revert restores them",
    "schema": "  the same table in another schema, e.g. of another tenant: rotate it there too",
    "name": "  a column of the same name: if it contains copies, rotate them too",
}


def _copies(copies: Copies) -> list[str]:
    more = f" and {plural(copies.more, 'other table')}" if copies.more else ""
    return [", ".join(copies.tables) + more, _COPIES[copies.kind]]


def _disk(findings: Findings) -> list[tuple[str, list[str]]]:
    table, server = findings.table, findings.server
    wal = estimate_wal(table, server, findings.rows_left)
    every = duration(server.checkpoint_timeout_seconds)
    checkpoints = f"max_wal_size is {size(server.max_wal_size_bytes)} and checkpoint_timeout {every}: " + (
        "no checkpoint is forced"
        if not wal.forced_checkpoints
        else f"about {plural(wal.forced_checkpoints, 'checkpoint')} forced"
    )
    lines = [f"about {size(wal.wal_bytes)} will be written", checkpoints]
    if wal.forced_checkpoints:
        enough = size(2 * wal.calm_bytes)
        lines.append(
            f"after each, whole pages are written; with max_wal_size = {enough} it is {size(wal.calm_bytes)}"
        )
    room = size(table.heap_bytes + table.index_bytes)
    return [
        ("WAL", lines),
        ("disk", [f"up to {room} more for table and indexes, and the WAL; the free space is unknown"]),
    ]


def _others(findings: Findings) -> list[tuple[str, list[str]]]:
    server = findings.server
    log = (
        f"WILL SHOW new values ({', '.join(server.log_settings)}): set log_parameter_max_length = 0"
        if server.log_settings
        else "shows no values, except those of rows that a constraint rejects"
    )
    return [
        ("replicas", list(server.replicas) or ["none"]),
        ("slots", list(server.slots) or ["none"]),
        ("archiving", [server.archiving or "off"]),
        ("VACUUM", [f"blocked by {holder}" for holder in server.holders] or ["nothing blocks VACUUM"]),
        ("server log", [log]),
    ]


def _run(findings: Findings) -> list[tuple[str, list[str]]]:
    sample, seconds = findings.sample, findings.estimated_seconds
    if seconds is not None:
        time = (
            f"about {duration(seconds)} with {plural(findings.concurrency, 'worker')}: {count(sample.rows)} "
            f"rows were rewritten at {rate(sample.rows_per_second)} rows/s and rolled back"
        )
    elif sample.skipped:
        time = f"not measured: {sample.skipped}"
    else:
        time = "not measured; --dry-run without --no-sample measures it"
    durability = [
        "a crash loses a range and its checkpoint together or neither (synchronous_commit = off);",
        "completion waits until all of them are on disk",
    ]
    bypassed = ["; ".join(findings.bypassed)] if findings.bypassed else []
    return [("durability", durability), ("time", [time]), ("bypassed", bypassed)]
