"""Formats and sentences that all kinds of progress share."""

from datetime import UTC, datetime
from typing import Final

from rotator.events import (
    BrokerUnreachable,
    DrainStarted,
    Event,
    LateCommitsAwaited,
    LateRowsRotated,
    LimitRaised,
    LockHeld,
    OutageEnded,
    OutageStarted,
    OwnerWatched,
    RangeRetried,
    ReceiverFailed,
    RotationStarted,
    RowFailed,
    RowsConfirmed,
    ServerLogShowsValues,
    StopReason,
    VacuumSkipped,
    VacuumStarted,
    WorkersSilent,
)
from rotator.stats import State, Tally

_KEPT_DIGITS = 1000
_MOST_BYTES = 10 * 1024
_MOST_HALVES = 20 * 1024 - 1
_SIZE_UNITS = ("kB", "MB", "GB", "TB", "PB")
_MINUTE_SECONDS = 60
_HOUR_SECONDS = 3600


def count(number: int) -> str:
    """Return a count with thousands separators, e.g. ``1,000,000``."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun, e.g. ``1 row`` or ``2,000 rows``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


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
    """Return a rate without its unit and with the digits that mean something, e.g. ``25,100`` or ``3.2``."""
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
    # The server halves last, so that a half is rounded up.
    halves = number_of_bytes >> 9
    for unit in _SIZE_UNITS:
        if halves < _MOST_HALVES or unit == _SIZE_UNITS[-1]:
            return f"{(halves + 1) // 2} {unit}"
        halves >>= 10
    raise AssertionError("the last unit is for every larger size")


def one_line(text: str) -> str:
    """Return the text without line ends and control characters; names and reasons come from elsewhere."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


FAILED_ROWS_NAMED = 20
HOLDERS_NAMED = 5
_ACTIVITIES: Final[dict[State, str]] = {
    "draining": "draining ranges in flight",
    "confirming": "confirming rows",
    "vacuuming": "vacuuming",
    "finishing": "finishing",
}


def notice(event: Event, tally: Tally) -> str:
    """Return the line that a notable event is worth, or an empty text.

    Args:
        event: What happened.
        tally: The figures before it happened.
    """
    match event:
        case RotationStarted():
            line = _resumed(event) if event.resumed else _started(event)
        case LateRowsRotated():
            line = f"{plural(event.rows, 'row')} that no range had written, rotated now"
        case RowsConfirmed():
            line = unconfirmed(event.unconfirmed)
        case VacuumStarted():
            line = "every row is done; vacuuming the table once more, which a stop would cut short"
        case DrainStarted():
            line = f"{event.reason}: draining, ranges in flight commit and no more are planned"
        case WorkersSilent():
            line = (
                f"no worker has done anything for {duration(event.seconds)}: are they running, and do they "
                "reach broker and database? What they should have is published again"
            )
        case BrokerUnreachable():
            line = f"{event.reason.rstrip('.')}: what workers have goes on, and the rest waits for it"
        case RangeRetried() | RowFailed() | LateCommitsAwaited():
            line = _trouble(event, tally)
        case _:
            line = _circumstances(event)
    return one_line(line)


def _circumstances(event: Event) -> str:
    """Return the line for what the server and other processes do."""
    match event:
        case OutageStarted():
            return (
                f"the server is away: {event.reason.rstrip('.')}; "
                f"waiting for up to {duration(event.budget_seconds)}"
            )
        case OutageEnded():
            return (
                f"the server is back after {duration(event.seconds)}: "
                f"its checkpoints vouch for {plural(event.rows_done, 'row')}"
            )
        case OwnerWatched():
            return (
                f"another process owns this rotation: {event.owner}; "
                f"watching its heartbeat for up to {duration(event.seconds)}"
            )
        case ServerLogShowsValues():
            return (
                f"warning: the server will log the new values, because of {', '.join(event.settings)}: "
                "set log_parameter_max_length = 0 for this role"
            )
        case VacuumSkipped():
            what = "skipped one VACUUM" if event.is_once else "the table is not vacuumed"
            return f"{what}: {event.reason.rstrip('.')}"
        case _:
            return _skip_reason(event)


