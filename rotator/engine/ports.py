"""What the engine needs of others, and nothing more."""

from typing import Protocol

from rotator.keys import KeyRange, KeySpan


class RangePlanner(Protocol):
    """Knows the keys."""

    async def next_range(self, span: KeySpan, batch: int) -> KeyRange | None:
        """The first ``batch`` rows of a span, or all of them where it holds fewer; None where it is empty."""
        ...


class RangeWriter(Protocol):
    """Knows the rows."""

    async def rewrite(self, key_range: KeyRange) -> int:
        """Give a range's rows new values and checkpoint it, in one transaction.

        Returns:
            How many rows got a new value.

        Raises:
            RowsLockedError: Somebody else holds rows of it; nothing was written.
        """
        ...
