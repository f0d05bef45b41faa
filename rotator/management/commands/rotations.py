"""``manage.py rotations``: list rotations with their progress, follow one, or control it while it runs."""

import json
import sys
import time
from pathlib import Path
from typing import Final, TextIO, TypedDict, Unpack

from django.core.management import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, Error, connections

from rotator.exceptions import OptionError
from rotator.management.control import VERBS, Request, await_answer, read_request, send
from rotator.management.evidence import evidence
from rotator.management.rotation import (
    age_of,
    control_text,
    detail_of,
    facts_of,
    find_rotations,
    first_line,
    owner_facts,
    read_rotations,
    reason_of,
    resume_command_of,
    rows_of,
    status_of,
    stored,
    target_facts,
)
from rotator.management.terminal import INTERRUPTED, OwnCommand, writable
from rotator.models import Action, Ledger, Rotation
from rotator.options import is_id, whole_number
from rotator.postgres.owner import this_process
from rotator.progress import can_draw
from rotator.progress.bar import fitting, terminal_columns
from rotator.progress.lines import Sink
from rotator.progress.text import GUARD_EFFECTS, count, duration, moment, one_line, plural, rate, unconfirmed
from rotator.stats import RecentRate

_FOLLOW_SECONDS: Final = 1.0
_CLEAR_REST: Final = "\x1b[K"
_LONGEST_BAR: Final = 30
_BAR_PART: Final = 5
_BORDERS: Final = 4


class Options(TypedDict):
    rotation: str | None
    request: list[str]
    database: str
    json: bool
    follow: bool
    log: bool
    all: bool
    revision: int | None
    unguard: bool
    forget: bool
    evidence: Path | None


