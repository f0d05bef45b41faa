"""The options of a rotation: their defaults, checks and help, for the command, the API and Celery workers."""

import argparse
import inspect
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias, TypedDict

from rotator.exceptions import OptionError

Duration: TypeAlias = str | float | timedelta
"""A text such as ``100ms``, ``30s``, ``5m`` or ``2h``, a number of seconds, or a timedelta."""

GUARD_ACTIONS: Final = ("refuse", "keep")

_LOCK_SECONDS: Final = 0.1
_OUTAGE_SECONDS: Final = 300.0
# The server counts timeouts in milliseconds, and 0 means no timeout.
_MIN_SECONDS: Final = 0.001
_BYTES: Final = {"kB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
_MIN_BYTES: Final = 2**20
_MAX_BYTES: Final = 1000 * 2**40
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
# Event loops cannot wait for much longer than a year.
_MAX_WAIT: Final = "8760h"
# The milliseconds of a statement's timeout, which is five times as long, must fit into an integer.
_MAX_LOCK_TIMEOUT: Final = "24h"
# The server numbers the rows of a range by an integer.
_MAX_NUMBER: Final = 2**31 - 1


# A range of more rows makes other writers of its rows wait for long.
LARGE_BATCH: Final = 10_000
MAX_BATCH: Final = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeLimit:
    """A limit on the size of ranges.

    Attributes:
        seconds: The time on the server that a range may take.
        rows: The rows that it may have, unless most of its time does not depend on them.
    """

    seconds: float
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """A limit on what the rotation costs other sessions; latency is a multiple of a commit's baseline."""

    name: str
    latency_limit: float | None = None
    range_limit: RangeLimit | None = None


PACES: Final = {
    pace.name: pace
    for pace in (
        Pace(name="gentle", latency_limit=1.5, range_limit=RangeLimit(seconds=0.010, rows=100)),
        Pace(name="balanced", latency_limit=2.5, range_limit=RangeLimit(seconds=0.025, rows=750)),
        Pace(name="full"),
    )
}


_KINDS: Final[Mapping[object, str]] = {int: "an integer", bool: "True or False", str: "a string"}


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse a value of another type, which callers in Python can give."""
    # True and False are integers, too.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise OptionError(f"{name} must be {_KINDS[kind]}, not {type(value).__name__}.")


def check_kinds(options: "RunOptions | Selection") -> None:
    """Refuse options of another type than theirs."""
    for each in fields(options):
        if isinstance(each.type, type) and each.type in _KINDS:
            check_kind(each.name, getattr(options, each.name), each.type)


def read_strings(name: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return strings that a caller in Python gives; a single string is not a list of its characters."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise OptionError(f"{name} must be a list of strings, not {type(values).__name__}.")
    found = tuple(values)
    for value in found:
        check_kind(f"Each item of {name}", value, str)
    return found


def read_pace(name: str) -> Pace:
    """Check the value of ``--pace``, and return the pace."""
    if name not in PACES:
        raise OptionError(f"--pace must be gentle, balanced or full, not '{name}'.")
    return PACES[name]


def read_duration(name: str, value: Duration, *, maximum: str = _MAX_WAIT) -> float:
    """Check the value of an option that is a duration, and return its seconds."""
    seconds = _seconds(value)
    if seconds is None:
        raise OptionError(f"{_flag(name)} must be a duration (100ms, 30s, 5m or 2h), not '{value}'.")
    if not _MIN_SECONDS <= seconds <= (_seconds(maximum) or 0):
        raise OptionError(f"{_flag(name)} must be from 1ms to {maximum}, not '{value}'.")
    return seconds


def read_size(name: str, value: str | None) -> int | None:
    """Check the value of an option that is an amount of WAL, and return its bytes."""
    if value is None:
        return None
    check_kind(name, value, str)
    number = int(_amount(value, _BYTES) or 0)
    if not _MIN_BYTES <= number <= _MAX_BYTES:
        raise OptionError(f"{_flag(name)} must be a size from 1MB to 1000TB (500MB, 1GB), not '{value}'.")
    return number


def read_rows_or_duration(name: str, value: Duration | None) -> tuple[int | None, float | None]:
    """Check the value of an option that is a number of rows or a duration, and return rows and seconds."""
    if value is None:
        return None, None
    rows = _number(value) if isinstance(value, str) else value
    if isinstance(rows, int):
        return _in_range(name, rows), None
    if _seconds(value) is None:
        raise OptionError(
            f"{_flag(name)} must be a number of rows (5000) or a duration (90s, 30m, 2h), not '{value}'."
        )
    return None, read_duration(name, value)


def check_batch(batch: int, pace: str) -> None:
    """Refuse a number of rows in a range that costs other sessions more than the pace allows."""
    if read_pace(pace).latency_limit is not None and batch > MAX_BATCH:
        raise OptionError(
            f"--batch must be at most {MAX_BATCH:,}, not {batch}: other writers of a range's rows wait until "
            "it is committed. Choose a smaller one, or --pace full."
        )


SETTINGS: Final = ("pace", "concurrency", "batch")
"""What a user can change while a rotation runs."""


def read_setting(name: str, text: str) -> object:
    """Return the value of one of ``SETTINGS`` for the control row; ``default`` is the value of the run."""
    if name == "pace":
        return "" if text == "default" else read_pace(text).name
    if text == "default":
        return None
    number = _number(text)
    if number is None:
        raise OptionError(f"{name} must be a number or default, not '{text}'.")
    return _in_range(name, number)


def is_id(text: str) -> bool:
    """Return whether a text is the id of a row."""
    return text.isascii() and text.isdecimal()


def whole_number(text: str) -> int:
    """Return the number of an argument of a command, as ``argparse`` calls it."""
    number = _number(text.removeprefix("-"))
    if number is None:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")
    return -number if text.startswith("-") else number


def not_empty(text: str) -> str:
    """Refuse an empty argument, e.g. an unset shell variable: it would mean the same as no option."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty. Give one, or leave the option out.")
    return text


