"""The results of a run and of a verification, as text and as JSON."""

from dataclasses import asdict, fields
from typing import Final

from rotator.events import Controls, Coverage, RotationStopped, Verified
from rotator.progress.text import (
    OLD_STATISTICS,
    REJECTED_ROWS_NAMED,
    about,
    count,
    done_of_total,
    duration,
    fact_lines,
    leaked_values,
    one_line,
    plural,
    rate,
    size,
    stopped_by,
    unconfirmed,
)

SPANS_NAMED: Final = 5
KEYS_NAMED: Final = 20
STATEMENTS_SHOWN: Final = 10
# The report has them in another form, except for superseded.
_NOT_REPORTED: Final = ("storage_before", "storage", "run", "stop_reason", "cancelled_by", "superseded")


def report(event: RotationStopped) -> dict[str, object]:
    """Return the account of a run as JSON types; these keys are an interface and only ever added to.

    Seconds are rounded to a thousandth. A ``key`` is the server's own text of a JSON array. Sizes are null
    where the server was unreachable.
    """
    figures = {each.name: getattr(event, each.name) for each in fields(event)}
    before, now, run = event.storage_before, event.storage, event.run
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
        if name not in _NOT_REPORTED
    } | {
        "throttled_seconds": {name: round(s, 3) for name, s in event.throttled_seconds.items()},
        "heap_bytes_before": before and before.heap_bytes,
        "heap_bytes": now and now.heap_bytes,
        "index_bytes_before": before and before.index_bytes,
        "index_bytes": now and now.index_bytes,
        "dead_rows": now and now.dead_rows,
        "rejected_keys": [{"key": key, "reason": reason} for key, reason in event.rejected_keys],
        "reason": stopped_by(event.stop_reason, event.cancelled_by),
        "spans": [asdict(span) for span in event.spans],
        "indexes": [
            {"name": name, "bytes_before": bytes_before, "bytes": bytes_now}
            for name, bytes_before, bytes_now in _indexes(event)
        ],
        "reindex_statements": list(event.reindex_statements),
        "unchanged_rows": event.table_rows and max(0, event.table_rows - event.rows),
        "started_at": run.started_at.isoformat(timespec="milliseconds"),
        "ended_at": run.ended_at.isoformat(timespec="milliseconds"),
        "user": run.user,
        "host": run.host,
        "server": run.server_name,
        "table": run.table_name,
        "filters": list(run.selection.filters),
        "excludes": list(run.selection.excludes),
        "generator": run.selection.generator,
        "include_null": run.selection.include_null,
        "verification": event.verification and verification_report(event.verification),
        "leaked": event.leaked and asdict(event.leaked),
    }


def _indexes(event: RotationStopped) -> list[tuple[str, int | None, int]]:
    """Return the name of each index with its size before the run, where it is known, and now."""
    earlier = event.storage_before.indexes if event.storage_before else ()
    before = {index.name: index.size_bytes for index in earlier}
    indexes = event.storage.indexes if event.storage else ()
    return [(index.name, before.get(index.name), index.size_bytes) for index in indexes]


def summary(event: RotationStopped, *, resume_command: str | None = None) -> str:
    """Return the summary as text of several lines, without a final line end.

    The command that resumes the rotation is shown where it is unfinished and no other process owns it.
    """
    lines = [verdict(event)]
    if event.stop_reason:
        reason = stopped_by(event.stop_reason, event.cancelled_by)
        lines.append(one_line(f"{reason[0].upper()}{reason[1:]}."))
    if event.error:
        lines.append(one_line(event.error))
    lines += fact_lines(_facts(event))
    if event.rejected_keys:
        lines += _rejected(event)
    if event.analyze_statement:
        lines.append(f"{OLD_STATISTICS[0].upper()}{OLD_STATISTICS[1:]}. Run: {event.analyze_statement}")
    if event.reindex_statements:
        lines += _reindex(event)
    if event.leaked is not None and event.status == "completed" and event.rows:
        lines.append(
            "A rotation of all rows gives these rows another new value, unless a filter excludes them."
        )
    if event.verification is not None:
        lines.append(verification_summary(event.verification))
    if resume_command and event.status != "completed" and not event.superseded:
        lines.append(f"Resume with: {resume_command}")
    return "\n".join(lines)


def verdict(event: RotationStopped) -> str:
    """Return the result of the run in one sentence."""
    if event.status == "completed":
        rejected = len(event.rejected_keys)
        exception = f", except {plural(rejected, 'rejected row')}" if rejected else ""
        not_confirmed = f"; {unconfirmed(event.unconfirmed_rows)}" if event.unconfirmed_rows else ""
        unchanged = unchanged_rows(event)
        return (
            f"Completed: rotation {event.rotation} gave {plural(event.rows, 'row')} of {event.target} "
            f"a new value{exception}{not_confirmed}.{f' {unchanged}.' if unchanged else ''}"
        )
    if event.superseded:
        return (
            f"Superseded: this run gave {plural(event.rows_this_run, 'row')} of {event.target} a new value. "
            f"Another process owns rotation {event.rotation} now."
        )
    rows = done_of_total(event.rows, event.rows_total, is_exact=event.rows_total_is_exact)
    return (
        f"{event.status.capitalize()}: rotation {event.rotation} of {event.target} is unfinished; "
        f"{rows} row{'s' * (event.rows_total != 1)} have a new value."
    )


