"""Formats and sentences that all kinds of progress share."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, assert_never

from rotator import events
from rotator.options import LARGE_BATCH
from rotator.stats import State, Stats, percent_of

# Measured with 4 workers and a range of 20,000 rows.
SECONDS_PER_ROW: Final = 50e-6
LINES_NAMED: Final = 10
_KEPT_DIGITS: Final = 1000
_MOST_BYTES: Final = 10 * 1024
_MOST_HALVES: Final = 20 * 1024 - 1
_SIZE_UNITS: Final = ("kB", "MB", "GB", "TB", "PB")
_MINUTE_SECONDS: Final = 60
_HOUR_SECONDS: Final = 3600


def count(number: int) -> str:
    """Return a count with thousands separators, e.g. ``1,000,000``."""
    return f"{number:,}"


def about(number: int, *, is_exact: bool) -> str:
    """Return a count, with ``about`` before an estimate."""
    return count(number) if is_exact else f"about {count(number)}"


def plural(number: int, noun: str, *, is_exact: bool = True) -> str:
    """Return a count with its noun, e.g. ``1 row``, ``about 2,000 rows``, ``3 retries`` or ``4 indexes``."""
    nouns = f"{noun}es" if noun.endswith("x") else f"{noun}s"
    if noun.endswith("ry"):
        nouns = f"{noun.removesuffix('y')}ies"
    return f"{about(number, is_exact=is_exact)} {noun if number == 1 else nouns}"


def duration(seconds: float) -> str:
    """Return a duration, e.g. ``0.4 s``, ``3 s``, ``2 min 05 s`` or ``1 h 12 min``."""
    if 0 < round(seconds, 1) < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE_SECONDS:
        return f"{whole} s"
    if whole < _HOUR_SECONDS:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / _MINUTE_SECONDS)
    return f"{minutes // 60} h {minutes % 60:02} min"


def rate(rows_per_second: float) -> str:
    """Return a rate without its unit, with its significant digits, e.g. ``25,100`` or ``3.2``."""
    if 0 < rows_per_second < 10:  # noqa: PLR2004 - below it a whole number is too coarse
        return f"{rows_per_second:.1f}"
    whole = round(rows_per_second)
    unit = 1
    while whole // unit >= _KEPT_DIGITS:
        unit *= 10
    return count(round(whole / unit) * unit)


def size(number_of_bytes: int) -> str:
    """Return an amount of memory as PostgreSQL's ``pg_size_pretty`` does, e.g. ``52 MB``."""
    if number_of_bytes < _MOST_BYTES:
        return f"{number_of_bytes} bytes"
    # The server halves last too, so that a half is rounded up.
    halves = number_of_bytes >> 9
    unit, *larger_units = _SIZE_UNITS
    while halves >= _MOST_HALVES and larger_units:
        halves >>= 10
        unit, *larger_units = larger_units
    return f"{(halves + 1) // 2} {unit}"


def moment(at: datetime) -> str:
    """Return a time in UTC and to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def one_line(text: str) -> str:
    """Return the text without line ends and control characters, which names and reasons may contain."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def fact_lines(facts: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each pair of a label and a text that is not empty."""
    return [f"  {label:<12} {one_line(text)}" for label, text in facts if text]


GUARD_EFFECTS: Final = {
    "refuse": "a write of an old value fails",
    "keep": "an update with an old value keeps the newer one, and an insert of an old value fails",
}
HIDDEN: Final = "(hidden: it can contain keys)"
OLD_STATISTICS: Final = "the statistics in pg_stats may still hold old values"
REJECTED_ROWS_NAMED: Final = 20
HOLDERS_NAMED: Final = 5
ACTIVITIES: Final[dict[State, str]] = {
    "draining": "draining ranges in flight",
    "confirming": "confirming rows",
    "vacuuming": "vacuuming",
    "reindexing": "rebuilding indexes",
    "finishing": "finishing",
    "loading": "loading the ledger",
    "verifying": "searching for old values",
}


def notice(event: events.Event, stats: Stats) -> str:
    """Return the line for a notable event, with the figures before it; empty for any other event."""
    return one_line(_notice(event, stats))


