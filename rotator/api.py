"""What the command does, for programs: ``await rotate(Target("shop.Order.api_key"))``.

``rotate`` runs in the caller's event loop, ``rotate_sync`` in one of its own, for scripts and data migrations
(with ``atomic = False``: a rotation commits as it goes, so it cannot be part of a transaction).

Both go on with an unfinished rotation of the same target, and can be called again after whatever stopped
them. After a completed rotation of the same rows they raise, unless they are called with ``restart=True``.
Neither touches the process's signal handlers. Cancelling the task that awaits ``rotate`` rolls back the
ranges in flight and leaves the rotation to be gone on with.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta

from asgiref.sync import sync_to_async

from rotator.errors import OptionError, RotatorError
from rotator.events import Event, Observer, RotationStopped
from rotator.postgres.transaction import WaitLimits
from rotator.project_connections import borrowed, check_no_running_loop
from rotator.run.options import MOST_BATCH_ROWS, RunOptions
from rotator.selection import Selection
from rotator.service import Prepared, prepare

__all__ = ["RotationUnfinishedError", "Target", "rotate", "rotate_sync"]


@dataclass(frozen=True)
class Target:
    """What is rotated: one or several fields of one table, all of its rows or some.

    Attributes:
        fields: ``app.Model.field``, or several of them.
        database: Django's alias of the database; None for the one that the project's routers write the model
            to.
        filters: Rows match all of these Django lookups, written as on the command line:
            ``created_at__lt=2026-11-01T00:00:00Z``.
        excludes: Rows match none of these.
        generator: The dotted path of a callable that makes the values; empty for the fields' own defaults. It
            takes nothing, or the row's instance, and returns a value, or a mapping of field names to values.
        include_null: Whether a NULL gets a value, too.
        include_blank: Whether an empty text gets a value, too.
        ignore_derived: The names of fields that derive nothing from the rotated ones, although it looks so.
    """

    fields: str | Sequence[str]
    _: KW_ONLY
    database: str | None = None
    filters: Sequence[str] = ()
    excludes: Sequence[str] = ()
    generator: str = ""
    include_null: bool = False
    include_blank: bool = False
    ignore_derived: Sequence[str] = ()


class RotationUnfinishedError(RotatorError):
    """The run ended before the rotation did; calling again goes on with it.

    Attributes:
        stopped: The account of the run.
    """

    def __init__(self, stopped: RotationStopped) -> None:
        super().__init__(stopped.error)
        self.stopped = stopped


@dataclass(frozen=True)
class _Call:
    """The arguments of one call, checked where they are used."""

    target: Target
    options: RunOptions

    def prepare(self) -> Prepared:
        target = self.target
        return prepare(
            (target.fields,) if isinstance(target.fields, str) else target.fields,
            target.database,
            self.options,
            Selection(
                filters=tuple(target.filters),
                excludes=tuple(target.excludes),
                generator=target.generator,
                include_null=target.include_null,
                include_blank=target.include_blank,
                ignore_derived=tuple(target.ignore_derived),
            ),
        )

    def prepare_beside(self) -> Prepared:
        """Prepare with the caller's connections, and leave them as they were."""
        with borrowed():
            return self.prepare()


async def rotate(  # noqa: PLR0913 - the options of the command, by name
    target: Target,
    *,
    concurrency: int = 4,
    batch: int = 2000,
    restart: bool = False,
    take_over: bool = False,
    vacuum: bool = True,
    lock_timeout: timedelta = timedelta(milliseconds=100),
    outage_budget: timedelta = timedelta(minutes=5),
    observer: Observer | None = None,
) -> RotationStopped:
    """Give every row of a target a new value, or go on where an earlier run stopped.

    Args:
        target: What is rotated.
        concurrency: How many workers write at the same time, a connection each; three more are needed.
        batch: How many rows a range holds; each is one transaction.
        restart: Begin a new rotation: abandon the target's unfinished one, or repeat a completed one.
        take_over: Take the rotation from the process that owns it, even if that is alive; it will stop.
        vacuum: Vacuum the table now and then.
        lock_timeout: How long a range waits for a lock before it goes to the back of the queue.
        outage_budget: How long to wait for a server that is away before giving up.
        observer: Is called in the event loop with each event of :mod:`rotator.events`; must not block.

    Returns:
        The account of the run that completed the rotation.

    Raises:
        RotationUnfinishedError: The run ended before the rotation did, for the reason that its text gives.
        OptionError: A completed rotation had the same fields, rows and values, and ``restart`` is false.
        RotatorError: It could not begin, for the reason that its text gives; nothing was changed.
    """
    call = _Call(
        target,
        _options(
            concurrency=concurrency,
            batch=batch,
            restart=restart,
            take_over=take_over,
            vacuum=vacuum,
            lock_timeout=lock_timeout,
            outage_budget=outage_budget,
        ),
    )
    # Django's connections must not be used in the loop's thread.
    prepared = await sync_to_async(call.prepare_beside)()
    outcome = await prepared.rotate_in_this_loop(observer or _ignore)
    return _completed(outcome.stopped)


