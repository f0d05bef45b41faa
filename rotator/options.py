"""The options of a rotation: rows and values, speed, and time limits."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the user chose beside the fields, as it was written.

    Attributes:
        filters: Django lookups with their values, e.g. ``status=active``; rows match all of them.
        excludes: The same; rows match none of them.
        generator: The dotted path of what makes the values; empty for the fields' own defaults.
        include_null: Whether a NULL gets a value, too.
        include_blank: Whether an empty text gets a value, too.
        ignore_derived: The names of fields that derive nothing from the rotated ones, although it looks so.
            They change neither rows nor values, so a run can resume with others.
    """

    filters: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    generator: str = ""
    include_null: bool = False
    include_blank: bool = False
    ignore_derived: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_filtered(self) -> bool:
        """Whether some rows of the table are not rotated on purpose."""
        return bool(self.filters or self.excludes)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Selection":
        """Return what :meth:`to_json` was made of."""
        return cls(
            filters=tuple(saved.get("filters", ())),
            excludes=tuple(saved.get("excludes", ())),
            generator=saved.get("generator", ""),
            include_null=saved.get("include_null", False),
            include_blank=saved.get("include_blank", False),
            ignore_derived=tuple(saved.get("ignore_derived", ())),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types, for the rotation's row."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the options that choose it; a phrase where there are none."""
        words = [word for text in self.filters for word in ("--filter", text)]
        words += [word for text in self.excludes for word in ("--exclude", text)]
        words += ["--generator", self.generator] if self.generator else []
        words += ["--include-null"] if self.include_null else []
        words += ["--include-blank"] if self.include_blank else []
        words += [word for name in self.ignore_derived for word in ("--ignore-derived", name)]
        return shlex.join(words) or "no filter and no generator"


STATEMENT_SECONDS_PER_LOCK_SECOND: Final = 5


TRANSACTION_SECONDS_PER_STATEMENT_SECOND: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitLimits:
    """How long a range's transaction holds the application up.

    Attributes:
        lock_seconds: The longest wait for one lock; well below the server's ``deadlock_timeout``, so that
            the application is never the one that is told of a deadlock.
        statement_seconds: The longest time for the update of a slice, waits included.
        transaction_seconds: The age of the transaction at which no more slices of it are updated; so it holds
            its rows for at most this and ``statement_seconds``.
    """

    lock_seconds: float = 0.1
    statement_seconds: float = 0.5
    transaction_seconds: float = 2.0

    @classmethod
    def of_lock_seconds(cls, lock_seconds: float) -> "WaitLimits":
        """Return the limits that go with a wait for one lock."""
        statement_seconds = lock_seconds * STATEMENT_SECONDS_PER_LOCK_SECOND
        return cls(
            lock_seconds=lock_seconds,
            statement_seconds=statement_seconds,
            transaction_seconds=statement_seconds * TRANSACTION_SECONDS_PER_STATEMENT_SECOND,
        )


# The rows of a range are numbered by the server's ``integer``.
MAX_BATCH_ROWS: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How one run is done.

    Attributes:
        concurrency: How many workers write at the same time.
        batch: How many rows a range holds.
        rotation: Go on with this one alone; None for the target's unfinished one, or a new one.
        restart: Abandon the unfinished rotation, or repeat the completed one, and begin a new one.
        after: The completed rotation that a new one may repeat; None for no rotation.
        take_over: Take the rotation from its owner without watching whether that is alive.
        stop_after_rows: End the run after this many rows; None for no limit.
        stop_after_seconds: End the run after this time; None for no limit.
        outage_budget_seconds: How long to wait for a server that is away, before giving up.
        vacuum: Vacuum the table now and then.
        preflight: Examine table and server before a new rotation begins.
        sample: Measure for that, by ranges that are rolled back, how fast it will be.
        limits: How long a range holds the application up.
        listens_to_signals: Whether SIGINT, SIGTERM and SIGHUP ask the run to stop; else they are the
        caller's.
    """

    concurrency: int = 4
    batch: int = 2000
    rotation: int | None = None
    restart: bool = False
    after: int | None = None
    take_over: bool = False
    stop_after_rows: int | None = None
    stop_after_seconds: float | None = None
    outage_budget_seconds: float = 300.0
    vacuum: bool = True
    preflight: bool = False
    sample: bool = False
    limits: WaitLimits = field(default_factory=WaitLimits)
    listens_to_signals: bool = True

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "RunOptions":
        """Return what :meth:`to_json` was made of, by this version or another."""
        limits = _known(WaitLimits, saved.get("limits", {}))
        return cls(**_known(cls, saved) | {"limits": WaitLimits(**limits)})

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON types, for the rotation's row."""
        return asdict(self)


def _known(options: type[RunOptions | WaitLimits], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what only a newer version has."""
    return {name: value for name, value in saved.items() if name in options.__dataclass_fields__}
