"""``manage.py find_secrets``: list the columns of the project that look like secrets."""

import json
import shlex
import sys
from typing import Final, TypedDict, Unpack

from django.core.management import CommandParser
from django.db import DEFAULT_DB_ALIAS, connections

from rotator.exceptions import OptionError
from rotator.fields.secret_columns import Inventory, SecretColumn, search_copies, take_inventory
from rotator.fields.secret_rules import Kind
from rotator.management.terminal import OwnCommand
from rotator.models import Rotation
from rotator.options import whole_number
from rotator.postgres.copies import CopySearch
from rotator.progress.text import count, moment, plural

_HEADINGS: Final = {
    Kind.SECRET: "Secrets",
    Kind.HASHED: "Hashed secrets, which cannot be replaced by new ones",
    Kind.COPY: "Copies of other columns",
}


class Options(TypedDict):
    database: str
    json: bool
    copies_of: int | None
    all: bool


class Command(OwnCommand):
    help = (
        "List the columns of the project that look like secrets: by their names, types and defaults, by the "
        "packages that they belong to, and by a sample of their values. The command only reads, and "
        "prints no value."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            choices=tuple(connections),
            help="The alias of the database to search (default: %(default)s).",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON.")
        parser.add_argument(
            "--copies-of",
            type=whole_number,
            metavar="ID",
            help="Search all tables of the database for old values of this rotation, which must have a "
            "ledger (async_rotate --prove).",
        )
        parser.add_argument(
            "--all",
            action="store_true",
            help="With --copies-of: search all rows of every column, not a sample of each first.",
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        database, rotation = options["database"], options["copies_of"]
        if rotation is None:
            if options["all"]:
                raise OptionError("--all needs a rotation: find_secrets --copies-of ID --all.")
            inventory = take_inventory(database)
            facts, text = _facts(inventory, database), _text(inventory, database)
            is_complete = True
        else:
            search = search_copies(database, rotation, every_row=options["all"])
            facts, text = _copy_facts(search, rotation), _copy_text(search, rotation)
            is_complete = not search.problems
        self.stdout.write(json.dumps(facts, indent=2) if options["json"] else text)
        if not is_complete:
            sys.exit(1)


def _facts(inventory: Inventory, database: str) -> dict[str, object]:
    """Return the inventory as JSON types; these keys are an interface and only ever added to."""
    columns = [
        {
            "column": column.label,
            "table": column.table.name,
            "kind": column.finding.kind.value,
            "reasons": column.finding.reasons,
            "rows": column.table.rows,
            "rows_is_exact": column.table.rows_is_exact,
            "command": _command(column),
            "refusal": column.refusal,
            "advice": column.finding.advice,
            "last_rotation": (last := column.last_rotation)
            and {
                "rotation": last.pk,
                "finished_at": last.finished_at and last.finished_at.isoformat(),
                "is_filtered": last.is_filtered,
            },
        }
        for column in inventory.columns
    ]
    return {
        "database": database,
        "examined": inventory.examined,
        "columns": columns,
        "problems": inventory.problems,
    }


def _copy_facts(search: CopySearch, rotation: int) -> dict[str, object]:
    """Return the result of a search as JSON types; these keys are an interface and only ever added to."""
    return {
        "rotation": rotation,
        "columns_searched": search.columns,
        "copies": [
            {"table": each.table, "column": each.column, "rows": each.rows, "rows_searched": each.searched}
            for each in search.found
        ],
        "problems": search.problems,
    }


def _copy_text(search: CopySearch, rotation: int) -> str:
    lines = [
        f"  {each.table}.{each.column}: {count(each.rows)} of {plural(each.searched, 'row')}"
        for each in search.found
    ]
    blocks = [
        *_block("Columns with old values", lines),
        *_block("Not searched completely", [f"  {each}" for each in search.problems]),
    ]
    found = len(search.found)
    last = (
        f"Searched {plural(search.columns, 'column')} for old values of rotation {rotation}: "
        f"{count(found) if found else 'none'} {'has' if found == 1 else 'have'} copies."
    )
    if search.problems:
        last += f" {plural(len(search.problems), 'column')} could not be searched, and can have copies."
    blocks.append(last)
    return "\n\n".join(blocks)


def _text(inventory: Inventory, database: str) -> str:
    blocks = []
    for kind, heading in _HEADINGS.items():
        columns = [column for column in inventory.columns if column.finding.kind is kind]
        blocks += _block(heading, [_described(column) for column in columns])
    blocks += _block("Not examined", [f"  {problem}" for problem in inventory.problems])
    found = len(inventory.columns)
    blocks.append(
        f"Examined {plural(inventory.examined, 'column')} of the database '{database}': "
        f"{found or 'none'} {'looks' if found == 1 else 'look'} like secrets or copies of them."
    )
    return "\n\n".join(blocks)


def _block(heading: str, lines: list[str]) -> list[str]:
    return ["\n".join([f"{heading}:", *lines])] if lines else []


def _described(column: SecretColumn) -> str:
    rows = plural(column.table.rows, "row", is_exact=column.table.rows_is_exact)
    lines = [f"  {column.label}  ({rows})", f"    reason:   {'; '.join(column.finding.reasons)}"]
    if command := _command(column):
        lines.append(f"    rotate:   {command}")
    if column.refusal:
        lines.append(f"    refused:  {column.refusal}")
    if column.finding.advice:
        lines.append(f"    advice:   {column.finding.advice}")
    if column.finding.kind is Kind.SECRET and column.options is not None:
        lines.append(f"    rotated:  {_rotated(column.last_rotation)}")
    return "\n".join(lines)


def _command(column: SecretColumn) -> str:
    if column.options is None:
        return ""
    return shlex.join(["manage.py", "async_rotate", column.label, *column.options])


def _rotated(last: Rotation | None) -> str:
    if last is None or last.finished_at is None:
        return "never by async_rotate"
    part = ", only a part of the rows" if last.is_filtered else ""
    return f"{moment(last.finished_at)} by rotation {last.pk}{part}"
