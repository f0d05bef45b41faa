"""``manage.py create_tickets``: fill the table."""

import sys
import time
from contextlib import nullcontext
from typing import NotRequired, TextIO, Unpack

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db.backends.base.base import BaseDatabaseWrapper

from tickets import creation
from tickets.database import DatabaseOptions, add_database_option, errors_in_one_sentence, postgresql
from tickets.interruption import EXIT_STATUS, ctrl_c_asks_first
from tickets.models import Ticket
from tickets.progress import progress

DEFAULT_COUNT = 1_000_000
DEFAULT_BATCH_ROWS = 10_000


class Options(DatabaseOptions):
    """The options, as the command line or ``call_command`` gives them."""

    count: int | None
    total: int | None
    batch_size: int
    stderr: NotRequired[TextIO | None]


class Command(BaseCommand):
    """Makes tickets; what one batch commits stays, whatever happens to the next."""

    help = (
        "Make tickets, each with its own token from the model's default. They are streamed with COPY, one "
        "transaction a batch; Ctrl-C ends after the batch in hand, a second Ctrl-C abandons it. At the end "
        "the table is vacuumed and analyzed, so that the planner knows it and index-only scans can skip its "
        "heap."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--count",
            type=int,
            metavar="N",
            help=f"Add N tickets (default: {DEFAULT_COUNT}). Not together with --total.",
        )
        parser.add_argument(
            "--total",
            type=int,
            metavar="N",
            help="Add as many tickets as the table lacks to hold N.",
        )
        parser.add_argument(
            "--batch-size",
            type=int,
            metavar="ROWS",
            default=DEFAULT_BATCH_ROWS,
            help="Commit after this many rows (default: %(default)s).",
        )
        add_database_option(parser)

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Make the tickets that are asked for and not there yet."""
        _refuse_what_makes_no_sense(options)
        connection = postgresql(options["database"])
        with errors_in_one_sentence(connection.alias):
            there = Ticket.objects.using(connection.alias).count() if options["total"] is not None else 0
        wanted = next((n for n in (options["total"], options["count"]) if n is not None), DEFAULT_COUNT)
        if there >= wanted:
            self.stdout.write(f"Nothing to do: there are {there:,} tickets already.")
            return
        self._create(connection, wanted - there, options)

    def _create(self, connection: BaseDatabaseWrapper, count: int, options: Options) -> None:
        loud = options["verbosity"] > 0
        # Not self.stderr, which would end every piece of the bar with a newline.
        stream = options.get("stderr") or sys.stderr
        made = 0
        started = time.monotonic()
        try:
            with errors_in_one_sentence(connection.alias):
                with (
                    ctrl_c_asks_first() as interruption,
                    progress(count, stream) if loud else nullcontext(_say_nothing) as advance,
                ):
                    for rows in creation.create(connection, count, options["batch_size"]):
                        made += rows
                        advance(rows)
                        interruption.raise_if_asked()
                    # Before the bar is left, which waits for its next refresh.
                    seconds = time.monotonic() - started
                creation.tidy(connection)
        except CommandError as error:
            if made == 0:
                raise
            raise CommandError(f"{error} The {made:,} tickets made before that are kept.") from error
        except KeyboardInterrupt:
            self.stderr.write(f"Interrupted: {made:,} of {count:,} tickets were made, and are kept.")
            sys.exit(EXIT_STATUS)
        if loud:
            self.stdout.write(
                f"Made {made:,} tickets in {seconds:.1f} seconds ({made / seconds:,.0f} a second), "
                "then vacuumed and analyzed their table."
            )


def _say_nothing(_rows: int) -> None:
    """Take the place of the progress bar."""


def _refuse_what_makes_no_sense(options: Options) -> None:
    if options["count"] is not None and options["total"] is not None:
        raise CommandError(
            "Give either --count, to add tickets, or --total, to fill up to a number; not both."
        )
    for name in ("count", "total", "batch_size"):
        number = options[name]
        if number is not None and number < 1:
            option = name.replace("_", "-")
            raise CommandError(f"--{option} must be 1 or more, not {number}.")
