"""``manage.py async_rotate``: give every row of a column a new value."""

import signal
import sys
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.core.management import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections

from rotator.apps import default_target, hides_keys
from rotator.events import Observer, Preflighted, RotationStopped, StopReason
from rotator.exceptions import BrokerError, OptionError, StoppedBeforeStartError
from rotator.management.terminal import (
    OwnCommand,
    agrees,
    can_ask,
    hide_errors_of_lost_connections,
    hold_interrupts,
    is_terminal,
    resume_command,
    writable,
    write_report,
)
from rotator.options import COMMAND_OPTIONS, RotateOptions, RunOptions, Selection
from rotator.progress import PROGRESS_KINDS, open_progress, summary_stream
from rotator.progress.lines import Sink
from rotator.progress.preflight import preflight
from rotator.progress.summary import report, summary, verdict
from rotator.progress.text import duration, one_line, plural

if TYPE_CHECKING:
    from rotator.api import Prepared
    from rotator.runner.context import AskForHelp


class Command(OwnCommand):
    help = (
        "Give every row of a column a new value from the field's own default, or from --generator, while the "
        "site stays up. "
        "Each range of rows is committed together with its checkpoint, so the same command resumes an "
        "interrupted rotation, whatever ended it. The first Ctrl-C lets the ranges in flight commit, the "
        "second rolls them back."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        # The command to resume with omits some options, which it could not recognise as "--rest".
        parser.allow_abbrev = False
        default = ""
        # A run reports an invalid setting; --help need not.
        with suppress(OptionError):
            default = " ".join(default_target())
        parser.add_argument(
            "target",
            nargs="*",
            metavar="APP.MODEL.FIELD",
            help="The field to rotate; several fields of one table are written together"
            + (f" (default: {default})." if default else "."),
        )
        choices: dict[str, Any] = {"database": tuple(connections), "progress": PROGRESS_KINDS}
        for name, arguments in COMMAND_OPTIONS.items():
            flags = ["--noinput", "--no-input"] if name == "noinput" else [f"--{name.replace('_', '-')}"]
            argument = parser.add_argument(*flags, **arguments)
            if name in choices:
                argument.choices = choices[name]

    def handle(self, *_args: object, **options: Any) -> None:  # noqa: ANN401 - the values of COMMAND_OPTIONS
        self._command_options: dict[str, Any] = options
        if not options["verbosity"]:
            options["progress"] = "none"
        if not self.is_called_by_code:
            hide_errors_of_lost_connections()
        try:
            stopped = self._run()
        except KeyboardInterrupt:
            # Ends the line of ^C.
            self.stderr.write("")
            raise StoppedBeforeStartError(signal.SIGINT) from None
        if stopped is not None and stopped.exit_status:
            sys.exit(stopped.exit_status)

    def _run(self) -> RotationStopped | None:
        """Do what the options ask for; return the end of a run, where this process made one."""
        from rotator.api import prepare  # noqa: PLC0415 - imports the engine, which --help does not need

        options = self._command_options
        if options["leaked"] and options["celery"]:
            raise OptionError("--leaked rotates in this process. Use it without --celery.")
        prepared = replace(
            prepare(options["target"], options["database"], _run_options(options), _selection(options)),
            keeps_connections=self.is_called_by_code,
        )
        report_file = writable(options["report"])
        prepared = prepared.with_leaked_values()
        if options["dry_run"]:
            with self._open_progress() as observer:
                findings = prepared.examine(observer)
            Sink(self.out).write_line(preflight(findings))
            return None
        if prepared.options.reindex and not prepared.options.restart:
            with self._open_progress() as observer:
                earlier = prepared.earlier(observer)
            if earlier.unfinished is None and earlier.completed is not None:
                self._reindex(prepared, earlier.completed.id)
                return None
        ask_for_help = self._ask_for_help(prepared.target.database)
        if options["detach"]:
            self._queue(prepared)
            return None
        stopped = self._rotate(prepared, ask_for_help, report_file)
        if ask_for_help is not None and not options["noinput"] and self._agrees_to_queue(stopped):
            self._queue(replace(prepared, options=prepared.options.for_next_run()))
        return stopped

    def _rotate(
        self, prepared: "Prepared", ask_for_help: "AskForHelp | None", report_file: Path | None
    ) -> RotationStopped:
        ends_process = ask_for_help is None and not self.is_called_by_code
        with hold_interrupts(ends_process=ends_process) as note_start:
            with self._open_progress() as observer:
                prepared = self._agree(prepared, observer)
                stopped = prepared.rotate(note_start(observer), ask_for_help)
            self._summarize(stopped, report_file)
        return stopped

    def _open_progress(self) -> AbstractContextManager[Observer]:
        return open_progress(
            self._command_options["progress"], out=self.out, err=self.err, hides_keys=hides_keys()
        )

    def _ask_for_help(self, database: str) -> "AskForHelp | None":
        options = self._command_options
        if not options["celery"]:
            if options["detach"]:
                raise OptionError("--detach queues the rotation for Celery workers. Use it with --celery.")
            return None
        if options["detach"] and options["stop_after"] is not None:
            raise OptionError(
                "--stop-after stops the run of this process, but with --detach it has no run. Leave one out."
            )
        try:
            from rotator.tasks import ask_for_help, load_app  # noqa: PLC0415 - an optional dependency
        except ModuleNotFoundError as error:
            raise OptionError(
                f"--celery needs {error.name}. Run: pip install 'celery[redis]>=5.5'"
            ) from error
        load_app()
        return partial(ask_for_help, database)

    def _queue(self, prepared: "Prepared") -> None:
        """Begin or resume a rotation, and leave it to Celery workers."""
        from rotator.tasks import hand_over  # noqa: PLC0415 - an optional dependency

        with self._open_progress() as observer:
            rotation = self._agree(prepared, observer).begin(observer)
        database = prepared.target.database
        try:
            hand_over(database, rotation)
        except BrokerError as error:
            raise BrokerError(
                f"{error} Rotation {rotation} has begun. Run the same command again to queue it."
            ) from error
        where = "" if database == DEFAULT_DB_ALIAS else f" --database {database}"
        if self._command_options["verbosity"]:
            self.stderr.write(
                f"Rotation {rotation} is queued for Celery workers. Watch it with: "
                f"manage.py rotations {rotation} --follow{where}"
            )

    def _reindex(self, prepared: "Prepared", rotation: int) -> None:
        """Rebuild the indexes that the run of a completed rotation has left."""
        with self._open_progress() as observer:
            statements = prepared.reindex(observer, rotation)
        if statements:
            raise CommandError(
                f"Not every index of rotation {rotation} was rebuilt. Run: {' '.join(statements)}"
            )
        if self._command_options["verbosity"]:
            self._write_summary(
                f"Rotation {rotation} of {prepared.target.label} is completed, and its indexes are rebuilt."
            )

    def _agree(self, prepared: "Prepared", observer: Observer) -> "Prepared":
        """Ask on a terminal whether to begin, and return the rotation that the user has agreed to."""
        if self._command_options["noinput"] or not can_ask():
            return prepared
        options, earlier = prepared.options, prepared.earlier(observer)
        unfinished, completed = earlier.unfinished, earlier.completed
        if unfinished is not None:
            if not options.restart:
                return prepared
            if not agrees(
                f"Rotation {unfinished.id} of {prepared.target.label} is unfinished, with "
                f"{unfinished.rows_done:,} of {unfinished.rows_total:,} rows done. "
                "Abandon it and rotate all rows again?"
            ):
                raise OptionError(
                    "Nothing was changed. Without --restart, the same command resumes the rotation."
                )
        elif completed is not None and not options.restart:
            if not agrees(
                f"Rotation {completed.id} completed {duration(completed.seconds_ago)} ago. "
                "Rotate all rows again?"
            ):
                raise OptionError("Nothing was changed.")
            # Not --restart, which would abandon a rotation that another process begins at this moment.
            options = replace(options, after=completed.id)
        sample = options.sample and options.preflight
        findings = replace(prepared, options=replace(options, sample=sample)).examine(observer)
        if options.preflight:
            observer(Preflighted(findings=findings))
        about = "" if findings.table.rows_is_exact else "about "
        rows = f"{about}{plural(findings.rows_left, 'row')}"
        leaked = prepared.target.leaked
        chosen = rows if leaked is None else f"the rows with one of {plural(len(leaked), 'leaked value')}"
        sys.stderr.write(f"{one_line(f'{findings.server_name}, table {findings.table_name}, {rows}')}\n")
        if not agrees(f"Rotate {chosen} of {prepared.target.label} now?"):
            raise OptionError("Nothing was changed.")
        return replace(
            prepared,
            options=replace(options, preflight=False),
            findings=findings if options.preflight else None,
        )

    def _agrees_to_queue(self, stopped: RotationStopped) -> bool:
        """Ask, after a Ctrl-C on a terminal, whether Celery workers continue."""
        if stopped.status != "interrupted" or stopped.stop_reason is not StopReason.SIGINT or not can_ask():
            return False
        try:
            return agrees("Queue the rotation for Celery workers, which continue without this terminal?")
        except KeyboardInterrupt:
            self.stderr.write("")
            return False

    def _summarize(self, stopped: RotationStopped, report_file: Path | None) -> None:
        # A program that calls this command has another command line.
        command = None
        if not self.is_called_by_code:
            command = resume_command(sys.argv, python=Path(sys.executable), folder=Path.cwd())
        if self._command_options["verbosity"]:
            self._write_summary(summary(stopped, resume_command=command))
        elif stopped.exit_status:
            Sink(self.err).write_line(verdict(stopped))
        write_report(report_file, report(stopped))

    def _write_summary(self, text: str) -> None:
        stream = summary_stream(self._command_options["progress"], out=self.out, err=self.err)
        Sink(stream).write_line(text)


def _run_options(options: dict[str, Any]) -> RunOptions:
    shared = RotateOptions.__annotations__.keys() & options.keys()
    return RunOptions.checked(
        **{name: options[name] for name in shared},
        stop_after=options["stop_after"],
        celery=options["celery"],
        vacuum=not options["no_vacuum"],
        preflight=not options["no_preflight"],
        # Only a reader needs the estimate.
        sample=not options["no_sample"] and (options["dry_run"] or is_terminal(sys.stderr)),
    )


def _selection(options: dict[str, Any]) -> Selection:
    return Selection(
        filters=tuple(options["filter"]),
        excludes=tuple(options["exclude"]),
        generator=options["generator"] or "",
        include_null=options["include_null"],
        include_blank=options["include_blank"],
        ignore_derived=tuple(options["ignore_derived"]),
        leaked=options["leaked"] or "",
        leaked_column=options["leaked_column"] or "",
    )
