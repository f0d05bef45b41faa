"""``manage.py rotations``: what was rotated, what is being rotated, and how far it is."""

import json
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Final, TypedDict, Unpack

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, Error, connections
from django.db.models import QuerySet

from rotator.models import Rotation
from rotator.progress.format import count, duration
from rotator.progress.wording import unconfirmed
from rotator.run.run import LEFT_TO_WORKERS
from rotator.selection import Selection

_FOLLOW_SECONDS: Final = 1.0
_SIGNAL_BASE: Final = 128
# A heartbeat comes each second.
_SILENT_SECONDS: Final = 10.0


class Options(TypedDict):
    """The options, as the command line or ``call_command`` gives them."""

    rotation: int | None
    database: str
    json: bool
    follow: bool


class Command(BaseCommand):
    """Lists rotations; changes nothing."""

    help = "List the rotations of a database, the latest first, or show one of them in detail."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument("rotation", nargs="?", type=int, metavar="ID", help="Show this rotation alone.")
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            choices=tuple(connections),
            help="The alias of the database that holds the targets (default: %(default)s).",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON, for programs.")
        parser.add_argument(
            "--follow", action="store_true", help="With an ID: show how far it is until it ends or stops."
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Print them."""
        number = options["rotation"]
        found = Rotation.objects.using(options["database"]).order_by("-pk")
        try:
            rotations = list(_chosen(found, number))
        except Error as error:
            raise CommandError(
                f"The rotations of the database '{options['database']}' cannot be read; is it migrated, and "
                f"does it run? {_first_line(error)}"
            ) from error
        if number is not None and not rotations:
            raise CommandError(f"There is no rotation {number} in the database '{options['database']}'.")
        if options["follow"]:
            self._follow(found, number)
        elif options["json"]:
            facts = [_facts(rotation) for rotation in rotations]
            self.stdout.write(json.dumps(facts if number is None else facts[0], indent=2))
        elif number is not None:
            self.stdout.write(_details(rotations[0]))
        elif rotations:
            self.stdout.write(_table(rotations))
        else:
            self.stdout.write("Nothing has been rotated in this database so far.")

    def _follow(self, found: QuerySet[Rotation], number: int | None) -> None:
        if number is None:
            raise CommandError("Say which rotation is to be followed: rotations ID --follow.")
        said = ""
        try:
            while True:
                rotation = found.get(pk=number)
                line = _standing(rotation)
                if line != said:
                    self.stdout.write(said := line)
                    self.stdout.flush()
                if rotation.status != Rotation.Status.RUNNING and not _awaits_workers(rotation):
                    break
                time.sleep(_FOLLOW_SECONDS)
        except KeyboardInterrupt:
            # Not in the middle of the line that says ^C.
            self.stderr.write("")
            sys.exit(_SIGNAL_BASE + signal.SIGINT)
        except Error as error:
            raise CommandError(
                "The database cannot be asked any more, which the rotation need not have noticed. "
                f"{_first_line(error)}"
            ) from error
        if rotation.status != Rotation.Status.COMPLETED:
            raise CommandError(rotation.error or f"It is {rotation.status}.")


def _standing(rotation: Rotation) -> str:
    """Return how far a rotation is, and whether anybody is at it."""
    line = f"{rotation.status}: {_rows(rotation)} rows ({_percent(rotation)}%)"
    if _awaits_workers(rotation):
        return f"{line}, waiting for a worker"
    if rotation.status == Rotation.Status.RUNNING and _silent_seconds(rotation) > _SILENT_SECONDS:
        return f"{line}, but nothing was heard of {_owner(rotation)} since {_moment(rotation.updated_at)}"
    return line


def _awaits_workers(rotation: Rotation) -> bool:
    return rotation.status == Rotation.Status.INTERRUPTED and rotation.error == LEFT_TO_WORKERS


def _silent_seconds(rotation: Rotation) -> float:
    return max(0.0, (datetime.now(UTC) - rotation.updated_at).total_seconds())


def _first_line(error: Error) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())


def _chosen(found: QuerySet[Rotation], number: int | None) -> QuerySet[Rotation]:
    return found if number is None else found.filter(pk=number)


def _facts(rotation: Rotation) -> dict[str, object]:
    """Return a rotation as JSON types; these keys are an interface and only ever added to."""
    return {
        "rotation": rotation.pk,
        "target": rotation.target,
        "table": rotation.table_name,
        "database": rotation.database,
        "status": rotation.status,
        "rows": rotation.rows_done,
        "rows_total": rotation.rows_total,
        "rows_total_is_exact": rotation.rows_total_is_exact,
        "late_rows": rotation.late_rows,
        "unconfirmed_rows": rotation.unconfirmed_rows,
        "percent": _percent(rotation),
        "seconds_total": round(rotation.active_seconds, 3),
        "started_at": rotation.started_at.isoformat(),
        "updated_at": rotation.updated_at.isoformat(),
        "finished_at": rotation.finished_at and rotation.finished_at.isoformat(),
        "host": rotation.owner_host,
        "pid": rotation.owner_pid,
        "user": rotation.owner_user,
        "owned_since": rotation.owned_since.isoformat(),
        "generation": rotation.generation,
        "version": rotation.version,
        "options": rotation.options,
        "selection": rotation.selection,
        "error": rotation.error,
    }


def _table(rotations: list[Rotation]) -> str:
    rows = [("ID", "TARGET", "STATUS", "ROWS", "%", "TIME", "OWNER", "LAST HEARD OF")]
    rows += [
        (
            str(rotation.pk),
            rotation.target,
            rotation.status,
            _rows(rotation),
            str(_percent(rotation)),
            duration(rotation.active_seconds),
            _owner(rotation),
            _age(rotation),
        )
        for rotation in rotations
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _details(rotation: Rotation) -> str:
    facts = [
        ("target", f"{rotation.target} in database '{rotation.database}'"),
        ("table", rotation.table_name),
        ("chosen by", str(Selection.read(rotation.selection))),
        ("status", rotation.status),
        ("rows", f"{_rows(rotation)} ({_percent(rotation)}%)"),
        ("late rows", count(rotation.late_rows)),
        ("time", f"{duration(rotation.active_seconds)} over all runs"),
        ("owner", f"{_owner(rotation)} since {_moment(rotation.owned_since)}"),
        ("started", _moment(rotation.started_at)),
        ("heard of", f"{_moment(rotation.updated_at)}, {_age(rotation)}"),
        ("finished", _moment(rotation.finished_at) if rotation.finished_at else "not yet"),
        ("generation", str(rotation.generation)),
        ("version", rotation.version),
    ]
    if rotation.unconfirmed_rows is not None:
        facts.append(("others", unconfirmed(rotation.unconfirmed_rows) or "every row is confirmed"))
    if rotation.error:
        facts.append(("error", rotation.error))
    return "\n".join([f"Rotation {rotation.pk}", *(f"  {label:<10} {value}" for label, value in facts)])


def _rows(rotation: Rotation) -> str:
    about = "" if rotation.rows_total_is_exact else "about "
    return f"{count(rotation.rows_done)} of {about}{count(rotation.rows_total)}"


def _percent(rotation: Rotation) -> int:
    if rotation.status == Rotation.Status.COMPLETED:
        return 100
    return min(99, 100 * rotation.rows_done // rotation.rows_total) if rotation.rows_total else 0


def _owner(rotation: Rotation) -> str:
    return f"{rotation.owner_user or 'somebody'}@{rotation.owner_host} pid {rotation.owner_pid}"


def _age(rotation: Rotation) -> str:
    return f"{duration(_silent_seconds(rotation))} ago"


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
