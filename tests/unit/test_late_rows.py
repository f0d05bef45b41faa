"""Rows that are known by their places, and the pace."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from rotator.events import Event
from rotator.exceptions import RangeTooSlowError
from rotator.options import PACES
from rotator.postgres.values import Place
from rotator.postgres.writer import OlderRow
from rotator.ranges import Key, Written
from rotator.runner.gate import Gate
from rotator.runner.late_rows import LateRows

ROW_SECONDS = 0.001


class _Placed:
    """Rows that each take a millisecond; the first transactions are too slow."""

    def __init__(self, too_slow: int = 0) -> None:
        self.sizes = list[int]()
        self._too_slow = too_slow

    async def rotate(self, rows: Sequence[OlderRow]) -> Written:
        if self._too_slow:
            self._too_slow -= 1
            raise RangeTooSlowError("it takes too long")
        self.sizes.append(len(rows))
        return Written(rows=len(rows), has_other_writes=False, server_seconds=0.002 + len(rows) * ROW_SECONDS)


async def _found(*sizes: int) -> AsyncIterator[list[OlderRow]]:
    for rows in sizes:
        yield [
            OlderRow(place=Place(leaf=1, ctid=f"(0,{number})"), xid="9", key=Key(f"[{number}]"))
            for number in range(1, rows + 1)
        ]


def _late_rows(placed: _Placed, gate: Gate) -> LateRows:
    events = list[Event]()
    return LateRows(placed.rotate, gate, asyncio.Event(), events.append)


def _gate() -> Gate:
    return Gate(concurrency=4, rows=200, notify=lambda _event: None)


async def test_a_transaction_has_as_many_rows_as_a_range() -> None:
    placed, gate = _Placed(), _gate()
    gate.allow(workers=1, range_limit=PACES["balanced"].range_limit)
    assert await _late_rows(placed, gate).rotate_all(_found(200, 200)) == 400
    assert sum(placed.sizes) == 400
    assert placed.sizes[0] == 200
    # 25 ms, less the 2 ms of an empty one.
    assert max(placed.sizes[1:]) <= 23
    assert (gate.rows_completed, gate.ranges_completed) == (400, len(placed.sizes))


async def test_a_transaction_that_is_too_slow_makes_the_next_ones_smaller() -> None:
    placed, gate = _Placed(too_slow=1), _gate()
    assert await _late_rows(placed, gate).rotate_all(_found(200, 200)) == 400
    assert max(placed.sizes) == 100