def unchanged_rows(event: RotationStopped) -> str:
    """Return a clause on the rows that a filter left unchanged; empty without a filter."""
    selection = event.run.selection
    if not selection.is_filtered:
        return ""
    if selection.leaked:
        return f"{plural(event.rows, 'row')} had a leaked value; all others were left unchanged"
    if event.table_rows is None:
        return f"{plural(event.rows, 'row')} match the filter; all others were left unchanged"
    is_exact, table_rows = event.table_rows_is_exact, max(event.rows, event.table_rows)
    return (
        f"{count(event.rows)} of {plural(table_rows, 'row', is_exact=is_exact)} match the filter; "
        f"{about(table_rows - event.rows, is_exact=is_exact)} were left unchanged"
    )


def _keys(event: RotationStopped) -> str:
    first = event.spans[0]
    if event.spans[1:] or first.after is not None:
        named = ", ".join(str(span) for span in event.spans[:SPANS_NAMED])
        more = len(event.spans) - SPANS_NAMED
        return f"{named}, and {count(more)} more" if more > 0 else named
    return f"up to {first.through}"


def _facts(event: RotationStopped) -> list[tuple[str, str]]:
    rows, seconds = count(event.rows_this_run), duration(event.seconds)
    if event.resumed:
        rows = f"{rows} in this run, {count(event.rows)} in total"
        seconds = f"{seconds} in this run, {duration(event.seconds_total)} in total"
    if event.late_rows and event.leaked is None:
        rows = f"{rows}; {plural(event.late_rows, 'late row')} among them"
    ranges = f"{count(event.ranges)} of up to {plural(event.batch, 'row')}"
    speed = f"{rate(event.rows_per_second)} rows/s while writing"
    throttles = event.throttled_seconds.items()
    leaked = leaked_values(event.leaked) if event.leaked else ""
    if event.leaked and event.rows > event.rows_this_run:
        leaked += "; earlier runs rotated rows, too"
    pace = event.pace
    if event.limited_seconds:
        pace += f"; limited for {duration(event.limited_seconds)}: other sessions were at work"
    return [
        ("rows", rows),
        ("leaked", leaked),
        ("keys", one_line(_keys(event)) if event.spans else ""),
        ("ranges", "" if event.leaked else ranges),
        ("workers", count(event.concurrency)),
        ("pace", pace),
        ("time", seconds),
        ("rate", "" if event.leaked else speed),
        ("deferrals", count(event.deferrals)),
        ("retries", count(event.retries)),
        ("unreachable", duration(event.outage_seconds) if event.outage_seconds > 0 else ""),
        *(("throttled", f"{duration(seconds)} by {name}") for name, seconds in throttles),
        *_disk(event),
        ("peak memory", size(event.peak_memory_bytes) if event.peak_memory_bytes else ""),
    ]


def _disk(event: RotationStopped) -> list[tuple[str, str]]:
    before, now = event.storage_before, event.storage
    if before is None or now is None:
        return []
    vacuums = f"{plural(event.vacuums, 'time')}, {duration(event.vacuum_seconds)}"
    return [
        ("heap", _growth(before.heap_bytes, now.heap_bytes)),
        ("indexes", _growth(before.index_bytes, now.index_bytes)),
        ("dead rows", f"about {count(now.dead_rows)}"),
        ("vacuumed", vacuums if event.vacuums else ""),
    ]


def _growth(before_bytes: int, now_bytes: int) -> str:
    percent = f" ({now_bytes / before_bytes - 1:+.0%})" if before_bytes else ""
    return f"{size(before_bytes)} before, {size(now_bytes)} now{percent}"


def _reindex(event: RotationStopped) -> list[str]:
    """Return the statements that make the indexes smaller, and what they need."""
    largest = max((bytes_now for _, _, bytes_now in _indexes(event)), default=0)
    shown = event.reindex_statements[:STATEMENTS_SHOWN]
    lines = [
        (
            "Rebuild the indexes with --reindex and the same command, or with the statements below, one at a "
            "time. This blocks no reads or writes, and needs free disk space for a copy of an index (at most "
            f"{size(largest)})."
        ),
        *(f"  {statement}{_growth_of_index(event, statement)}" for statement in shown),
    ]
    if (more := len(event.reindex_statements) - STATEMENTS_SHOWN) > 0:
        lines.append(f"  and {plural(more, 'more statement')}; the report has all of them")
    return lines


def _growth_of_index(event: RotationStopped, statement: str) -> str:
    """Return the growth of a statement's index as a comment; empty where it is unknown."""
    for name, bytes_before, bytes_now in _indexes(event):
        if bytes_before is not None and statement.endswith(f" {name};"):
            return f" -- {_growth(bytes_before, bytes_now)}"
    return ""


