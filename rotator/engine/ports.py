"""What the engine needs of others, and nothing more."""

from typing import Protocol

from rotator.keys import KeyRange, KeySpan


class RangePlanner(Protocol):
    """Knows the keys."""

    async def next_range(self, span: KeySpan, batch: int) -> KeyRange:
        """The first ``batch`` rows of a span, or the whole of it where it holds fewer, or none.

        A span without rows is a range too: its checkpoint says that there was nothing to do.

        Raises:
            RowsLockedError: Somebody else holds all of them; it can be tried again later.
        """
        ...


class RangeWriter(Protocol):
    """Knows the rows."""

    async def rewrite(self, key_range: KeyRange) -> int:
        """Give a range's rows new values and checkpoint it, in one transaction.

        Returns:
            How many rows got a new value.

        Raises:
            RowsLockedError: Somebody else holds rows of it; nothing was written.
            RangeRefusedError: The server refused it; nothing was written.
        """
        ...
