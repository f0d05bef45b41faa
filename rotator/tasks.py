"""Task groups whose first error comes out as itself."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_error_alone() -> Iterator[None]:
    """Raise the first error of a task group's exception group in its place.

    The errors after it are those of a run that was falling apart already.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
