"""An application that updates rows while they are rotated, and measures what that costs it."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import psycopg

from tests.faults.database import TABLE, Database

_ROWS_A_TRANSACTION: Final = 8
_NEAR: Final = 400
_NOTICEABLE_SECONDS: Final = 0.02
_RECONNECT_SECONDS: Final = 0.1


@dataclass(slots=True)
class Neighbour:
    """Updates the titles of some rows in every transaction, from the highest key to the lowest.

    Attributes:
        database: Where.
        transactions: How many it has tried.
        longest_seconds: Its longest statement.
        waited: How many of them took noticeably long.
        refused: The names of the errors that it was told of.
        lost: How often its connection was.
    """

    database: Database
    transactions: int = 0
    longest_seconds: float = 0.0
    waited: int = 0
    refused: list[str] = field(default_factory=list)
    lost: int = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let it work in a thread of its own."""
        over = threading.Event()
        keys = [key for (key,) in self.database.query(f"SELECT id FROM {TABLE} ORDER BY id")]
        thread = threading.Thread(target=self._work, args=[keys, over], name="neighbour")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _work(self, keys: list[int], over: threading.Event) -> None:
        chance = random.Random(1)  # noqa: S311 - to be repeated, not to be secret
        while not over.is_set():
            try:
                with psycopg.connect(self.database.url(application_name="neighbour")) as connection:
                    while not over.is_set():
                        self._transact(connection, keys, chance)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                self.lost += 1
                over.wait(_RECONNECT_SECONDS)

    def _transact(self, connection: psycopg.Connection, keys: list[int], chance: random.Random) -> None:
        first = chance.randrange(max(1, len(keys) - _NEAR))
        chosen = sorted(chance.sample(keys[first : first + _NEAR], _ROWS_A_TRANSACTION), reverse=True)
        self.transactions += 1
        try:
            for key in chosen:
                started = time.monotonic()
                connection.execute(f"UPDATE {TABLE} SET title = title || '' WHERE id = %s".encode(), [key])
                seconds = time.monotonic() - started
                self.longest_seconds = max(self.longest_seconds, seconds)
                self.waited += seconds > _NOTICEABLE_SECONDS
            connection.commit()
        except psycopg.Error as error:
            if connection.closed:
                raise
            self.refused.append(type(error).__name__)
            connection.rollback()
