"""A rotation in a process of its own, which kills itself in the middle."""

import multiprocessing
import os
import signal
from collections.abc import Callable

import django
from django.conf import settings

from rotator.events import Event, RangeCompleted
from rotator.options import RunOptions, Selection

# Imported by the server of the processes, which are forked from it and need not import anything again.
django.setup()

# Only a test that fails waits so long.
_SECONDS = 120


def rotate_until_killed(
    database: str, labels: list[str], selection: Selection, *, options: RunOptions, ranges: int
) -> None:
    """Rotate in a process of its own, which dies by SIGKILL after so many ranges."""
    until_killed(_rotate, database, labels, selection, options, ranges)


def until_killed(work: Callable[..., None], *arguments: object) -> None:
    """Work in a process of its own, which has to kill itself; the arguments are pickled."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join(_SECONDS)
    assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode}"


def kill_itself() -> None:
    """Die by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def _rotate(database: str, labels: list[str], selection: Selection, options: RunOptions, ranges: int) -> None:
    # What Django's own connections do not know yet in this process.
    settings.DATABASES["default"]["NAME"] = database
    from rotator.api import prepare  # noqa: PLC0415 - its models need the apps

    left = ranges

    def observer(event: Event) -> None:
        nonlocal left
        left -= isinstance(event, RangeCompleted)
        if not left:
            kill_itself()

    prepare(labels, "default", options, selection).rotate(observer)
