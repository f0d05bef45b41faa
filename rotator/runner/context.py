"""The target of a run, and what all parts of a run share."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from rotator.events import Observer, OnCommit
from rotator.options import RunOptions, Selection
from rotator.postgres.connection import Server
from rotator.postgres.identity import SessionIdentity
from rotator.postgres.owner import Owner
from rotator.postgres.table import Condition
from rotator.postgres.values import ValueSource
from rotator.runner.stop import StopSignal
from rotator.stats import Stats

AskForHelp: TypeAlias = Callable[[int, int], Awaitable[None]]
"""Sends a message that asks a Celery worker for help: with the rotation's id and the message's.

It raises :class:`BrokerError` where the broker cannot be reached. The message may have been sent all the
same.
"""

ShouldStop: TypeAlias = Callable[[], bool]
"""Says whether whoever this is done for has to stop; called now and then."""


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
    session: SessionIdentity | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """One run's surroundings.

    Attributes:
        server: Where the target is.
        target: What is rotated.
        options: How.
        owner: This process.
        stop_signal: What has been asked of the run.
        stats: The figures of the run.
        notify: Tells observers, after the run itself has taken note.
        on_commit: Is awaited after each commit of rows; None where nobody asked for that.
        ask_for_help: Asks Celery workers to rewrite the ranges; None where this process does it.
    """

    server: Server
    target: RunTarget
    options: RunOptions
    owner: Owner
    stop_signal: StopSignal
    stats: Stats
    notify: Observer
    on_commit: OnCommit | None
    ask_for_help: AskForHelp | None