def _skip_reason(event: Event) -> str:
    """Return the line for what costs time or does not work, while the rotation continues."""
    match event:
        case ReceiverFailed():
            return (
                f"warning: the receiver {event.receiver} raised {event.error}; the rotation continues, and "
                "the receiver is called for the next ranges"
            )
        case LimitRaised():
            return (
                f"planning the update takes {duration(event.planning_seconds)} because of "
                f"{plural(event.partitions, 'partition')}; "
                f"the time limit of a range is {duration(event.statement_seconds)}"
            )
        case LockHeld():
            return f"waiting for locks that other sessions hold: {'; '.join(event.holders[:HOLDERS_NAMED])}"
        case _:
            return ""


def activity(tally: Tally, now: float) -> str:
    """Return what the run is busy with instead of getting on, or an empty text while rows are being done."""
    if tally.outage_since is not None:
        away = duration(now - tally.outage_since)
        return f"unreachable {away}, {duration(tally.outage_left_seconds(now))} left"
    if tally.state == "late_commits":
        return f"waiting for {plural(len(tally.holders), 'transaction')}"
    return _ACTIVITIES.get(tally.state, "")


def unconfirmed(rows: int | None) -> str:
    """Return the phrase for rows that others wrote last; empty where there are none."""
    if not rows:
        return ""
    return f"{plural(rows, 'row')} not confirmed: written by other sessions or triggers since the start"


def done_of_total(tally: Tally) -> str:
    """Return rows done and in all, e.g. ``412,000 of about 1,000,000``."""
    about = "" if tally.rows_total_is_exact else "about "
    return f"{count(tally.rows_shown)} of {about}{count(tally.rows_total)}"


def stopped_by(reason: StopReason | None) -> str:
    """Return the reason of a stop as a phrase, e.g. ``stopped by --stop-after``; empty without one."""
    return f"stopped by {reason}" if reason else ""


def moment(at: datetime) -> str:
    """Return a time in UTC and to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _started(event: RotationStarted) -> str:
    about = "" if event.rows_total_is_exact else "about "
    return (
        f"rotation {event.rotation} of {event.target} starts: {about}{plural(event.rows_total, 'row')}, "
        f"{plural(event.concurrency, 'worker')}, {plural(event.batch, 'row')} a range"
    )


def _resumed(event: RotationStarted) -> str:
    about = "" if event.rows_total_is_exact else "about "
    stopped = moment(event.stopped_at) if event.stopped_at else "an unknown time"
    return (
        f"rotation {event.rotation} of {event.target} resumes: {count(event.rows_done)} of "
        f"{about}{plural(event.rows_total, 'row')} were done in {duration(event.seconds_before)} "
        f"when it stopped at {stopped}"
    )


def _trouble(event: RangeRetried | RowFailed | LateCommitsAwaited, tally: Tally) -> str:
    """Return the line for what keeps rows from being rotated; empty where it was told before."""
    match event:
        case RangeRetried():
            return _retried(event) if event.reason not in tally.retry_reasons else ""
        case RowFailed():
            return _failed(event, tally.failed_rows)
        case LateCommitsAwaited():
            return _awaited(event.holders) if event.holders != tally.holders else ""


def _retried(event: RangeRetried) -> str:
    part = " in two halves" if event.split else ""
    return f"a range of {plural(event.rows, 'row')} is retried{part}: {event.reason}"


def _failed(event: RowFailed, failed_before: int) -> str:
    if failed_before < FAILED_ROWS_NAMED:
        return f"key {event.key} cannot be rotated: {event.reason}"
    if failed_before == FAILED_ROWS_NAMED:
        return "more rows cannot be rotated; from here on they are only counted"
    return ""


def _awaited(holders: tuple[str, ...]) -> str:
    named = "; ".join(holders[:HOLDERS_NAMED])
    more = f"; and {count(len(holders) - HOLDERS_NAMED)} more" if len(holders) > HOLDERS_NAMED else ""
    return (
        f"waiting for {plural(len(holders), 'transaction')} older than the rotation, "
        f"which may still commit rows: {named}{more}"
    )
