"""What the baselines share: Django, the options, and a file that says how far one got."""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
django.setup()

from tickets.models import Ticket  # noqa: E402 - takes Django

__all__ = ["Options", "Place", "PlaceFile", "Ticket", "options", "renew"]


@dataclass(kw_only=True, slots=True)
class Place:
    """How far a baseline got, in a file that outlives it.

    Attributes:
        last_id: The last ticket that has a new token.
        page: The last page of tickets that have.
        seconds: How long that took, over all its runs.
    """

    last_id: int = 0
    page: int = 0
    seconds: float = 0.0


class PlaceFile:
    """Keeps the place; written after each step, whose commit it follows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.monotonic()
        self.place = Place(**json.loads(path.read_text())) if path.exists() else Place()
        self._seconds_before = self.place.seconds

    def keep(self) -> None:
        """Write it; a crash between the commit and this repeats the step."""
        self.place.seconds = self._seconds_before + time.monotonic() - self._started
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self.place)))
        temporary.replace(self._path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every baseline is told.

    Attributes:
        batch: How many tickets a step holds.
        place: Where to keep how far it got.
        threads: How many threads work, where there are any.
    """

    batch: int
    place: Path
    threads: int


def options(description: str) -> Options:
    """Read the options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--place", type=Path, default=Path("place.json"))
    parser.add_argument("--threads", type=int, default=4)
    return Options(**vars(parser.parse_args()))


def renew(tickets: list[Ticket]) -> list[Ticket]:
    """Give tickets new tokens, in memory."""
    for ticket in tickets:
        ticket.token = uuid4()
    return tickets
