"""The preflight report as text."""

from rotator.events import Copies, CopyKind, Findings, estimate_wal
from rotator.progress.text import count, duration, plural, rate, size

_INDEXES_NAMED = 4
_NOT_CONFIRMED = "are reported as not confirmed"
_CANNOT_BE_UNDONE = (
    "there is no way back to the old values, and whoever holds one is locked out at once;",
    "they survive in WAL, backups, replicas and caches, and in dead rows until a VACUUM;",
    "auto_now, history tables and the signals of save() are bypassed;",
    "a save() of an object that the application loaded before writes an old value back.",
)


def preflight(findings: Findings) -> str:
    """Return the findings as text of several lines, without a final line end."""
    lines = [f"Before the first write to {findings.target} in the database '{findings.database}':"]
    for label, values in (*_table(findings), *_disk(findings), *_others(findings), *_run(findings)):
        # Without a label where the one before goes on.
        lines += [f"  {label if not at else '':<12} {value}" for at, value in enumerate(values)]
    lines.append("What no tool can undo:")
    lines += [f"  - {sentence}" for sentence in _CANNOT_BE_UNDONE]
    return "\n".join(lines)


def _table(findings: Findings) -> list[tuple[str, list[str]]]:
    table = findings.table
    rows = f"{count(table.rows)} counted" if table.rows_is_exact else f"about {count(table.rows)} (estimate)"
    if findings.unfinished is not None:
        rows += f"; rotation {findings.unfinished} goes on, with about {count(findings.rows_left)} left"
    named = [f"{index.name} {size(index.size_bytes)}" for index in table.indexes[:_INDEXES_NAMED]]
    if len(table.indexes) > _INDEXES_NAMED:
        named.append(f"{count(len(table.indexes) - _INDEXES_NAMED)} more")
    touched = (
        "untouched where a page has room, since none holds the column: "
        if table.is_not_indexed
        else f"each update writes to {'all ' + str(len(table.indexes)) if named[1:] else 'the one'}: "
    )
    lines = [
        ("server", [findings.server_name]),
        ("rows", [rows]),
        *([("chosen by", [findings.selection])] if findings.selection else []),
        (
            "table",
            [f"{findings.table_name}: {size(table.heap_bytes)}, its indexes {size(table.index_bytes)}"],
        ),
        (
            "indexes",
            [touched, *(f"  {name}" for name in named)] if named[2:] else [touched + ", ".join(named)],
        ),
    ]
    lines += _kept(findings)
    if table.copies:
        lines.append(("copies", [phrase for copies in table.copies for phrase in _copies(copies)]))
    lines += [("warning", [warning]) for warning in findings.warnings]
    if table.triggers:
        lines.append(("triggers", [f"each update fires {', '.join(table.triggers)}"]))
    if table.writing_triggers:
        lines.append(
            (
                "warning",
                [f"the triggers {', '.join(table.writing_triggers)} write to it: such rows", _NOT_CONFIRMED],
            )
        )
    if table.subscriptions:
        lines.append(
            (
                "warning",
                [
                    f"the subscriptions {', '.join(table.subscriptions)} write to it:",
                    f"disable them, or old values can come back; such rows {_NOT_CONFIRMED}",
                ],
            )
        )
    if table.refusing_publications:
        publications = ", ".join(table.refusing_publications)
        lines.append(
            (
                "published",
                [f"by {publications} WITHOUT A REPLICA IDENTITY: the server will refuse; give it one"],
            )
        )
    return lines


def _kept(findings: Findings) -> list[tuple[str, list[str]]]:
    """Return what is said of the rows that get no new value."""
    kept = findings.table.kept
    if kept is None:
        return [("kept", ["values that are NULL or blank; they could not be counted in time"])]
    lines = []
    for values in kept:
        if values.null:
            lines.append(f"{values.column} stays NULL in {plural(values.null, 'row')} without --include-null")
        if values.blank:
            lines.append(
                f"{values.column} stays blank in {plural(values.blank, 'row')} without --include-blank"
            )
    return [("kept", lines)] if lines else []


_COPIES: dict[CopyKind, str] = {
    "trigger": "  a trigger of the table writes the new values there, too; old values stay there",
    "history": "  a history: old values stay there, and a revert restores them",
    "schema": "  the same table in another schema, of another tenant perhaps: rotate it there, too",
    "name": "  a column of the same name: if its values are copies, rotate them, too",
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
            f"after each, pages are written whole: with max_wal_size at {enough} it is {size(wal.calm_bytes)}"
        )
    room = size(table.heap_bytes + table.index_bytes)
    return [
        ("WAL", lines),
        ("disk", [f"up to {room} more for the table, and the WAL; the server cannot tell what is free"]),
    ]


def _others(findings: Findings) -> list[tuple[str, list[str]]]:
    server = findings.server
    log = (
        f"WILL SHOW new values ({', '.join(server.log_settings)}): set log_parameter_max_length = 0"
        if server.log_settings
        else "shows no values, but for rows that a constraint refuses: those it quotes whole"
    )
    return [
        ("replicas", list(server.replicas) or ["none"]),
        ("slots", list(server.slots) or ["none"]),
        ("archiving", [server.archiving or "off"]),
        (
            "held back",
            [f"by {holder}" for holder in server.holders] or ["nothing keeps VACUUM from old rows"],
        ),
        ("server log", [log]),
    ]


def _run(findings: Findings) -> list[tuple[str, list[str]]]:
    sample, seconds = findings.sample, findings.estimated_seconds
    if seconds is not None:
        time = (
            f"about {duration(seconds)} with {plural(findings.concurrency, 'worker')}: {count(sample.rows)} "
            f"rows were rewritten at {rate(sample.rows_per_second)} rows/s, and rolled back"
        )
    else:
        time = (
            f"not measured: {sample.skipped}"
            if sample.skipped
            else "not measured; --dry-run without --no-sample measures it"
        )
    lines = [
        (
            "durability",
            ["a range and its checkpoint survive a crash together or not at all, without waiting for"],
        ),
        ("", ["the disk (synchronous_commit = off); completion waits for it, and so vouches for all"]),
        ("time", [time]),
    ]
    if findings.bypassed:
        lines.append(("bypassed", ["; ".join(findings.bypassed)]))
    return lines
