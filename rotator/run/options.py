"""What one run is told: how to work, and on what."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rotator.postgres.identity import Session
from rotator.postgres.table import Condition
from rotator.postgres.transaction import WaitLimits
from rotator.postgres.value_source import ValueSource
from rotator.selection import Selection

# The rows of a range are numbered by the server's ``integer``.
MOST_BATCH_ROWS: Final = 2**31 - 1


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
    def read(cls, saved: Mapping[str, Any]) -> "RunOptions":
        """Return what :meth:`saved` was made of, by this version or another."""
        limits = _known(WaitLimits, saved.get("limits", {}))
        return cls(**_known(cls, saved) | {"limits": WaitLimits(**limits)})

    def saved(self) -> dict[str, Any]:
        """Return them as JSON types, for the rotation's row."""
        return asdict(self)


def _known(options: type[RunOptions | WaitLimits], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what only a newer version has."""
    return {name: value for name, value in saved.items() if name in options.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTarget:
    """What is rotated, in the database's terms.

    Attributes:
        label: As the user writes it, e.g. ``tickets.Ticket.token``; several with blanks between them.
        database: Django's alias of the database.
        model: The model whose table that is, e.g. ``tickets.Ticket``.
        path: The table's name, with its schema before it where it has one; unquoted.
        key: The names of the primary key's columns, in its order.
        columns: The names of the rotated columns.
        source: Where their new values come from.
        condition: Which rows are rotated; None for all.
        include_null: Whether a NULL gets a value, too.
        include_blank: Whether an empty text gets a value, too.
        selection: How the user chose rows and values.
        bypassed: What of Django's model would have acted upon each save(), one phrase each.
        warnings: What the names of the fields warn of, one sentence each.
        session: What Django's own connection sees under these names; None until it was asked.
    """

    label: str
    database: str
    model: str
    path: tuple[str, ...]
    key: tuple[str, ...]
    columns: tuple[str, ...]
    source: ValueSource
    condition: Condition | None = None
    include_null: bool = False
    include_blank: bool = False
    selection: Selection = field(default_factory=Selection)
    bypassed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    session: Session | None = None
