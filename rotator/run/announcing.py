"""Tells after each commit which rows have new values."""

from rotator.engine.ports import RangeWriter
from rotator.events import RowsRotated
from rotator.keys import KeyRange
from rotator.run.context import Announce


class AnnouncingWriter:
    """A writer whose ranges are announced once they are committed."""

    def __init__(self, writer: RangeWriter, announce: Announce, rotation: int) -> None:
        self._writer = writer
        self._announce = announce
        self._rotation = rotation

    async def rewrite(self, key_range: KeyRange) -> int:
        """Do what the writer does, and announce it; a crash in between leaves the range unannounced."""
        rows = await self._writer.rewrite(key_range)
        await self._announce(
            RowsRotated(rotation=self._rotation, after=key_range.after, through=key_range.through, rows=rows)
        )
        return rows