class Command(OwnCommand):
    help = (
        "List the rotations of a database, the latest first, or show one of them in detail. With a request, "
        "control it while it runs: rotations 5 pause, resume, cancel, or set concurrency=2 pace=gentle "
        "batch=500. Write options after the request."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "rotation", nargs="?", metavar="ID", help="The id of a rotation: show only this one, in detail."
        )
        parser.add_argument(
            "request",
            nargs="*",
            metavar="REQUEST",
            help="pause: begin no more ranges. resume: end a pause. cancel: stop like Ctrl-C; the rotation "
            "can be resumed. set NAME=VALUE: change concurrency, batch or pace; the value default restores "
            "the option of the run.",
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
            "--log", action="store_true", help="With an ID: show what users and processes did with it."
        )
        parser.add_argument(
            "--all",
            action="store_true",
            help="Instead of an ID: pause or resume every unfinished rotation of the database.",
        )
        parser.add_argument(
            "--revision",
            type=whole_number,
            metavar="N",
            help="With a request: refuse it if another user has changed the rotation since this revision.",
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
        number, request = _read_words(options)
        rotations = read_rotations(options["database"], number)
        if options["unguard"] or options["forget"] or options["evidence"]:
            if number is None:
                raise CommandError("--unguard, --forget and --evidence need the ID of a rotation.")
            self._change_proof(rotations[0], options)
        elif request is not None:
            if options["all"]:
                rotations = [each for each in rotations if each.is_unfinished]
            self._send(rotations, request, options)
        elif options["follow"] or options["log"]:
            option = "follow" if options["follow"] else "log"
            if number is None:
                raise CommandError(f"--{option} needs the ID of a rotation: rotations ID --{option}.")
            if options["follow"]:
                self._follow(number, options["database"])
            else:
                self._log(rotations[0], options)
        else:
            self._show(rotations, number, options)

    def _show(self, rotations: list[Rotation], number: int | None, options: Options) -> None:
        if options["json"]:
            facts = [facts_of(rotation) for rotation in rotations]
            self.stdout.write(json.dumps(facts if number is None else facts[0], indent=2))
        elif number is not None:
            self.stdout.write(_details(rotations[0]))
        elif rotations:
            self.stdout.write(_table(rotations))
        else:
            self.stdout.write("There are no rotations in this database.")

    def _send(self, rotations: list[Rotation], request: Request, options: Options) -> None:
        """Send a request to the owners of rotations, and print their answers."""
        if not rotations:
            self.stdout.write("There are no unfinished rotations in this database.")
        by = this_process().user or "an unknown user"
        try:
            controls = [send(each, request, by=by, revision=options["revision"]) for each in rotations]
            answers = [await_answer(control, request, options["database"]) for control in controls]
        except Error as error:
            raise CommandError(
                f"Cannot store the request in the database '{options['database']}': {first_line(error)} If "
                "the database is the problem, send SIGUSR1 to the process of the rotation to pause it."
            ) from error
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        for answer in answers:
            self.stdout.write(answer.text)
        if not all(answer.is_applied for answer in answers):
            sys.exit(1)

    def _log(self, rotation: Rotation, options: Options) -> None:
        actions = stored(Action, rotation).order_by("pk")
        if options["json"]:
            facts = [
                {"at": each.at.isoformat(), "action": each.kind, "by": each.by, "detail": detail_of(each)}
                for each in actions
            ]
            self.stdout.write(json.dumps(facts, indent=2))
            return
        for each in actions:
            detail = f": {one_line(detail_of(each))}" if each.detail else ""
            self.stdout.write(f"{moment(each.at)}  {each.kind} by {each.by}{detail}")

    def _change_proof(self, rotation: Rotation, options: Options) -> None:
        """Remove the guard or the ledger, and write the evidence."""
        from rotator.api import drop_ledger  # noqa: PLC0415 - imports the engine, which a list does not need

        name = f"rotation {rotation.pk}"
        if options["forget"] and rotation.is_unfinished:
            raise CommandError(
                f"Cannot drop the ledger: {name} is unfinished and needs it. Finish it, or abandon it by "
                "async_rotate --restart."
            )
        try:
            if options["unguard"]:
                had = drop_ledger(options["database"], rotation.pk, only_guard=True)
                self.stdout.write(f"The guard of {name} is removed." if had else f"{name} has no guard.")
            if options["forget"]:
                had = drop_ledger(options["database"], rotation.pk, only_guard=False)
                self.stdout.write(f"The ledger of {name} is dropped." if had else f"{name} has no ledger.")
            if path := writable(options["evidence"]):
                path.write_text(evidence(rotation), encoding="utf-8")
                self.stdout.write(f"The evidence of {name} is in {path}.")
        except OSError as error:
            raise CommandError(f"The evidence could not be written: {error}") from error

    def _follow(self, number: int, database: str) -> None:
        progress = _FollowedProgress(self.out)
        try:
            while True:
                rotation = find_rotations(database).get(pk=number)
                progress.show(rotation)
                if not rotation.is_active:
                    break
                if rotation.is_dead:
                    raise CommandError(
                        f"The owner of rotation {rotation.pk}, {rotation.owner}, has ended or sends no "
                        "heartbeat, and the rotation is unfinished. Resume with: "
                        f"{resume_command_of(rotation, hides_keys=False)}"
                    )
                time.sleep(_FOLLOW_SECONDS)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Error as error:
            raise CommandError(
                f"Lost the connection to the database: {first_line(error)} The rotation may still run."
            ) from error
        finally:
            progress.close()
        if rotation.status != Rotation.Status.COMPLETED:
            left = reason_of(rotation) or rotation.error or f"it is {rotation.status}"
            raise CommandError(f"Rotation {rotation.pk} is unfinished: {left}")


class _FollowedProgress:
    """Shows each change of a rotation's progress: redraws a line of a terminal, or writes a new line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._sink = stream, Sink(stream)
        self._is_live = can_draw(stream)
        # Not from the checkpoints, which late and leaked rows have none of.
        self._rate = RecentRate()
        self._rows_seen: int | None = None
        self._written = ""

    def show(self, rotation: Rotation) -> None:
        now, rows = time.monotonic(), rotation.rows_done
        seen = rows if self._rows_seen is None else self._rows_seen
        if rows > seen:
            self._rate.add(rows - seen, now=now, seconds=1.0)
        elif rows < seen:
            self._rate.restart()
        self._rows_seen = rows
        held, figures = rotation.held_by, list[str]()
        if rotation.status == Rotation.Status.RUNNING and not rotation.is_silent and not held:
            speed = self._rate.rows_per_second(now)
            left = rotation.rows_total - rows
            eta = self._rate.eta_seconds(left, now, is_exact=rotation.rows_total_is_exact)
            figures = [
                "unknown rate" if speed is None else f"{rate(speed)} rows/s",
                f"ETA {'unknown' if speed is None or eta is None else duration(eta)}",
            ]
        status, percent = status_of(rotation), rotation.percent
        note = "waiting for a worker" if rotation.status == Rotation.Status.QUEUED else held
        progress = f"{status}: {rows_of(rotation, ' rows')} ({percent}%)"
        text = ", ".join(filter(None, [progress, *figures, note]))
        if self._is_live:
            short = "  ".join([f"{percent}%", *figures])
            self._draw([text, f"{status}  {short}", short, f"{percent}%"], percent)
        elif text != self._written:
            self._sink.write_line(text)
        self._written = text

    def close(self) -> None:
        if self._is_live and self._written:
            self._sink.write("\n")

    def _draw(self, texts: list[str], percent: int) -> None:
        columns = terminal_columns(self._stream)
        length = min(_LONGEST_BAR, columns // _BAR_PART)
        filled = length * percent // 100
        bar = f"|{'█' * filled}{' ' * (length - filled)}| "
        self._sink.write(f"\r{bar}{fitting(texts, columns - length - _BORDERS)}{_CLEAR_REST}")


def _read_words(options: Options) -> tuple[int | None, Request | None]:
    """Return the id of the rotation and the request; None where the command line has none."""
    words = [*filter(None, [options["rotation"]]), *options["request"]]
    number = int(words.pop(0)) if words and is_id(words[0]) else None
    if options["all"]:
        if number is not None or words not in (["pause"], ["resume"]):
            raise OptionError("--all is for one of these: rotations pause --all, rotations resume --all.")
    elif words and number is None:
        if words[0] in VERBS:
            raise OptionError(f"{words[0]} needs the ID of a rotation: rotations ID {words[0]}.")
        raise OptionError(f"'{words[0]}' is not the ID of a rotation.")
    if options["revision"] is not None and (not words or options["all"]):
        raise OptionError("--revision needs an ID and a request, e.g. rotations ID pause --revision 3.")
    return number, read_request(words) if words else None


def _table(rotations: list[Rotation]) -> str:
    rows = [("ID", "TARGET", "STATUS", "ROWS", "%", "TIME", "OWNER", "LAST HEARTBEAT")]
    rows += [
        (
            str(rotation.pk),
            rotation.target,
            status_of(rotation),
            rows_of(rotation),
            str(rotation.percent),
            duration(rotation.active_seconds),
            str(rotation.owner),
            age_of(rotation),
        )
        for rotation in rotations
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _details(rotation: Rotation) -> str:
    held, throttled = rotation.held_by, rotation.throttled_seconds
    since = f", since {moment(rotation.throttled_since)}" if rotation.throttled_since else ""
    confirmed = ""
    if rotation.unconfirmed_rows is not None:
        confirmed = unconfirmed(rotation.unconfirmed_rows) or "every row is confirmed"
    facts = [
        *target_facts(rotation, hides_keys=False),
        ("status", status_of(rotation)),
        ("rows", f"{rows_of(rotation)} ({rotation.percent}%)"),
        ("late rows", count(rotation.late_rows)),
        ("deferrals", count(rotation.deferrals)),
        ("retries", count(rotation.retries)),
        *owner_facts(rotation),
        ("confirmed", confirmed),
        ("ledger", _ledger(rotation.ledger_row)),
        ("reason", reason_of(rotation)),
        ("error", rotation.error),
        ("throttled", f"{duration(throttled)} over all runs" if throttled else ""),
        ("held", f"{held}{since}" if held else ""),
        ("control", control_text(rotation)),
        ("resume", resume_command_of(rotation, hides_keys=False)),
    ]
    lines = [f"  {label:<10} {value}" for label, value in facts if value]
    return "\n".join([f"Rotation {rotation.pk}", *lines])


def _ledger(ledger: Ledger | None) -> str:
    if ledger is None:
        return ""
    entries = plural(ledger.entries, "entry") if ledger.state != Ledger.State.FORGOTTEN else ""
    guard = f"guard: {GUARD_EFFECTS[ledger.guard]}" if ledger.guard else "no guard"
    return ", ".join(filter(None, (str(ledger.state), entries, guard)))
