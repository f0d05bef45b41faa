"""``manage.py delete_tickets``: empty the table."""

import sys
from typing import TypedDict, Unpack

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from tickets import bulk
from tickets.models import Ticket

_INTERRUPTED_STATUS = 130


class Options(TypedDict):
    """The options, as the command line or ``call_command`` gives them."""

    interactive: bool
    database: str
    verbosity: int


class Command(BaseCommand):
    """Deletes every ticket, after a question."""

    help = (
        "Delete all tickets: by TRUNCATE, or by DELETE where another table refers to them. "
        "The ids of deleted tickets are not used again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="Delete without a question.",
        )
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            choices=tuple(connections),
            help="The alias of the database that holds the tickets (default: %(default)s).",
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Ask on a terminal, then delete."""
        connection = bulk.postgresql(options["database"])
        try:
            with bulk.errors_in_one_sentence(connection.alias):
                if options["interactive"] and not self._confirmed(connection):
                    return
                rows, referring_tables = bulk.delete_all(connection)
        except KeyboardInterrupt:
            self.stderr.write("Interrupted: either all tickets were deleted or none.")
            sys.exit(_INTERRUPTED_STATUS)
        if options["verbosity"] > 0:
            how = f"DELETE, since {', '.join(referring_tables)} may refer to them"
            self.stdout.write(f"Deleted {rows:,} tickets by {how if referring_tables else 'TRUNCATE'}.")

    def _confirmed(self, connection: BaseDatabaseWrapper) -> bool:
        if not sys.stdin.isatty():
            raise CommandError("Cannot prompt without a terminal: use --noinput to delete all tickets.")
        rows = Ticket.objects.using(connection.alias).count()
        if rows == 0:
            self.stdout.write("Nothing to do: there are no tickets.")
            return False
        name = connection.settings_dict["NAME"]
        try:
            answer = input(f"Delete all {rows:,} tickets in the database '{name}'? Type 'yes' to continue: ")
        except EOFError:
            answer = ""
        if answer.strip().lower() == "yes":
            return True
        self.stdout.write("Nothing was deleted.")
        return False