def rotate_sync(  # noqa: PLR0913 - the options of the command, by name
    target: Target,
    *,
    concurrency: int = 4,
    batch: int = 2000,
    restart: bool = False,
    take_over: bool = False,
    vacuum: bool = True,
    lock_timeout: timedelta = timedelta(milliseconds=100),
    outage_budget: timedelta = timedelta(minutes=5),
    observer: Observer | None = None,
) -> RotationStopped:
    """Do what :func:`rotate` does, with an event loop of its own, for scripts and data migrations.

    Leaves Django's connections of this thread as they are. Generators and receivers use them, in a thread of
    their own. In a thread with a running event loop it raises an error: use :func:`rotate` there.

    Args:
        target: What is rotated.
        concurrency: How many workers write at the same time, a connection each; three more are needed.
        batch: How many rows a range holds; each is one transaction.
        restart: Begin a new rotation: abandon the target's unfinished one, or repeat a completed one.
        take_over: Take the rotation from the process that owns it, even if that is alive; it will stop.
        vacuum: Vacuum the table now and then.
        lock_timeout: How long a range waits for a lock before it goes to the back of the queue.
        outage_budget: How long to wait for a server that is away before giving up.
        observer: Is called with each event of :mod:`rotator.events`; must not block.

    Returns:
        The account of the run that completed the rotation.

    Raises:
        RotationUnfinishedError: The run ended before the rotation did, for the reason that its text gives.
        OptionError: A completed rotation had the same fields, rows and values, and ``restart`` is false.
        RotatorError: It could not begin, for the reason that its text gives; nothing was changed.
    """
    check_no_running_loop()
    call = _Call(
        target,
        _options(
            concurrency=concurrency,
            batch=batch,
            restart=restart,
            take_over=take_over,
            vacuum=vacuum,
            lock_timeout=lock_timeout,
            outage_budget=outage_budget,
        ),
    )
    prepared = call.prepare_beside()
    with borrowed():
        return _completed(prepared.rotate(observer or _ignore, keeps_connections=True).stopped)


def _options(
    *,
    concurrency: int,
    batch: int,
    restart: bool,
    take_over: bool,
    vacuum: bool,
    lock_timeout: timedelta,
    outage_budget: timedelta,
) -> RunOptions:
    if concurrency < 1 or not 1 <= batch <= MOST_BATCH_ROWS:
        raise OptionError(
            f"concurrency and batch must be 1 or more, and batch {MOST_BATCH_ROWS:,} or less, not "
            f"{concurrency} and {batch}."
        )
    # The server takes a timeout of 0 for none.
    if lock_timeout < timedelta(milliseconds=1) or outage_budget <= timedelta(0):
        raise OptionError("lock_timeout must be a millisecond or more, and outage_budget more than 0.")
    lock_seconds = lock_timeout.total_seconds()
    return RunOptions(
        concurrency=concurrency,
        batch=batch,
        restart=restart,
        take_over=take_over,
        vacuum=vacuum,
        outage_budget_seconds=outage_budget.total_seconds(),
        limits=WaitLimits.of_lock_seconds(lock_seconds),
        listens_to_signals=False,
    )


def _completed(stopped: RotationStopped) -> RotationStopped:
    if stopped.status != "completed":
        raise RotationUnfinishedError(stopped)
    return stopped


def _ignore(_event: Event) -> None:
    """Observe nothing."""