def _number(text: str) -> int | None:
    """Return the number that a text in ASCII digits means, e.g. ``5_000``; None for any other text."""
    if not re.fullmatch(r"[0-9]+(?:_[0-9]+)*", text):
        return None
    # Python reads no more than some thousand digits.
    with suppress(ValueError):
        return int(text)
    return None


def _seconds(value: Duration) -> float | None:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return _amount(value, _SECONDS) if isinstance(value, str) else None


def _amount(text: str, units: Mapping[str, float]) -> float | None:
    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(units)})", text)
    return float(found[1]) * units[found[2]] if found else None


def _duration(seconds: float) -> str:
    """Return a duration as a user writes it, in the largest unit that divides it."""
    milliseconds = round(seconds * 1000, 3)
    units = {"h": 3_600_000, "m": 60_000, "s": 1000}
    for unit, size in units.items():
        if milliseconds % size == 0:
            return f"{milliseconds // size:.0f}{unit}"
    return f"{milliseconds:.3f}".rstrip("0").rstrip(".") + "ms"


def _in_range(name: str, number: int) -> int:
    if not 1 <= number <= _MAX_NUMBER:
        raise OptionError(f"{_flag(name)} must be from 1 to {_MAX_NUMBER:,}, not {number}.")
    return number


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


DEFAULT_OPTIONS: Final = "the default options"


