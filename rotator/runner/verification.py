"""Verifies a rotation: what it has written, and whether a row has a value that is in the ledger."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Final

from psycopg import AsyncConnection

from rotator.events import (
    Controls,
    Coverage,
    Event,
    LateRowsRotated,
    VerificationProgressed,
    VerificationStarted,
    Verified,
)
from rotator.exceptions import OptionError, RangeTooSlowError, RowsLockedError
from rotator.postgres import survivors
from rotator.postgres.guard import count_hits
from rotator.postgres.last_writers import count_unless_changed
from rotator.postgres.ledger import DIGEST_BITS, Ledger, count_known, find_ledger
from rotator.postgres.planner import IndexPlanner, count_table, gaps, last_key
from rotator.postgres.preflight import name_server
from rotator.postgres.rotations import RotationState, read_rotation
from rotator.postgres.survivors import Search
from rotator.postgres.writer import OlderRow, write_placed
from rotator.ranges import Key, KeyInterval, KeyRange
from rotator.runner import retry
from rotator.runner.context import RunContext
from rotator.runner.late_rows import LateRows
from rotator.runner.preflight import measured_update

# A few seconds of several processes of the server; a table of fewer rows is read in one piece.
SEARCH_ROWS: Final = 1_000_000
# Less than half of ANSWER_SECONDS: a plan is two statements, and smaller ranges are tried after this limit.
PLANNING_SECONDS: Final = 14.0
CONTROL_ROWS: Final = 1000
COUNT_SECONDS: Final = 1.0
GAPS_NAMED: Final = 100


class Verifier:
    """One verification of a rotation, which may repair."""

    def __init__(self, connection: AsyncConnection, rotation: int, context: RunContext) -> None:
        """Take a connection in autocommit mode, for this object's use alone."""
        self._connection = connection
        self._rotation = rotation
        self._context = context
        self._planner = IndexPlanner(connection, context.table, seconds=PLANNING_SECONDS)
        self._planted = self._planted_found = 0

    async def verify(self, *, repairs: bool = False) -> Verified:
        """Search the table for old values and count what the rotation has written, until a stop is requested.

        If ``repairs``, give the survivors new values, and return the result of a search after it.

        Raises:
            OptionError: The rotation cannot be repaired.
            RotatorError: The server cannot be asked, or another process continues the same verification.
        """
        started_at = datetime.now(UTC)
        verified = await self._context.stop_signal.run_until_stop(self._repair_and_verify(repairs=repairs))
        if verified is None:
            label = self._context.target.label
            verified = unverified(self._rotation, label, "A stop was requested.", started_at=started_at)
        self._context.notify(verified)
        return verified

    async def _repair_and_verify(self, *, repairs: bool) -> Verified:
        facts = await read_rotation(self._connection, self._rotation)
        ledger = await find_ledger(self._connection, self._rotation)
        if repairs and (ledger is None or not ledger.is_ready or facts.status != "completed"):
            raise OptionError(
                f"Rotation {self._rotation} cannot be repaired: it is {facts.status}"
                f"{'' if ledger and ledger.is_ready else ' and has no ledger'}. "
                "Only a completed rotation with a ledger can be repaired."
            )
        repaired = 0
        if repairs and ledger is not None:
            repaired = (await self._verify(facts, ledger, repairs=True)).repaired
        return replace(await self._verify(facts, ledger, repairs=False), repaired=repaired)

    async def _verify(self, facts: RotationState, ledger: Ledger | None, *, repairs: bool) -> Verified:
        started_at, controls = datetime.now(UTC), None
        if ledger is None or not ledger.is_ready:
            search = await survivors.begin_search(self._connection, self._rotation, None, repairs=repairs)
        else:
            entries, entries_found, is_salt_right = await count_known(self._connection, ledger)
            self._planted = self._planted_found = 0
            search = await self._search(ledger, repairs=repairs)
            controls = Controls(
                sampled=ledger.control_rows,
                entries=entries,
                entries_found=entries_found,
                is_salt_right=is_salt_right,
                planted=self._planted,
                planted_found=self._planted_found,
            )
        vacuumed_at, dead_rows, version = await survivors.read_vacuumed(self._connection, self._context.table)
        verified = Verified(
            rotation=self._rotation,
            target=self._context.target.label,
            number=search.id,
            started_at=started_at,
            ended_at=datetime.now(UTC),
            rows=search.rows,
            survivors=search.survivors if controls else None,
            repaired=search.repaired,
            coverage=await self._cover(facts),
            controls=controls,
            guard_hits=await count_hits(self._connection, self._rotation),
            false_matches=0.0 if ledger is None else float(ledger.entries * search.rows) / 2.0**DIGEST_BITS,
            vacuumed_at=vacuumed_at,
            dead_rows=dead_rows,
            server_name=await name_server(self._connection),
            server_version=version,
            user=self._context.owner.user,
            host=self._context.owner.host,
        )
        keys = await survivors.finish_search(self._connection, search, verified.to_json())
        return replace(verified, survivor_keys=keys)

    async def _search(self, ledger: Ledger, *, repairs: bool) -> Search:
        """Search the table, or the rest of it after an interrupted verification."""
        resumed = search = await survivors.resume_search(self._connection, self._rotation, repairs=repairs)
        if search is None:
            bound = await last_key(self._connection, self._context.table)
            search = await survivors.begin_search(self._connection, self._rotation, bound, repairs=repairs)
        rows_total, _ = await count_table(self._connection, self._context.table, seconds=COUNT_SECONDS)
        self._context.notify(VerificationStarted(rows_total=rows_total, rows=search.rows, repairs=repairs))
        bound, rows = search.bound, SEARCH_ROWS
        if bound is None:
            return search
        placed = await self._late_rows(search, bound) if repairs else None
        while search.through != bound:
            rest = KeyInterval(after=search.through, through=bound)
            planned, found, rows = await self._search_range(ledger, rest, rows)
            if placed is not None:
                leaf = attrgetter("place.leaf")
                for _, of_leaf in groupby(sorted(found, key=leaf), leaf):
                    await placed.rotate(list(of_leaf))
            search = await survivors.advance_search(
                self._connection,
                search,
                planned.through,
                rows=planned.rows,
                survivors=[row.key for row in found],
            )
            self._context.notify(VerificationProgressed(rows=search.rows, survivors=search.survivors))
        # The rest of a resumed search may have no values to plant.
        after: Key | None = None
        while resumed and not self._planted and after != bound:
            rest = KeyInterval(after=after, through=bound)
            planned, _, _ = await self._search_range(ledger, rest, CONTROL_ROWS)
            after = planned.through
        return search

    async def _search_range(
        self, ledger: Ledger, interval: KeyInterval, rows: int
    ) -> tuple[KeyRange, list[OlderRow], int]:
        """Search the first range of an interval, and plant values until some are planted.

        Return the range, its survivors, and the number of rows of the next one. Many rows can share a planted
        value, so only a small part of a larger table is searched for one.
        """
        plants = not self._planted
        while True:
            try:
                planned = await self._planner.next_range(interval, rows)
                is_whole = planned.after is None and planned.through == interval.through
                if plants and not is_whole and rows > CONTROL_ROWS:
                    planned = await self._planner.next_range(interval, CONTROL_ROWS)
                found = await survivors.find_survivors(
                    self._connection,
                    self._context.table,
                    ledger,
                    planned,
                    is_whole=is_whole,
                    processes=self._context.options.concurrency,
                    plants=plants,
                )
            except RowsLockedError:
                await self._context.stop_signal.wait(retry.backoff_seconds(1))
            except RangeTooSlowError:
                if rows == 1:
                    raise
                rows //= 2
            else:
                self._planted += found.planted
                self._planted_found += found.planted_found
                return planned, found.survivors, rows

    async def _late_rows(self, search: Search, key: Key) -> LateRows:
        """Return what rotates the survivors, as the only process that may."""
        context, lease = self._context, await survivors.own_repair(self._connection, self._rotation)
        # A leaked value may have moved to a row that the filters leave out.
        table = replace(self._context.table, condition=None)
        update = await measured_update(self._connection, table, context, key)
        # The rotation is completed.
        update.has_stored = True
        write = partial(
            write_placed, self._connection, update, lease, context.on_commit, verification=search.id
        )
        # A stop cancels the search as a whole: a row that was left out would count as searched.
        return LateRows(write, context.gate, asyncio.Event(), self._notify_repair, max_failed_rows=None)

    def _notify_repair(self, event: Event) -> None:
        # The verification counts these rows itself.
        if not isinstance(event, LateRowsRotated):
            self._context.notify(event)

    async def _cover(self, facts: RotationState) -> Coverage:
        connection, table = self._connection, self._context.table
        left = await gaps(connection, table, self._rotation, facts.bound)
        found = await count_unless_changed(
            connection,
            table,
            rotation=self._rotation,
            started_xid=facts.started_xid,
            identity=facts.identity,
        )
        writers, unknown = (None, found) if isinstance(found, str) else (found, "")
        table_rows, excluded, null, blank = await survivors.count_left_out(connection, table)
        return Coverage(
            status=facts.status,
            gaps=tuple(left[:GAPS_NAMED]),
            gap_rows=await survivors.count_rows_of(connection, table, left),
            confirmed_rows=writers.confirmed if writers else None,
            unconfirmed_rows=writers.others if writers else None,
            older_rows=writers.older if writers else None,
            unknown=unknown,
            rejected_keys=tuple((Key(key), reason) for key, reason in facts.rejected_keys),
            table_rows=table_rows,
            excluded_rows=excluded,
            null_rows=null,
            blank_rows=blank,
        )


def unverified(rotation: int, target: str, error: str, *, started_at: datetime | None = None) -> Verified:
    """Return the result of a verification that failed with an error."""
    now = datetime.now(UTC)
    started_at = started_at or now
    return Verified(
        rotation=rotation, target=target, number=None, started_at=started_at, ended_at=now, error=error
    )
