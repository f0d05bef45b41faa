"""``manage.py create_tickets``: fill the table."""

import sys
import time
from typing import TypedDict, Unpack

from alive_progress import alive_bar
from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections

from tickets import bulk
from tickets.models import Ticket

DEFAULT_COUNT = 1_000_000
DEFAULT_BATCH_ROWS = 10_000
_INTERRUPTED_STATUS = 130


class Options(TypedDict):
    """The options, as the command line or ``call_command`` gives them."""

    count: int | None
    total: int | None
    batch_size: int
    database: str
    verbosity: int


class Command(BaseCommand):
    """Creates tickets."""

    help = (
        "Create tickets, each with its own token from the model's default. They are streamed by COPY, one "
        "transaction for each batch; Ctrl-C keeps the batches that are committed. At the end the table is "
        "vacuumed and analyzed."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--count",
            type=int,
            metavar="N",
            help=f"Add N tickets (default: {DEFAULT_COUNT}). Not together with --total.",
        )
        parser.add_argument("--total", type=int, metavar="N", help="Add tickets until there are N.")
        parser.add_argument(
            "--batch-size",
            type=int,
            metavar="ROWS",
            default=DEFAULT_BATCH_ROWS,
            help="Commit after this many rows (default: %(default)s).",
        )
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            choices=tuple(connections),
            help="The alias of the database that holds the tickets (default: %(default)s).",
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Create the tickets that are missing."""
        _check(options)
        connection = bulk.postgresql(options["database"])
        with bulk.errors_in_one_sentence(connection.alias):
            there = Ticket.objects.using(connection.alias).count() if options["total"] is not None else 0
        wanted = next((n for n in (options["total"], options["count"]) if n is not None), DEFAULT_COUNT)
        if there >= wanted:
            self.stdout.write(f"Nothing to do: there are {there:,} tickets already.")
            return
        count, created, started = wanted - there, 0, time.monotonic()
        try:
            with bulk.errors_in_one_sentence(connection.alias):
                is_quiet = options["verbosity"] == 0 or not sys.stderr.isatty()
                with alive_bar(count, title="Tickets", file=sys.stderr, disable=is_quiet) as advance:
                    for rows in bulk.create(connection, count, options["batch_size"]):
                        created += rows
                        advance(rows)
                seconds = time.monotonic() - started
                bulk.vacuum_and_analyze(connection)
        except CommandError as error:
            raise CommandError(f"{error} The {created:,} tickets created before that are kept.") from error
        except KeyboardInterrupt:
            self.stderr.write("Interrupted: the tickets of the committed batches are kept.")
            sys.exit(_INTERRUPTED_STATUS)
        if options["verbosity"] > 0:
            self.stdout.write(
                f"Created {created:,} tickets in {seconds:.1f} s ({created / seconds:,.0f} rows/s), then "
                "vacuumed and analyzed their table."
            )


def _check(options: Options) -> None:
    if options["count"] is not None and options["total"] is not None:
        raise CommandError("Use either --count, to add tickets, or --total, to fill up to a number.")
    numbers = {"count": options["count"], "total": options["total"], "batch-size": options["batch_size"]}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise CommandError(f"--{name} must be 1 or more, not {number}.")