def known_fields(kind: type[Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that were saved as JSON, without those of a newer version."""
    # JSON has lists.
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved.items()
        if name in kind.__dataclass_fields__
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The choice of rows and values, as in :class:`rotator.api.Target`."""

    filters: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    generator: str = ""
    include_null: bool = False
    include_blank: bool = False
    # They change neither rows nor values, so a run can resume with others.
    ignore_derived: tuple[str, ...] = field(default=(), compare=False)
    leaked: str = ""
    leaked_column: str = ""

    @property
    def is_filtered(self) -> bool:
        """Whether the rotation leaves out some rows of the table."""
        return bool(self.filters or self.excludes or self.leaked)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Selection":
        """Return the selection that :meth:`to_json` of this version, or another one, has saved."""
        return cls(**known_fields(cls, saved))

    def to_json(self) -> dict[str, Any]:
        """Return the selection as JSON types, for the rotation's row."""
        return asdict(self)

    def without_values(self) -> "Selection":
        """Return it with the lookups alone, since their values may be secrets or name persons."""
        filters, excludes = (
            tuple(text.partition("=")[0] for text in texts) for texts in (self.filters, self.excludes)
        )
        return replace(self, filters=filters, excludes=excludes)

    def __str__(self) -> str:
        """Return the options of the command that choose the same; a phrase where there are none."""
        others = {each.name: getattr(self, each.name) for each in fields(self)}
        lookups = {"filter": others.pop("filters"), "exclude": others.pop("excludes")}
        return _command_line(lookups | others)


def _command_line(options: Mapping[str, bool | str | Sequence[str]]) -> str:
    """Return options as the user writes them, without those that are not set; a phrase where none is left."""
    words = list[str]()
    for name, value in options.items():
        match value:
            case bool():
                words += [_flag(name)] if value else []
            case str():
                words += [_flag(name), value] if value else []
            case _:
                words += [word for each in value for word in (_flag(name), each)]
    return shlex.join(words) or DEFAULT_OPTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitLimits:
    """The limits of a range's transaction, which may block the application.

    Attributes:
        lock_seconds: The longest wait for one lock; well below the server's ``deadlock_timeout``, so that
            the application never gets a deadlock error.
        statement_seconds: The longest time for the update of a slice, waits included.
        transaction_seconds: The age of the transaction after which no more slices are updated; so the
            transaction holds its rows for at most this time and ``statement_seconds``.
    """

    lock_seconds: float = _LOCK_SECONDS
    statement_seconds: float = 5 * _LOCK_SECONDS
    transaction_seconds: float = 20 * _LOCK_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """The options of one run: those of the command, checked, and some for other callers.

    Attributes:
        rotation: The id of the only rotation to resume; None for the target's unfinished one, or a new one.
        after: The id of the completed rotation that a new one may repeat; None for no rotation.
        guard: ``refuse`` or ``keep``; empty for no guard.
        preflight: Whether to report on table and server before a new rotation begins.
        sample: Whether to measure the speed for that report, by ranges that are rolled back.
        celery: Whether the command has --celery; only for the command that resumes the rotation.
        listens_to_signals: Whether SIGINT, SIGTERM and SIGHUP stop the run; else the caller handles them.
    """

    concurrency: int = 4
    batch: int = 2000
    pace: str = "balanced"
    rotation: int | None = None
    restart: bool = False
    after: int | None = None
    take_over: bool = False
    stop_after_rows: int | None = None
    stop_after_seconds: float | None = None
    outage_budget_seconds: float = _OUTAGE_SECONDS
    vacuum: bool = True
    reindex: bool = False
    prove: bool = False
    guard: str = ""
    preflight: bool = False
    sample: bool = False
    limits: WaitLimits = field(default_factory=WaitLimits)
    max_lag_seconds: float | None = None
    lag_of: tuple[str, ...] = ()
    max_unarchived_wal_bytes: int | None = None
    max_slot_wal_bytes: int | None = None
    celery: bool = False
    listens_to_signals: bool = True

    @classmethod
    def checked(
        cls,
        *,
        lock_timeout: Duration = _LOCK_SECONDS,
        outage_budget: Duration = _OUTAGE_SECONDS,
        stop_after: Duration | None = None,
        max_lag: Duration | None = None,
        lag_of: Sequence[str] = (),
        max_unarchived_wal: str | None = None,
        max_slot_wal: str | None = None,
        **options: Any,  # noqa: ANN401 - fields of this class
    ) -> "RunOptions":
        """Check options as a user writes them, and return those of the run."""
        rows, seconds = read_rows_or_duration("stop_after", stop_after)
        lock_seconds = read_duration("lock_timeout", lock_timeout, maximum=_MAX_LOCK_TIMEOUT)
        if (max_lag is None) != (not lag_of):
            raise OptionError("--max-lag and --lag-of belong together: --max-lag 10s --lag-of replica.")
        checked = cls(
            max_lag_seconds=None if max_lag is None else read_duration("max_lag", max_lag),
            lag_of=read_strings("lag_of", lag_of),
            max_unarchived_wal_bytes=read_size("max_unarchived_wal", max_unarchived_wal),
            max_slot_wal_bytes=read_size("max_slot_wal", max_slot_wal),
            limits=WaitLimits(
                lock_seconds=lock_seconds,
                statement_seconds=5 * lock_seconds,
                transaction_seconds=20 * lock_seconds,
            ),
            outage_budget_seconds=read_duration("outage_budget", outage_budget),
            stop_after_rows=rows,
            stop_after_seconds=seconds,
            **options,
        )
        check_kinds(checked)
        _in_range("concurrency", checked.concurrency)
        _in_range("batch", checked.batch)
        check_batch(checked.batch, checked.pace)
        if checked.guard not in ("", *GUARD_ACTIONS):
            raise OptionError(f"--guard must be {' or '.join(GUARD_ACTIONS)}, not '{checked.guard}'.")
        if checked.guard and not checked.prove:
            raise OptionError("--guard compares new values with the ledger. Use it with --prove.")
        return checked

    def for_next_run(self) -> "RunOptions":
        """Return the options of another run of the same rotation, which shows no preflight report."""
        return replace(
            self,
            preflight=False,
            restart=False,
            after=None,
            take_over=False,
            stop_after_rows=None,
            stop_after_seconds=None,
        )

    @property
    def has_throttles(self) -> bool:
        """Whether options make the owner read signals that can hold the rotation."""
        limits = (self.max_lag_seconds, self.max_unarchived_wal_bytes, self.max_slot_wal_bytes)
        return any(limit is not None for limit in limits)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "RunOptions":
        """Return the options that :meth:`to_json` of this version, or another one, has saved."""
        limits = WaitLimits(**known_fields(WaitLimits, saved.get("limits", {})))
        return cls(**known_fields(cls, saved) | {"limits": limits})

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON types, for the rotation's row."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the options of the command that a resumed rotation needs again; a phrase without any."""
        values, defaults = _values(self), _values(_DEFAULTS)
        given = {name: value for name, value in values.items() if value != defaults[name]}
        return _command_line(
            given
            | {
                "lag_of": self.lag_of,
                "celery": self.celery,
                "no_vacuum": not self.vacuum,
                "prove": self.prove,
                "reindex": self.reindex,
            }
        )


def _values(options: RunOptions) -> dict[str, str]:
    """Return the options with a value, as a user writes them; empty where there is none."""
    durations = {
        "lock_timeout": options.limits.lock_seconds,
        "outage_budget": options.outage_budget_seconds,
        "max_lag": options.max_lag_seconds,
    }
    sizes = {
        "max_unarchived_wal": options.max_unarchived_wal_bytes,
        "max_slot_wal": options.max_slot_wal_bytes,
    }
    return {
        "concurrency": str(options.concurrency),
        "batch": str(options.batch),
        "pace": options.pace,
        **{name: "" if seconds is None else _duration(seconds) for name, seconds in durations.items()},
        **{name: "" if size is None else f"{size // 1024}kB" for name, size in sizes.items()},
        "guard": options.guard,
    }


def given_options(options: Mapping[str, Any], selection: Mapping[str, Any]) -> RunOptions:
    """Return saved options as the user gave them: a rotation with ``--leaked`` always has one worker."""
    saved = RunOptions.from_json(options)
    return replace(saved, concurrency=_DEFAULTS.concurrency) if selection.get("leaked") else saved


# The command shows the sentences on the attributes, too, as its help.
class RotateOptions(TypedDict, total=False):
    """The options of ``rotate`` and ``rotate_sync``; the same as those of the command.

    Attributes:
        concurrency: The maximum number of workers that write at the same time. Each has its own connection
            (default: 4).
        batch: The maximum number of rows in a range. Each range is one transaction (default: 2000). More than
            10,000 makes other writers of these rows wait for long.
        pace: How much the rotation may slow other sessions down. While they are at work, gentle and balanced
            use fewer workers and smaller ranges; full does not (default: balanced).
        restart: Begin a new rotation: abandon the unfinished one, or rotate the same rows again after a
            completed one.
        take_over: Take the rotation from the process that owns it, even if that process is alive. That
            process stops.
        vacuum: Vacuum the table after each eighth of its rows and at the end (default: True).
        reindex: Rebuild the table's indexes after completion, one at a time. This blocks no reads or writes,
            and needs free disk space for a copy of the largest index.
        prove: Store a salted digest of each old value before the first row is rotated, and verify at the end
            that no row has an old value. See docs/proof.md.
        guard: With --prove: stop old values from coming back, by a trigger. A write of an old value fails
            (refuse, the default), or an update keeps the newer value (keep).
        lock_timeout: The longest wait of a range for one lock, before the range is deferred. All of its locks
            together may take five times as long (default: 100ms).
        outage_budget: The longest wait for an unreachable server, before the run stops (default: 5m).
        max_lag: Begin no range while a replica of --lag-of lags more than this. The lag is the age of the
            first heartbeat of the rotation that the replica has not replayed.
        lag_of: The aliases in DATABASES of the replicas that max_lag applies to.
        max_unarchived_wal: Begin no range while more WAL than this, e.g. 1GB, waits for the archiver.
        max_slot_wal: Begin no range while a replication slot keeps more WAL than this.
    """

    concurrency: int
    batch: int
    pace: str
    restart: bool
    take_over: bool
    vacuum: bool
    reindex: bool
    prove: bool
    guard: str
    lock_timeout: timedelta
    outage_budget: timedelta
    max_lag: timedelta
    lag_of: Sequence[str]
    max_unarchived_wal: str
    max_slot_wal: str


_DEFAULTS: Final = RunOptions()
# The help of the command; empty where Python omits docstrings (-OO).
_HELP: Final = defaultdict[str, str](
    str,
    {
        name: " ".join(text.split())
        for name, text in re.findall(
            r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(RotateOptions) or "", re.MULTILINE
        )
    },
)


def _switch(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text}


def _value(
    metavar: str, text: str, *, kind: Callable[[str], object] = str, default: object = None
) -> dict[str, Any]:
    return {"metavar": metavar, "help": text, "type": kind, "default": default}


def _list(metavar: str, text: str) -> dict[str, Any]:
    text = f"{text} May be given several times."
    return {"metavar": metavar, "help": text, "action": "append", "default": []}


COMMAND_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "concurrency": _value("N", _HELP["concurrency"], kind=whole_number, default=_DEFAULTS.concurrency),
    "batch": _value("ROWS", _HELP["batch"], kind=whole_number, default=_DEFAULTS.batch),
    "pace": {"choices": tuple(PACES), "default": _DEFAULTS.pace, "help": _HELP["pace"]},
    "database": {
        "help": "The alias of the database that holds the target (default: the one that the project's "
        "database routers write the model to)."
    },
    "filter": _list(
        "LOOKUP=VALUE",
        "Rotate only the rows that match this Django lookup, e.g. status=active or "
        "created_at__lt=2026-11-01T00:00:00Z.",
    ),
    "exclude": _list("LOOKUP=VALUE", "Skip the rows that match this Django lookup."),
    "generator": _value(
        "DOTTED.PATH",
        "Make the values with this callable instead of the fields' defaults. It takes no argument, or the "
        "row's instance, and returns a value, or a mapping of field names to values.",
        kind=not_empty,
    ),
    "include_null": _switch("Also rotate rows whose value is NULL."),
    "include_blank": _switch("Also rotate rows whose value is the empty string."),
    "ignore_derived": _list(
        "FIELD",
        "Rotate although this field seems to derive its value from the target when a row is saved. The "
        "field keeps its values.",
    ),
    "leaked": _value(
        "FILE|-",
        "Rotate only the rows whose present value is in this file, or on the standard input (-): one value "
        "in each line, a CSV file with --leaked-column, or the JSON of GitHub's secret scanning. The values "
        "are not sent to the server.",
        kind=not_empty,
    ),
    "leaked_column": _value(
        "NAME",
        "The name of the column with the values, if the file of --leaked is a CSV file.",
        kind=not_empty,
    ),
    "celery": _switch(
        "Rotate with the project's Celery workers, each with --concurrency connections. This process only "
        "plans and watches."
    ),
    "detach": _switch(
        "With --celery: let a worker plan and watch too, and return. Watch the rotation with rotations ID "
        "--follow. Needs at least two worker processes."
    ),
    "restart": _switch(f"{_HELP['restart']} Asks first on a terminal."),
    "noinput": _switch(
        "Do not ask before the first write. After a completed rotation, --restart is needed too."
    ),
    "take_over": _switch(_HELP["take_over"]),
    "stop_after": _value(
        "ROWS|TIME",
        "Stop after this number of rows (5000) or this time (90s, 30m, 2h). The same command resumes the "
        "rotation.",
    ),
    "lock_timeout": _value("TIME", _HELP["lock_timeout"], default=_LOCK_SECONDS),
    "outage_budget": _value("TIME", _HELP["outage_budget"], default=_OUTAGE_SECONDS),
    "max_lag": _value("TIME", _HELP["max_lag"]),
    "lag_of": _list("ALIAS", "The alias in DATABASES of a replica that --max-lag applies to."),
    "max_unarchived_wal": _value("SIZE", _HELP["max_unarchived_wal"]),
    "max_slot_wal": _value("SIZE", _HELP["max_slot_wal"]),
    "dry_run": _switch(
        "Show the preflight report (table, server, estimated time, what cannot be undone), and exit. To "
        "estimate the time, this rewrites up to a thirtieth of the rows and rolls them back, which leaves "
        "dead rows and WAL; see --no-sample."
    ),
    "no_sample": _switch("Do not rewrite rows to estimate the time, before a rotation or with --dry-run."),
    "no_preflight": _switch(
        "Skip the preflight report. Without a terminal, the report has no estimate of the time."
    ),
    "no_vacuum": _switch(
        "Do not run VACUUM: autovacuum removes the old row versions later. By default the table is vacuumed "
        "after each eighth of its rows and at the end."
    ),
    "reindex": _switch(_HELP["reindex"]),
    "prove": _switch(_HELP["prove"]),
    "guard": {
        "nargs": "?",
        "const": GUARD_ACTIONS[0],
        "default": "",
        "choices": GUARD_ACTIONS,
        "help": _HELP["guard"],
    },
    "progress": {
        "default": "auto",
        "help": "How to show progress: a bar on a terminal and lines elsewhere (auto), JSON lines on "
        "standard output (json), log records (log), or not at all (none) (default: %(default)s).",
    },
    "report": _value("FILE", "Also write the summary to this file, as JSON.", kind=Path),
}
"""The options of ``manage.py async_rotate``, as ``argparse`` takes them."""

# The command to resume a run with omits them.
OPTIONS_OF_ONE_RUN: Final = ("restart", "take_over", "stop_after")
