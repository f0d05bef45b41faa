"""``manage.py rotations``: list rotations with their progress, or follow one."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Final, TextIO, TypedDict, Unpack

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, Error, connections
from django.db.models import DurationField, ExpressionWrapper, F, QuerySet
from django.db.models.functions import Now

from rotator import __version__
from rotator.events import StopReason
from rotator.exceptions import RotatorError
from rotator.management.evidence import evidence
from rotator.management.rotation import find_ledger, first_line, unreadable
from rotator.management.terminal import open_closed_streams, writable
from rotator.models import Ledger, Rotation
from rotator.options import RunOptions, Selection
from rotator.postgres.owner import Owner
from rotator.progress import can_draw
from rotator.progress.following import FollowedProgress, Standing
from rotator.progress.text import (
    GUARD_ACTIONS,
    count,
    done_of_total,
    duration,
    moment,
    plural,
    stopped_by,
    unconfirmed,
)
from rotator.stats import percent_of

_FOLLOW_SECONDS: Final = 1.0
_SIGNAL_BASE: Final = 128
# A heartbeat comes each second.
_SILENT_SECONDS: Final = 10.0
_JUST_ENDED_SECONDS: Final = 3.0


class Options(TypedDict):
    """The options, as the command line or ``call_command`` gives them."""

    rotation: int | None
    database: str
    json: bool
    follow: bool
    unguard: bool
    forget: bool
    evidence: Path | None


class Command(BaseCommand):
    """Lists rotations."""

    help = "List the rotations of a database, the latest first, or show one of them in detail."
    requires_system_checks = ()

    def get_version(self) -> str:
        """Return the version of this app, not Django's, for ``--version``."""
        return __version__

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "rotation",
            nargs="?",
            type=int,
            metavar="ID",
            help="The id of a rotation: show only this one, in detail.",
        )
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            choices=tuple(connections),
            help="The alias of the database that holds the targets (default: %(default)s).",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON.")
        parser.add_argument(
            "--follow", action="store_true", help="With an ID: show its progress until it ends or stops."
        )

        parser.add_argument(
            "--unguard", action="store_true", help="With an ID: remove the guard that --guard has added."
        )
        parser.add_argument(
            "--forget",
            action="store_true",
            help="With an ID: drop the ledger that --prove has made, and the guard. Afterwards it is unknown "
            "whether old values survive.",
        )
        parser.add_argument(
            "--evidence",
            type=Path,
            metavar="FILE",
            help="With an ID: write what is proved, and what is not, to this file as JSON.",
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Print the rotations."""
        open_closed_streams(self)
        number = options["rotation"]
        silence = ExpressionWrapper(Now() - F("updated_at"), output_field=DurationField())
        found = Rotation.objects.using(options["database"]).annotate(silence=silence).order_by("-pk")
        try:
            rotations = list(_chosen(found, number))
        except Error as error:
            raise unreadable(options["database"], error) from error
        if number is not None and not rotations:
            raise CommandError(f"There is no rotation {number} in the database '{options['database']}'.")
        if options["unguard"] or options["forget"] or options["evidence"]:
            if number is None:
                raise CommandError("--unguard, --forget and --evidence need the ID of a rotation.")
            self._change_proof(rotations[0], options)
        elif options["follow"]:
            self._follow(found, number)
        elif options["json"]:
            facts = [_facts(rotation) for rotation in rotations]
            self.stdout.write(json.dumps(facts if number is None else facts[0], indent=2))
        elif number is not None:
            self.stdout.write(_details(rotations[0]))
        elif rotations:
            self.stdout.write(_table(rotations))
        else:
            self.stdout.write("There are no rotations in this database.")

    def _change_proof(self, rotation: Rotation, options: Options) -> None:
        """Remove the guard or the ledger, and write the evidence."""
        from rotator.api import drop_ledger  # noqa: PLC0415 - imports the engine, which a list does not need

        name = f"rotation {rotation.pk}"
        if options["forget"] and rotation.status in Rotation.UNFINISHED:
            raise CommandError(
                f"Cannot drop the ledger: {name} is unfinished and needs it. Finish it, or abandon it by "
                "async_rotate --restart."
            )
        try:
            if options["unguard"]:
                had_guard = drop_ledger(options["database"], rotation.pk, only_guard=True)
                self.stdout.write(
                    f"The guard of {name} is removed." if had_guard else f"{name} has no guard."
                )
            if options["forget"]:
                had_ledger = drop_ledger(options["database"], rotation.pk, only_guard=False)
                self.stdout.write(
                    f"The ledger of {name} is dropped." if had_ledger else f"{name} has no ledger."
                )
            if path := writable(options["evidence"]):
                path.write_text(evidence(rotation), encoding="utf-8")
                self.stdout.write(f"The evidence of {name} is in {path}.")
        except RotatorError as error:
            raise CommandError(str(error), returncode=error.exit_status) from error
        except OSError as error:
            raise CommandError(f"The evidence could not be written: {error}") from error

    def _follow(self, found: QuerySet[Rotation], number: int | None) -> None:
        if number is None:
            raise CommandError("--follow needs the ID of a rotation: rotations ID --follow.")
        stream: TextIO = vars(self.stdout)["_out"]
        progress = FollowedProgress(stream, clock=time.monotonic, is_live=can_draw(stream))
        try:
            while True:
                rotation = found.get(pk=number)
                progress.show(_standing(rotation))
                if rotation.status != Rotation.Status.RUNNING and not _awaits_workers(rotation):
                    break
                if _is_dead(rotation):
                    raise CommandError(
                        f"The owner of rotation {rotation.pk}, {_owner(rotation)}, has ended or sends no "
                        "heartbeat, and the rotation is unfinished. Run its command again to resume it."
                    )
                time.sleep(_FOLLOW_SECONDS)
        except KeyboardInterrupt:
            sys.exit(_SIGNAL_BASE + signal.SIGINT)
        except Error as error:
            raise CommandError(
                f"Lost the connection to the database: {first_line(error)} The rotation may still run."
            ) from error
        finally:
            progress.close()
        if rotation.status != Rotation.Status.COMPLETED:
            left = stopped_by(_stop_reason(rotation)) or rotation.error or f"it is {rotation.status}"
            raise CommandError(f"Rotation {rotation.pk} is unfinished: {left}")


def _standing(rotation: Rotation) -> Standing:
    """Return the progress of a rotation at this moment."""
    is_running = rotation.status == Rotation.Status.RUNNING
    return Standing(
        status=_status(rotation),
        is_working=is_running and not _is_silent(rotation),
        rows_done=rotation.rows_done,
        rows_total=rotation.rows_total,
        rows=_rows(rotation),
        percent=_percent(rotation),
        note="waiting for a worker" if _awaits_workers(rotation) else "",
    )


def _status(rotation: Rotation) -> str:
    """Return the status, or that a running rotation sends no heartbeat."""
    if _is_silent(rotation):
        return f"no heartbeat for {duration(_silent_seconds(rotation))}"
    return str(rotation.status)


def _is_silent(rotation: Rotation) -> bool:
    return rotation.status == Rotation.Status.RUNNING and _silent_seconds(rotation) > _SILENT_SECONDS


def _is_dead(rotation: Rotation) -> bool:
    """Return whether the owner of a running rotation has ended, or is silent for too long."""
    # A process that has just ended may have completed the rotation after it was read.
    if rotation.status != Rotation.Status.RUNNING or _silent_seconds(rotation) < _JUST_ENDED_SECONDS:
        return False
    budget_seconds = RunOptions.from_json(rotation.options).outage_budget_seconds
    return _owner(rotation).is_gone() or _silent_seconds(rotation) > budget_seconds + _SILENT_SECONDS


def _awaits_workers(rotation: Rotation) -> bool:
    return rotation.status == Rotation.Status.QUEUED


def _stop_reason(rotation: Rotation) -> StopReason | None:
    return StopReason(rotation.stop_reason) if rotation.stop_reason else None


def _silent_seconds(rotation: Rotation) -> float:
    # Measured with the database's clock, which also sets the heartbeat's time.
    return max(0.0, float(vars(rotation)["silence"].total_seconds()))


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
        "reason": stopped_by(_stop_reason(rotation)),
        "is_filtered": Selection.from_json(rotation.selection).is_filtered,
        "heartbeat_seconds_ago": round(_silent_seconds(rotation), 3),
        "ledger": ledger.state if (ledger := find_ledger(rotation)) else "",
        "guard": ledger.guard if ledger else "",
    }


def _table(rotations: list[Rotation]) -> str:
    rows = [("ID", "TARGET", "STATUS", "ROWS", "%", "TIME", "OWNER", "LAST HEARTBEAT")]
    rows += [
        (
            str(rotation.pk),
            rotation.target,
            _status(rotation),
            _rows(rotation),
            str(_percent(rotation)),
            duration(rotation.active_seconds),
            str(_owner(rotation)),
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
        ("chosen by", str(Selection.from_json(rotation.selection))),
        ("status", _status(rotation)),
        ("rows", f"{_rows(rotation)} ({_percent(rotation)}%)"),
        ("late rows", count(rotation.late_rows)),
        ("time", f"{duration(rotation.active_seconds)} over all runs"),
        ("owner", f"{_owner(rotation)} since {moment(rotation.owned_since)}"),
        ("started", moment(rotation.started_at)),
        ("heartbeat", f"{moment(rotation.updated_at)}, {_age(rotation)}"),
        ("finished", moment(rotation.finished_at) if rotation.finished_at else "not yet"),
        ("generation", str(rotation.generation)),
        ("version", rotation.version),
    ]
    if rotation.unconfirmed_rows is not None:
        facts.append(("confirmed", unconfirmed(rotation.unconfirmed_rows) or "every row is confirmed"))
    if ledger := find_ledger(rotation):
        facts.append(("ledger", _ledger(ledger)))
    if rotation.stop_reason:
        facts.append(("reason", stopped_by(_stop_reason(rotation))))
    if rotation.error:
        facts.append(("error", rotation.error))
    return "\n".join([f"Rotation {rotation.pk}", *(f"  {label:<10} {value}" for label, value in facts)])


def _ledger(ledger: Ledger) -> str:
    entries = plural(ledger.entries, "entry") if ledger.state != Ledger.State.FORGOTTEN else ""
    guard = f"guard: {GUARD_ACTIONS[ledger.guard]}" if ledger.guard else "no guard"
    return ", ".join(filter(None, (str(ledger.state), entries, guard)))


def _rows(rotation: Rotation) -> str:
    rows = done_of_total(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)
    rows += " that match the filter" if Selection.from_json(rotation.selection).is_filtered else ""
    return f"{rows} (last known)" if _is_silent(rotation) else rows


def _percent(rotation: Rotation) -> int:
    if rotation.status == Rotation.Status.COMPLETED:
        return 100
    if rotation.bound is None:
        # The rows are not counted yet.
        return 0
    return percent_of(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)


def _owner(rotation: Rotation) -> Owner:
    return Owner(
        host=rotation.owner_host,
        pid=rotation.owner_pid or 0,
        process=rotation.owner_process,
        user=rotation.owner_user,
        version=rotation.version,
    )


def _age(rotation: Rotation) -> str:
    return f"{duration(_silent_seconds(rotation))} ago"