def _rejected(event: RotationStopped) -> list[str]:
    keys = event.rejected_keys
    lines = [f"{plural(len(keys), 'row')} rejected by the server:"]
    lines += [f"  row {key}: {one_line(reason)}" for key, reason in keys[:REJECTED_ROWS_NAMED]]
    if len(keys) > REJECTED_ROWS_NAMED:
        lines.append(f"  and {count(len(keys) - REJECTED_ROWS_NAMED)} more")
    return lines


def verification_report(event: Verified) -> dict[str, object]:
    """Return a verification as JSON types; these keys are an interface and only ever added to."""
    return {"result": verification_verdict(event), **event.to_json()}


def verification_summary(event: Verified) -> str:
    """Return the result as text of several lines, without a final line end."""
    facts = _covered(event.coverage) if event.coverage else []
    if event.survivors is None:
        facts.append(("survivors", "unknown"))
    else:
        facts += [
            ("searched", plural(event.rows, "row")),
            ("survivors", _survivors(event)),
            ("false hits", f"{event.false_matches:.1g} expected among them, by chance"),
        ]
    vacuumed = f"{event.vacuumed_at}, about {count(event.dead_rows)} dead rows now"
    facts += [
        ("repaired", plural(event.repaired, "row") if event.repaired else ""),
        ("controls", _controlled(event.controls) if event.controls else ""),
        ("guard", f"{plural(event.guard_hits, 'write')} of old values stopped" if event.guard_hits else ""),
        ("vacuumed", vacuumed if event.vacuumed_at else ""),
    ]
    return "\n".join([verification_verdict(event), *fact_lines(facts)])


def verification_verdict(event: Verified) -> str:
    """Return the result in one sentence."""
    name = f"rotation {event.rotation} of {event.target}"
    if event.error:
        return (
            f"Not verified: the verification of {name} did not finish. {one_line(event.error)} "
            f"Run: manage.py verify_rotation {event.rotation}"
        )
    if event.controls is not None and not event.controls.have_passed:
        return f"Not verified: a control of {name} failed, so its search proves nothing."
    if event.survivors:
        return (
            f"Not verified: {plural(event.survivors, 'row')} of {event.target} "
            f"{'has' if event.survivors == 1 else 'have'} an old value of rotation {event.rotation}. "
            f"Run: manage.py verify_rotation {event.rotation} --repair"
        )
    if event.coverage is not None and not event.coverage.is_whole:
        return f"Not verified: {name} has not written every row."
    if event.survivors is None:
        return (
            f"Not verified: it is unknown whether old values of {name} have survived, because it has no "
            "ledger. Use --prove with the next rotation."
        )
    return f"Verified: no row of {event.target} has an old value of rotation {event.rotation}."


def _covered(coverage: Coverage) -> list[tuple[str, str]]:
    facts = [("status", coverage.status)]
    if coverage.unknown:
        facts.append(("written", f"unknown: {coverage.unknown}"))
    else:
        facts += [
            ("written", f"{plural(coverage.confirmed_rows or 0, 'row')} confirmed"),
            ("", unconfirmed(coverage.unconfirmed_rows)),
            ("not written", f"{plural(coverage.older_rows or 0, 'row')} since the start"),
        ]
    gaps = ", ".join(map(str, coverage.gaps[:KEYS_NAMED]))
    rejected = [f"{key}: {reason}" for key, reason in coverage.rejected_keys[:KEYS_NAMED]]
    return [
        *facts,
        ("in gaps", f"{plural(coverage.gap_rows, 'row')}{f': {gaps}' if gaps else ''}"),
        ("rejected", "; ".join([plural(len(coverage.rejected_keys), "row"), *rejected])),
        ("excluded", f"{plural(coverage.excluded_rows, 'row')} that do not match the filters now"),
        ("kept", f"{plural(coverage.null_rows, 'row')} with NULL, {count(coverage.blank_rows)} with ''"),
    ]


def _survivors(event: Verified) -> str:
    named = ", ".join(event.survivor_keys[:KEYS_NAMED])
    more = (event.survivors or 0) - min(KEYS_NAMED, len(event.survivor_keys))
    return (
        f"{plural(event.survivors or 0, 'row')}{f': {named}' if named else ''}"
        f"{f', and {count(more)} more' if more > 0 and named else ''}"
    )


def _controlled(controls: Controls) -> str:
    known = "" if controls.is_salt_right else "; the salt does NOT match the entries"
    sampled = f"{count(controls.sampled)} of {count(controls.sampled)} sampled rows found before the rotation"
    if not controls.sampled:
        sampled = "no row could be sampled before the rotation: all had changed since its start"
    return (
        f"{sampled}; "
        f"{count(controls.planted_found)} of {count(controls.planted)} planted values found; "
        f"{count(controls.entries_found)} of {count(controls.entries)} entries in the ledger{known}"
    )