def _notice(event: events.Event, stats: Stats) -> str:  # noqa: C901, PLR0911, PLR0912 - one case for each event
    match event:
        case events.RotationStarted():
            return _started(event)
        case events.RangeRetried():
            parts = " in two parts" if event.split else ""
            line = f"a range of {plural(event.rows, 'row')} is retried{parts}: {event.reason}"
            return "" if event.reason in stats.retry_reasons else line
        case events.RowRejected() if len(stats.rejected_keys) < REJECTED_ROWS_NAMED:
            return f"row {event.key} is rejected: {event.reason}"
        case events.RowRejected() if len(stats.rejected_keys) == REJECTED_ROWS_NAMED:
            return "more rows are rejected; from now on they are only counted"
        case events.OutageStarted():
            return f"outage: {event.reason.rstrip('.')}; waiting for up to {duration(event.budget_seconds)}"
        case events.OutageEnded():
            return (
                f"the server is reachable again after {duration(event.seconds)}: "
                f"{plural(event.rows_done, 'row')} confirmed by checkpoints"
            )
        case events.BrokerUnreachable():
            return f"{event.reason.rstrip('.')}; workers that run continue, and no others are started"
        case events.WorkersSilent():
            return (
                f"no progress by Celery workers for {duration(event.seconds)}: "
                "check that they run and that they reach the broker and the database. Another message is sent"
            )
        case events.OwnerWatched():
            return (
                f"another process owns this rotation: {event.owner}; "
                f"watching its heartbeat for up to {duration(event.seconds)}"
            )
        case events.ServerLogShowsValues():
            return (
                f"warning: the server will log the new values, because of {', '.join(event.settings)}: "
                "set log_parameter_max_length = 0 for this role"
            )
        case events.LateCommitsAwaited() if event.holders != stats.holders:
            left = len(event.holders) - HOLDERS_NAMED
            more = f"; and {count(left)} more" if left > 0 else ""
            return (
                f"waiting for {plural(len(event.holders), 'transaction')} older than the rotation, "
                f"which may still commit rows: {'; '.join(event.holders[:HOLDERS_NAMED])}{more}"
            )
        case events.LateRowsRotated():
            noun = "row" if stats.leaked else "late row"
            return f"rotated {plural(event.rows, noun)}"
        case events.LeakedValuesFound():
            return leaked_values(event)
        case events.RowsConfirmed():
            return unconfirmed(event.unconfirmed)
        case events.VacuumStarted():
            return "all rows are rotated; running the final VACUUM (Ctrl-C skips it)"
        case events.VacuumSkipped():
            what = "skipped one VACUUM" if event.is_once else "the table is not vacuumed"
            return f"{what}: {event.reason.rstrip('.')}"
        case events.AnalyzeSkipped():
            return f"{OLD_STATISTICS}: {event.reason.rstrip('.')}. Run: {event.statement}"
        case events.ReindexStarted():
            indexes = plural(event.indexes, "index")
            return f"rebuilding {indexes} (Ctrl-C stops this; the rotation stays completed)"
        case events.IndexRebuilt():
            return (
                f"rebuilt {event.name} in {duration(event.seconds)}: "
                f"{size(event.bytes_before)} before, {size(event.bytes_now)} now"
            )
        case events.ReindexSkipped():
            return f"{event.name or 'the indexes'} not rebuilt: {event.reason.rstrip('.')}"
        case events.ReceiverFailed():
            return (
                f"warning: the receiver {event.receiver} raised {event.error}; the rotation continues, and "
                "the receiver is called for the next ranges"
            )
        case events.LimitRaised():
            return (
                f"planning the update takes {duration(event.planning_seconds)} because of "
                f"{plural(event.partitions, 'partition')}; "
                f"the time limit of a range is {duration(event.statement_seconds)}"
            )
        case events.LockHeld():
            return waiting_for_locks(event.holders) if event.is_new else ""
        case events.PaceChanged():
            return pace(event) if event.is_new else ""
        case events.Throttled():
            return f"throttled: {event.reason}; no new ranges start" if event.is_new else ""
        case events.ThrottleEnded():
            return f"throttle ended after {duration(event.seconds)}: {event.reason}"
        case events.LimitsChanged():
            return (
                f"limits changed by {event.by}: {plural(event.concurrency, 'worker')}, "
                f"{plural(event.batch, 'row')} a range"
            )
        case events.HorizonHeld():
            return (
                "VACUUM cannot remove dead rows until these end or advance: "
                f"{'; '.join(event.holders[:HOLDERS_NAMED])}"
            )
        case events.LedgerStarted():
            return "loading the ledger: no row is rotated before each old value has its digest in it"
        case events.LedgerReady():
            return (
                f"the ledger is complete after {duration(event.seconds)}; "
                f"{plural(event.control_rows, 'sampled row')} searched for, and all of them found"
            )
        case events.GuardAdded():
            return f"added the guard: {GUARD_EFFECTS[event.action]}"
        case events.VerificationStarted():
            before = f", after {plural(event.rows, 'row')} of an interrupted search" if event.rows else ""
            return f"searching the table for old values{before}"
        case events.DrainStarted():
            cause = stopped_by(event.reason, event.by) if event.by else event.reason
            return f"{cause}: draining; ranges in flight are committed, and no new ones start"
        case (
            events.Preflighted()
            | events.RangeCompleted()
            | events.WorkersProgressed()
            | events.RangeDeferred()
            | events.RowRejected()
            | events.LateCommitsAwaited()
            | events.LateCommitsOver()
            | events.ConfirmationStarted()
            | events.Vacuumed()
            | events.Analyzed()
            | events.LedgerProgressed()
            | events.VerificationProgressed()
            | events.Verified()
            | events.Tick()
            | events.RotationStopped()
        ):
            return ""
        case _:
            assert_never(event)


