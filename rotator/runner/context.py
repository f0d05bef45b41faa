"""The target of a run, and what all parts of a run share."""

from collections.abc import Awaitable, Callable
from dataclasses import InitVar, dataclass, field
from typing import TypeAlias

from rotator.events import Findings, Observer, OnCommit
from rotator.options import RunOptions, Selection
from rotator.postgres.connection import Server
from rotator.postgres.identity import SessionIdentity, TargetIdentity
from rotator.postgres.leaked import LeakedValues
from rotator.postgres.owner import Owner, this_process
from rotator.postgres.rotations import Figures, Terms
from rotator.postgres.table import Condition, TargetTable
from rotator.postgres.values import ValueSource
from rotator.runner.gate import Gate
from rotator.runner.pacing import OWN_PER_SECOND, Pacing
from rotator.runner.stop import StopSignal
from rotator.runner.throttles import ThrottleSources
from rotator.stats import Stats

AskForHelp: TypeAlias = Callable[[int, int], Awaitable[None]]
"""Sends a message that asks a Celery worker for help: with the rotation's id and the message's.

It raises :class:`BrokerError` where the broker cannot be reached. The message may have been sent all the
same.
"""

ShouldStop: TypeAlias = Callable[[], bool]
"""Returns whether the caller has to stop; called several times a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTarget:
    """The target of a run, in terms of the database.

    Attributes:
        label: The target as the user writes it: ``app.Model.field``, or several with blanks between them.
        database: Django's alias of the database.
        model: The label of the model, e.g. ``tickets.Ticket``.
        path: The table's name, after its schema where it has one; unquoted.
        key: The names of the primary key's columns, in its order.
        condition: The condition that rotated rows match; None for all rows.
        bypassed: The effects of ``save()`` that the update does not have, one phrase each.
        warnings: The warnings about the names of the fields, one sentence each.
        leaked: The leaked values; only rows that have one of them are rotated. None for all rows.
        session: The identity of Django's own session; None while it is unknown.
    """

    label: str
    database: str
    model: str
    path: tuple[str, ...]
    key: tuple[str, ...]
    columns: tuple[str, ...]
    source: ValueSource
    condition: Condition | None = None
    selection: Selection = field(default_factory=Selection)
    bypassed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    leaked: LeakedValues | None = None
    session: SessionIdentity | None = None
    throttles: ThrottleSources = field(default_factory=ThrottleSources)


@dataclass(kw_only=True, slots=True)
class RunContext:
    """The parts of a run, or of a Celery worker's help with one, that all other parts use.

    A helper counts in statistics of its own: its ``stats`` stay empty. ``own_per_second`` is for the pacing
    only (see :class:`OtherSessions`).

    Attributes:
        notify: Passes an event to the statistics and to the observer.
        on_commit: Is awaited after each commit of rows; None without receivers.
        ask_for_help: Asks Celery workers to rewrite the ranges; None if this process rewrites them.
        findings: The findings of the preflight, to be stored; None where there was none.
        table: The target's table; set by the checks, which come before all other work.
        owner: This process.
    """

    server: Server
    target: RunTarget
    options: RunOptions
    notify: Observer
    on_commit: OnCommit | None = None
    ask_for_help: AskForHelp | None = None
    own_per_second: InitVar[float] = OWN_PER_SECOND
    findings: Findings | None = None
    table: TargetTable = field(init=False, repr=False)
    owner: Owner = field(default_factory=this_process)
    stats: Stats = field(default_factory=Stats)
    stop_signal: StopSignal = field(init=False)
    gate: Gate = field(init=False)
    pacing: Pacing = field(init=False)

    def __post_init__(self, own_per_second: float) -> None:
        options, notify = self.options, self.notify
        self.stop_signal = StopSignal(notify)
        self.gate = Gate(concurrency=options.concurrency, rows=options.batch, notify=notify)
        self.pacing = Pacing(self.server, self.gate, options.pace, notify, own_per_second=own_per_second)

    @property
    def figures(self) -> Figures:
        """The figures of all runs of the rotation."""
        stats, before = self.stats, self.stats.started
        return Figures(
            active_seconds=stats.active_seconds,
            deferrals=stats.deferrals + (before.deferrals_before if before else 0),
            retries=stats.retries + (before.retries_before if before else 0),
            throttled_seconds=stats.held_seconds + (before.throttled_seconds_before if before else 0.0),
        )

    def terms(self, identity: TargetIdentity) -> Terms:
        """Return the terms of a rotation that begins or is resumed now."""
        return Terms(
            target=self.target.label,
            table_name=self.table.found_name,
            database=self.target.database,
            options=self.options.to_json(),
            selection=self.target.selection.to_json(),
            identity=identity.to_json(),
            findings=self.findings,
        )
