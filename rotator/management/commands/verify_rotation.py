"""``manage.py verify_rotation``: search a rotated table for old values, and repair it."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, TypedDict, Unpack

from django.core.management import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections

from rotator.events import ignore
from rotator.exceptions import OptionError
from rotator.fields.target import find_fields
from rotator.management.rotation import read_rotations
from rotator.management.terminal import INTERRUPTED, OwnCommand, writable, write_report
from rotator.models import Rotation
from rotator.options import RunOptions, Selection, is_id, not_empty
from rotator.progress.lines import LinesObserver, Sink
from rotator.progress.summary import verification_report, verification_summary
from rotator.progress.text import leaked_values


def make_no_value(_row: object) -> NoReturn:
    """Raise an error: a check makes no values.

    A target needs a generator. One that takes rows is not called before the first row is rotated.
    """
    raise NotImplementedError


_GENERATOR: Final = f"{__name__}.{make_no_value.__name__}"


class Options(TypedDict):
    rotation: str
    database: str | None
    repair: bool
    leaked: str | None
    leaked_column: str | None
    json: bool
    report: Path | None
    verbosity: int


_Result: TypeAlias = tuple[dict[str, object], str, int]
"""The result of a verification: as JSON types, as text, and the exit status."""


class Command(OwnCommand):
    help = (
        "Verify a rotation: count the rows that it has written and those that it has not, and search the "
        "table for values that are in its ledger (see --prove of async_rotate). The exit status is 0 only if "
        "nothing is left and no control has failed. The same command resumes an interrupted verification, "
        "and can be run again for as long as the ledger exists, for example by cron."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "rotation",
            metavar="ID",
            help="The id of the rotation. With --leaked, app.Model.field can replace it.",
        )
        parser.add_argument(
            "--database",
            choices=tuple(connections),
            help=f"The alias of the database that holds the target (default: {DEFAULT_DB_ALIAS}; for "
            "app.Model.field, the one that the routers write the model to).",
        )
        parser.add_argument(
            "--repair",
            action="store_true",
            help="Give the rows with an old value new values, and no other rows, and verify again.",
        )
        parser.add_argument(
            "--leaked",
            type=not_empty,
            metavar="FILE|-",
            help="Only count which of the leaked values of this file, or of the standard input (-), the rows "
            "have now. Needs no ledger. See --leaked of async_rotate.",
        )
        parser.add_argument(
            "--leaked-column",
            type=not_empty,
            metavar="NAME",
            help="The name of the column with the values, if the file of --leaked is a CSV file.",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON.")
        parser.add_argument(
            "--report", type=Path, metavar="FILE", help="Also write the result to this file, as JSON."
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        try:
            report_file = writable(options["report"])
            verify = self._count_leaked if options["leaked"] else self._verify
            facts, text, exit_status = verify(options)
        except KeyboardInterrupt:
            # Ends the line of ^C.
            self.stderr.write("")
            raise CommandError(
                "Stopped. The same command resumes the verification.", returncode=INTERRUPTED
            ) from None
        if options["verbosity"] or exit_status:
            Sink(self.out).write_line(json.dumps(facts, indent=2) if options["json"] else text)
        write_report(report_file, facts)
        if exit_status:
            sys.exit(exit_status)

    def _count_leaked(self, options: Options) -> _Result:
        from rotator.api import prepare  # noqa: PLC0415 - imports the engine, which --help does not need

        if options["repair"]:
            raise OptionError(
                "--repair needs the ledger. To rotate the rows with leaked values, use async_rotate --leaked."
            )
        rotation = _find(options)
        labels = [options["rotation"]] if rotation is None else rotation.target.split()
        fields = find_fields(labels)
        # A check makes no values, and looks at all rows.
        selection = Selection(
            generator=_GENERATOR,
            include_blank=True,
            ignore_derived=tuple(
                each.name for each in fields[0].model._meta.concrete_fields if each not in fields
            ),
        )
        database = options["database"] if rotation is None else _database(options)
        prepared = replace(
            prepare(labels, database, RunOptions(), selection), keeps_connections=self.is_called_by_code
        )
        found = prepared.count_leaked(options["leaked"] or "", options["leaked_column"] or "")
        facts = {"rotation": rotation and rotation.pk, "target": " ".join(labels)}
        return facts | asdict(found), f"{leaked_values(found)}.", int(found.found > 0)

    def _verify(self, options: Options) -> _Result:
        from rotator.api import prepare_again  # noqa: PLC0415 - imports the engine, which --help does not need

        rotation = _find(options)
        if rotation is None:
            raise OptionError(
                "Without --leaked, a verification needs the id of a rotation. List the ids with: "
                "manage.py rotations"
            )
        if options["leaked_column"]:
            raise OptionError("--leaked-column names a column of the file of --leaked. Use both.")
        observer = LinesObserver(self.err) if options["verbosity"] else ignore
        if rotation.selection.get("leaked"):
            raise OptionError(
                f"Rotation {rotation.pk} rotated only the rows with leaked values. Verify it with --leaked."
            )
        prepared = replace(
            prepare_again(rotation, _database(options)), keeps_connections=self.is_called_by_code
        )
        verified = prepared.verify(observer, rotation.pk, repairs=options["repair"])
        return verification_report(verified), verification_summary(verified), verified.exit_status


def _find(options: Options) -> Rotation | None:
    """Return the rotation; None where a field is named instead of an id."""
    name = options["rotation"]
    if not is_id(name):
        return None
    (rotation,) = read_rotations(_database(options), int(name))
    return rotation


def _database(options: Options) -> str:
    """Return the alias of the database with the rotation of an id."""
    return options["database"] or DEFAULT_DB_ALIAS