def _started(event: events.RotationStarted) -> str:
    name = f"rotation {event.rotation} of {event.target}"
    rows = plural(event.rows_total, "row", is_exact=event.rows_total_is_exact)
    if event.stopped_at is not None:
        return (
            f"{name} resumes: {count(event.rows_done)} of {rows} were done in "
            f"{duration(event.seconds_before)} when it stopped at {moment(event.stopped_at)}"
        )
    text = (
        f"{name} starts: {rows}, {plural(event.concurrency, 'worker')}, {plural(event.batch, 'row')} a range"
    )
    if event.batch > LARGE_BATCH:
        seconds = duration(event.batch * SECONDS_PER_ROW)
        text += (
            f"; warning: with ranges of this size, writers of the same rows may wait for {seconds} or more"
        )
    return text


def waiting_for_locks(holders: tuple[str, ...]) -> str:
    """Return the phrase for the sessions that block ranges; empty where there are none."""
    return (
        f"waiting for locks that other sessions hold: {'; '.join(holders[:HOLDERS_NAMED])}" if holders else ""
    )


def pace(event: events.PaceChanged) -> str:
    """Return the pace, what it allows now and why."""
    return (
        f"pace {event.pace}: {event.workers} of {plural(event.concurrency, 'worker')} × "  # noqa: RUF001 - a sign
        f"{plural(event.rows, 'row')}, {event.reason}"
    )


def activity(stats: Stats) -> str:
    """Return the activity of a run that does not rotate ranges now, or an empty text."""
    if stats.outage_since is not None and stats.outage_left_seconds is not None:
        unreachable = duration(stats.clock() - stats.outage_since)
        return f"unreachable {unreachable}, {duration(stats.outage_left_seconds)} left"
    if stats.state == "throttled":
        return throttled(stats)[0]
    if stats.state == "late_commits":
        return f"waiting for {plural(len(stats.holders), 'transaction')}"
    if stats.state == "loading" and stats.rows_total:
        percent = percent_of(stats.loaded_rows, stats.rows_total, is_exact=stats.rows_total_is_exact)
        return f"{ACTIVITIES['loading']}: {percent}%"
    return ACTIVITIES.get(stats.state, "")


def throttled(stats: Stats) -> list[str]:
    """Return the texts for a run that is throttled now, the longest first."""
    so_far = f"throttled {duration(stats.held_seconds)} so far"
    full = f"{so_far} ({'; '.join(stats.throttles.values())})"
    if stats.eta_seconds is not None:
        full = f"ETA {duration(stats.eta_seconds)} at the current rate; {full}"
    return [full, so_far, "throttled"]


def unconfirmed(rows: int | None) -> str:
    """Return the phrase for rows that other sessions wrote last; empty where there are none."""
    if not rows:
        return ""
    return f"{plural(rows, 'row')} not confirmed: written by other sessions or triggers since the start"


def leaked_values(event: events.LeakedValuesFound) -> str:
    """Return the sentence on the leaked values that rows have, with the first of their lines."""
    named = event.found_lines[:LINES_NAMED]
    more = ", and more" if len(event.found_lines) > len(named) else ""
    lines = f" (line {', '.join(named)}{more})" if named else ""
    return f"{count(event.found)} of {plural(event.values, 'leaked value')} found in rows{lines}"


def done_of_total(rows: int, total: int, *, is_exact: bool) -> str:
    """Return the rows done and the total, e.g. ``412,000 of about 1,000,000``."""
    # Rows that are added while the rotation runs do not exceed an exact total.
    return f"{count(min(rows, total) if is_exact else rows)} of {about(total, is_exact=is_exact)}"


def progress_rows(stats: Stats) -> str:
    """Return the rows done and the total of a run."""
    return done_of_total(stats.rows_done, stats.rows_total, is_exact=stats.rows_total_is_exact)


def stopped_by(reason: events.StopReason | None, by: str = "") -> str:
    """Return the reason of a stop as a phrase, e.g. ``stopped by --stop-after`` or ``cancelled by USER``."""
    if reason is events.StopReason.CANCEL and by:
        return f"cancelled by {by}"
    return f"stopped by {reason}" if reason else ""
