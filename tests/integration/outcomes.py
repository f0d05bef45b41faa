"""Whole runs on any table, and what they reported."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import pytest
from django.db import connections
from django.db.backends.signals import connection_created

from rotator.api import prepare
from rotator.events import Event, RangeCompleted, RotationStarted, RotationStopped, RowsConfirmed
from rotator.models import Rotation
from rotator.options import RunOptions, Selection
from rotator.postgres.table import Column, TargetTable
from rotator.progress.summary import report, summary
from tests.integration.rotation_tables import TABLE_NAME, TARGET

# Real transactions, with the shop's tables.
SHOP: Final = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

React = Callable[[Event], None]

ID: Final = Column(name="id", type_name="int8")
ORDERS: Final = TargetTable(
    path=("shop_order",), key=(ID,), columns=(Column(name="api_key", type_name="varchar"),)
)
WEBHOOKS: Final = TargetTable(
    path=("shop_order",), key=(ID,), columns=(Column(name="webhook_secret", type_name="varchar"),)
)
CODED: Final = TargetTable(
    path=("shop_coded",), key=(ID,), columns=(Column(name="secret", type_name="text"),)
)
CODES: Final = "shop.Coded.secret"


class EventRecorder:
    """An observer that keeps the events, and may react to each."""

    def __init__(self, react: React = lambda _event: None) -> None:
        self.events = list[Event]()
        self._react = react

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)
        self._react(event)

    @property
    def has_started(self) -> bool:
        """Whether the rotation has started."""
        return any(isinstance(event, RotationStarted) for event in self.events)

    @property
    def rows(self) -> int:
        """The number of rows that were rotated in ranges."""
        return sum(event.rows for event in self.events if isinstance(event, RangeCompleted))

    def of(self, kind: type[Event]) -> int:
        """The number of events of this kind."""
        return sum(isinstance(event, kind) for event in self.events)

    def counted(self) -> tuple[int, int]:
        """The confirmed and the unconfirmed rows of the last count."""
        found = [event for event in self.events if isinstance(event, RowsConfirmed)]
        return found[-1].confirmed, found[-1].unconfirmed


def rotate(
    labels: str | Sequence[str],
    observer: React | None = None,
    *,
    selection: Selection | None = None,
    **options: object,
) -> RotationStopped:
    """Rotate one target or several, in small ranges, by one worker, and without probes."""
    chosen = replace(RunOptions(batch=10, concurrency=1, vacuum=False, pace="full"), **options)  # type: ignore[arg-type] # checked by the class
    names = [labels] if isinstance(labels, str) else labels
    return prepare(names, "default", chosen, selection).rotate(observer or EventRecorder())


def make_rotation(**fields: object) -> Rotation:
    """Make a rotation that a process on another host owns."""
    values = {
        "target": TARGET,
        "table_name": TABLE_NAME,
        "database": "default",
        "version": "0",
        "started_xid": 3,
        "owner_host": "elsewhere.example",
        "owner_pid": 4711,
        "owner_user": "ann",
        **fields,
    }
    return Rotation.objects.create(**values)


def rotate_tickets(observer: React | None = None, **options: object) -> RotationStopped:
    """Rotate the tickets' tokens, in small ranges, by three workers."""
    return rotate(TARGET, observer, **{"concurrency": 3, "vacuum": True, **options})  # type: ignore[arg-type] # options


def at_start(do: Callable[[], object]) -> React:
    """Do something once the rotation has started, before its first range."""

    def react(event: Event) -> None:
        if isinstance(event, RotationStarted):
            do()

    return react


def after_range(number: int, do: Callable[[], object]) -> React:
    """Do something once so many ranges are completed."""
    completed = 0

    def react(event: Event) -> None:
        nonlocal completed
        if isinstance(event, RangeCompleted):
            completed += 1
            if completed == number:
                do()

    return react


def assert_completed(outcome: RotationStopped, *, rows: int) -> None:
    """The run says that it completed the rotation, and so does the database."""
    assert (outcome.status, outcome.exit_status, outcome.error) == ("completed", 0, "")
    assert outcome.rows == rows
    rotation = Rotation.objects.get(pk=outcome.rotation)
    assert (rotation.status, rotation.rows_done, rotation.error) == ("completed", rows, "")
    assert rotation.finished_at is not None


def assert_unconfirmed(outcome: RotationStopped, rows: int) -> None:
    """The run is completed, and every account of it has this number of rows that are not confirmed."""
    stopped = outcome
    assert (stopped.status, outcome.exit_status) == ("completed", 0), f"{stopped.status}: {stopped.error}"
    assert stopped.unconfirmed_rows == rows, f"{stopped.unconfirmed_rows} rows are not confirmed"
    assert Rotation.objects.get(pk=stopped.rotation).unconfirmed_rows == rows
    assert report(stopped)["unconfirmed_rows"] == rows
    headline = summary(stopped).splitlines()[0]
    assert (f"{rows:,} row" in headline and "not confirmed" in headline) == bool(rows)


@contextmanager
def each_connection(statement: str) -> Iterator[None]:
    """Have each of Django's connections execute a statement when it is made."""

    def receive(*, connection: Any, **_: object) -> None:  # noqa: ANN401 - as Django has it
        with connection.cursor() as cursor:
            cursor.execute(statement)

    connections.close_all()
    connection_created.connect(receive)
    try:
        yield
    finally:
        connection_created.disconnect(receive)
        connections.close_all()
