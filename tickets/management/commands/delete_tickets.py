"""``manage.py delete_tickets``: empty the table."""

import sys
from typing import Unpack

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db.backends.base.base import BaseDatabaseWrapper

from tickets.database import DatabaseOptions, add_database_option, errors_in_one_sentence, postgresql
from tickets.deletion import Deletion, delete_all
from tickets.interruption import EXIT_STATUS
from tickets.models import Ticket


class Options(DatabaseOptions):
    """The options, as the command line or ``call_command`` gives them."""

    interactive: bool


class Command(BaseCommand):
    """Deletes every ticket, after asking."""

    help = (
        "Delete all tickets: by TRUNCATE, or by DELETE where another table refers to them. "
        "New tickets go on with the next id; ids of deleted ones do not come back."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="Delete without asking.",
        )
        add_database_option(parser)

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Ask where somebody can answer, then delete."""
        connection = postgresql(options["database"])
        try:
            with errors_in_one_sentence(connection.alias):
                if options["interactive"] and not self._confirmed(connection):
                    return
                deletion = delete_all(connection)
        except KeyboardInterrupt:
            self.stderr.write("Interrupted: the tickets were deleted all or none; run this again to see.")
            sys.exit(EXIT_STATUS)
        if options["verbosity"] > 0:
            self.stdout.write(_summary(deletion))

    def _confirmed(self, connection: BaseDatabaseWrapper) -> bool:
        if not sys.stdin.isatty():
            raise CommandError("Nobody can be asked without a terminal: use --noinput to delete all tickets.")
        rows = Ticket.objects.using(connection.alias).count()
        if rows == 0:
            self.stdout.write("Nothing to do: there are no tickets.")
            return False
        name = connection.settings_dict["NAME"]
        try:
            answer = input(f"Delete all {rows:,} tickets in the database '{name}'? Type 'yes' to go on: ")
        except EOFError:
            answer = ""
        if answer.strip().lower() == "yes":
            return True
        self.stdout.write("Nothing was deleted.")
        return False


def _summary(deletion: Deletion) -> str:
    if deletion.referring_tables:
        how = f"DELETE, since {', '.join(deletion.referring_tables)} may refer to them"
    else:
        how = "TRUNCATE"
    return f"Deleted {deletion.rows:,} tickets by {how}. New ones go on with the next id."
