"""``manage.py async_rotate``: give every row of a column a new value."""

import json
import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, TextIO, TypedDict, Unpack

from django.core.management import BaseCommand, CommandError, CommandParser
from django.core.management.base import OutputWrapper
from django.db import DEFAULT_DB_ALIAS, connections

from rotator import __version__
from rotator.api import Outcome, Prepared, default_target, prepare
from rotator.events import Observer, Preflighted
from rotator.exceptions import BrokerError, OptionError, RotatorError, StoppedBeforeStartError
from rotator.management.options import resume_command, rows_or_seconds, seconds, writable
from rotator.management.terminal import Interrupts, agrees, can_ask, is_terminal, open_closed_streams
from rotator.options import MAX_BATCH_ROWS, RunOptions, Selection, WaitLimits
from rotator.progress import (
    PROGRESS_KINDS,
    ProgressKind,
    open_progress,
    preflight,
    report,
    summary,
    summary_stream,
)
from rotator.progress.lines import Sink
from rotator.progress.summary import verdict
from rotator.progress.text import duration, one_line, plural
from rotator.runner.context import AskForHelp

_SIGNAL_BASE: Final = 128


class Options(TypedDict):
    """The options, as the command line or ``call_command`` gives them."""

    target: list[str]
    concurrency: int
    batch: int
    database: str | None
    filter: list[str]
    exclude: list[str]
    generator: str
    include_null: bool
    include_blank: bool
    ignore_derived: list[str]
    celery: bool
    detach: bool
    restart: bool
    noinput: bool
    take_over: bool
    no_vacuum: bool
    dry_run: bool
    no_sample: bool
    no_preflight: bool
    stop_after: int | float | str | None
    lock_timeout: float | str
    outage_budget: float | str
    progress: ProgressKind
    report: Path | str | None
    verbosity: int


class Command(BaseCommand):
    """Rotates; a run that was interrupted goes on where it stopped."""

    help = (
        "Give every row of a column a new value from the field's own default, or from --generator, while the "
        "site stays up. "
        "Ranges of rows are committed together with their checkpoints, so the same command goes on where an "
        "interrupted one stopped, however it ended. The first Ctrl-C lets the ranges in flight commit, the "
        "second rolls them back."
    )

    # Checks of the whole project would hold up, or stop, what has to be done now.
    requires_system_checks = ()

    def get_version(self) -> str:
        """Return the version of this app, not Django's, for ``--version``."""
        return __version__

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        # The advice on how to go on leaves some options out, which it could not do with "--rest".
        parser.allow_abbrev = False
        defaults = RunOptions()
        named = ""
        # Said when it is needed, which it is not for --help.
        with suppress(OptionError):
            named = " ".join(default_target())
        parser.add_argument(
            "target",
            nargs="*",
            metavar="APP.MODEL.FIELD",
            help="What to rotate; several fields of one table are written together"
            + (f" (default: {named})." if named else "."),
        )
        parser.add_argument(
            "--concurrency",
            type=int,
            default=defaults.concurrency,
            metavar="N",
            help="How many workers write at the same time, a connection each (default: %(default)s).",
        )
        parser.add_argument(
            "--batch",
            type=int,
            default=defaults.batch,
            metavar="ROWS",
            help="How many rows a range holds; each is one transaction (default: %(default)s).",
        )
        parser.add_argument(
            "--database",
            choices=tuple(connections),
            help="The alias of the database that holds the target (default: the one that the project's "
            "database routers write the model to).",
        )
        parser.add_argument(
            "--filter",
            action="append",
            default=[],
            metavar="LOOKUP=VALUE",
            help="Rotate only the rows that match this Django lookup, e.g. status=active or "
            "created_at__lt=2026-11-01T00:00:00Z; may be given several times.",
        )
        parser.add_argument(
            "--exclude",
            action="append",
            default=[],
            metavar="LOOKUP=VALUE",
            help="Leave the rows alone that match this one; may be given several times.",
        )
        parser.add_argument(
            "--generator",
            default="",
            metavar="DOTTED.PATH",
            help="Make the values with this callable instead of the fields' defaults. It takes nothing, or "
            "the row's instance, and returns a value, or a mapping of field names to values.",
        )
        parser.add_argument(
            "--include-null",
            action="store_true",
            help="Give rows a value that have none (NULL); otherwise they keep it.",
        )
        parser.add_argument(
            "--include-blank",
            action="store_true",
            help="Also rotate rows whose value is the empty text; otherwise they keep it.",
        )
        parser.add_argument(
            "--ignore-derived",
            action="append",
            default=[],
            metavar="FIELD",
            help="Rotate although this field seems to derive its value from the target when a row is saved. "
            "The field keeps its values. May be given several times.",
        )
        parser.add_argument(
            "--celery",
            action="store_true",
            help="Have the project's Celery workers do it, each with --concurrency connections; this process "
            "plans and watches.",
        )
        parser.add_argument(
            "--detach",
            action="store_true",
            help="With --celery: have a worker plan and watch, too, and return; see rotations ID --follow. "
            "Takes two worker processes at the least.",
        )
        parser.add_argument(
            "--restart",
            action="store_true",
            help="Begin a new rotation: abandon the unfinished one, or rotate the same rows again after a "
            "completed one. Asks first on a terminal.",
        )
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_true",
            help="Do not ask before the first write. After a completed rotation, --restart is needed too.",
        )
        parser.add_argument(
            "--take-over",
            action="store_true",
            help="Take the rotation from the process that owns it, even if that is alive; it will stop.",
        )
        parser.add_argument(
            "--stop-after",
            metavar="ROWS|TIME",
            help="End the run after so many rows (5000) or so much time (90s, 30m, 2h), to go on later.",
        )
        parser.add_argument(
            "--lock-timeout",
            default=defaults.limits.lock_seconds,
            metavar="TIME",
            help="How long a range waits for a lock before it goes to the back of the queue; five times that "
            f"for all its locks (default: {defaults.limits.lock_seconds * 1000:.0f}ms).",
        )
        parser.add_argument(
            "--outage-budget",
            default=defaults.outage_budget_seconds,
            metavar="TIME",
            help="How long to wait for a server that is away before giving up "
            f"(default: {defaults.outage_budget_seconds / 60:.0f}m).",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Show what the rotation will meet, how long it will take and what cannot be undone, and "
            "exit. To estimate the time, it rewrites up to a thirtieth of the rows and rolls them back, "
            "which leaves dead rows and WAL behind; see --no-sample.",
        )
        parser.add_argument(
            "--no-sample",
            action="store_true",
            help="Do not rewrite rows to estimate the time, before a rotation or with --dry-run.",
        )
        parser.add_argument(
            "--no-preflight",
            action="store_true",
            help="Begin without showing that first; where nobody watches, it lacks the estimate of the time.",
        )
        parser.add_argument(
            "--no-vacuum",
            action="store_true",
            help="Leave the old row versions, and the space they take, to autovacuum; otherwise the table is "
            "vacuumed after each eighth of its rows and at the end.",
        )
        parser.add_argument(
            "--progress",
            choices=PROGRESS_KINDS,
            default="auto",
            help="How progress looks: a bar on a terminal and lines elsewhere (auto), or JSON lines on "
            "standard output (json) (default: %(default)s).",
        )
        parser.add_argument(
            "--report", type=Path, metavar="FILE", help="Write the summary to this file too, as JSON."
        )

    def handle(self, *_args: object, **options: Unpack[Options]) -> None:
        """Rotate, and exit with the status of the run."""
        if not options["verbosity"]:
            options["progress"] = "none"
        open_closed_streams(self)
        interrupts = Interrupts()
        with ExitStack() as until_told:
            try:
                prepared, report_file = self._prepare(options)
                if options["dry_run"]:
                    self._show(prepared)
                    return
                ask_for_help = self._ask_for_help(options, prepared.target.database)
                if options["detach"]:
                    self._hand_over(prepared, options)
                    return
                out, err = _raw(self.stdout), _raw(self.stderr)
                with open_progress(options["progress"], out=out, err=err) as observer:
                    prepared = self._agree(prepared, observer, options)
                    is_last = ask_for_help is None and bool(vars(self).get("_called_from_command_line"))
                    until_told.enter_context(interrupts.until_told(ends_process=is_last))
                    outcome = prepared.rotate(interrupts.noting(observer), ask_for_help)
            except RotatorError as error:
                raise CommandError(str(error), returncode=error.exit_status) from error
            self._tell(outcome, options, report_file)
        may_ask = ask_for_help is not None and not options["noinput"]
        if may_ask and self._is_left_to_the_workers(outcome):
            try:
                self._hand_over(_without_ends(prepared), options)
            except RotatorError as error:
                raise CommandError(str(error), returncode=error.exit_status) from error
        if outcome.exit_status:
            sys.exit(outcome.exit_status)

    def _ask_for_help(self, options: Options, database: str) -> AskForHelp | None:
        if not options["celery"]:
            if options["detach"]:
                raise OptionError("--detach leaves the rotation to Celery's workers: give it with --celery.")
            return None
        if options["detach"] and options["stop_after"] is not None:
            raise OptionError(
                "--stop-after ends the run of this process, and with --detach there is none: leave one out."
            )
        try:
            from rotator.tasks import ask_for_help, load_app  # noqa: PLC0415 - of an extra
        except ModuleNotFoundError as error:
            raise OptionError(f"--celery needs {error.name}: pip install 'celery[redis]>=5.5'.") from error
        load_app()
        return partial(ask_for_help, database)

    def _hand_over(self, prepared: Prepared, options: Options) -> None:
        from rotator.tasks import hand_over  # noqa: PLC0415 - of an extra

        try:
            with open_progress(options["progress"], out=_raw(self.stdout), err=_raw(self.stderr)) as observer:
                prepared = self._agree(prepared, observer, options)
                rotation = prepared.begin(observer)
        except KeyboardInterrupt:
            self.stderr.write("")
            raise StoppedBeforeStartError(signal.SIGINT) from None
        database = prepared.target.database
        try:
            hand_over(database, rotation)
        except BrokerError as error:
            raise BrokerError(
                f"{error} Rotation {rotation} is begun and nothing is lost: the same command tries again."
            ) from error
        where = "" if database == DEFAULT_DB_ALIAS else f" --database {database}"
        if options["verbosity"]:
            self.stderr.write(
                f"Rotation {rotation} is left to the workers; see how far they are with: "
                f"manage.py rotations {rotation} --follow{where}"
            )

    def _is_left_to_the_workers(self, outcome: Outcome) -> bool:
        """Ask whether they shall go on, after a Ctrl-C on a terminal."""
        is_interrupted = outcome.exit_status == _SIGNAL_BASE + signal.SIGINT
        if not is_interrupted or not can_ask():
            return False
        try:
            return agrees("Leave it to the workers, to go on without this terminal?")
        except KeyboardInterrupt:
            self.stderr.write("")
            return False

    def _show(self, prepared: Prepared) -> None:
        try:
            Sink(_raw(self.stdout)).write_line(preflight(prepared.examine()))
        except KeyboardInterrupt:
            self.stderr.write("")
            raise StoppedBeforeStartError(signal.SIGINT) from None

    def _prepare(self, options: Options) -> tuple[Prepared, Path | None]:
        try:
            selection = Selection(
                filters=tuple(options["filter"]),
                excludes=tuple(options["exclude"]),
                generator=options["generator"],
                include_null=options["include_null"],
                include_blank=options["include_blank"],
                ignore_derived=tuple(options["ignore_derived"]),
            )
            prepared = prepare(options["target"], options["database"], _run_options(options), selection)
            report_file = writable(options["report"])
        except KeyboardInterrupt:
            # Not in the middle of the line that says ^C.
            self.stderr.write("")
            raise StoppedBeforeStartError(signal.SIGINT) from None
        return prepared, report_file

    def _agree(self, prepared: Prepared, observer: Observer, options: Options) -> Prepared:
        """Ask on a terminal whether to begin; return what the user has agreed to.

        Raises:
            OptionError: The user has not agreed.
            StoppedBeforeStartError: The user has pressed Ctrl-C.
        """
        if options["noinput"] or not can_ask():
            return prepared
        try:
            return _agreed(prepared, observer)
        except KeyboardInterrupt:
            # Not in the middle of the line that says ^C.
            self.stderr.write("")
            raise StoppedBeforeStartError(signal.SIGINT) from None

    def _tell(self, outcome: Outcome, options: Options, report_file: Path | None) -> None:
        stream = summary_stream(options["progress"], out=_raw(self.stdout), err=_raw(self.stderr))
        # Called by another program, whose command line is none of ours, there is nothing to advise.
        command = (
            resume_command(sys.argv, python=Path(sys.executable), folder=Path.cwd())
            if vars(self).get("_called_from_command_line")
            else None
        )
        text = summary(outcome.stopped, resume_command=command)
        if not options["verbosity"]:
            stream = _raw(self.stderr)
            text = verdict(outcome.stopped) if outcome.exit_status else ""
        if text:
            Sink(stream).write_line(text)
        if report_file is not None:
            try:
                report_file.write_text(json.dumps(report(outcome.stopped), indent=2) + "\n")
            except OSError as error:
                raise CommandError(f"The report could not be written: {error}") from error


def _agreed(prepared: Prepared, observer: Observer) -> Prepared:
    """Ask what has to be asked before the first write of a new rotation.

    Raises:
        OptionError: The user has not agreed.
    """
    options, earlier = prepared.options, prepared.earlier()
    if earlier.unfinished is not None and not options.restart:
        return prepared
    if earlier.unfinished is not None:
        if not agrees(
            f"Rotation {earlier.unfinished.id} of {prepared.target.label} is unfinished, with "
            f"{earlier.unfinished.rows_done:,} of {earlier.unfinished.rows_total:,} rows done. "
            "Abandon it and rotate all rows again?"
        ):
            raise OptionError(
                "Nothing was changed. Without --restart, the same command resumes the rotation."
            )
    elif earlier.completed is not None and not options.restart:
        if not agrees(
            f"Rotation {earlier.completed.id} completed {duration(earlier.completed.seconds_ago)} ago. "
            "Rotate all rows again?"
        ):
            raise OptionError("Nothing was changed.")
        # Not --restart, which would abandon a rotation that another process begins at this moment.
        options = replace(options, after=earlier.completed.id)
    findings = replace(
        prepared, options=replace(options, sample=options.sample and options.preflight)
    ).examine()
    if options.preflight:
        observer(Preflighted(findings=findings))
    about = "" if findings.table.rows_is_exact else "about "
    rows = f"{about}{plural(findings.rows_left, 'row')}"
    sys.stderr.write(f"{one_line(f'{findings.server_name}, table {findings.table_name}, {rows}')}\n")
    if not agrees(f"Rotate {rows} of {prepared.target.label} now?"):
        raise OptionError("Nothing was changed.")
    return replace(prepared, options=replace(options, preflight=False))


def _without_ends(prepared: Prepared) -> Prepared:
    """The same, but for what was meant for the run that has just ended."""
    options = replace(
        prepared.options,
        preflight=False,
        restart=False,
        after=None,
        take_over=False,
        stop_after_rows=None,
        stop_after_seconds=None,
    )
    return replace(prepared, options=options)


def _raw(wrapper: OutputWrapper) -> TextIO:
    # The wrapper ends every write with a line end, in the middle of a bar too.
    stream: TextIO = vars(wrapper)["_out"]
    return stream


def _run_options(options: Options) -> RunOptions:
    for name in ("concurrency", "batch"):
        if options[name] < 1:
            raise OptionError(f"--{name} must be 1 or more, not {options[name]}.")
    if options["batch"] > MAX_BATCH_ROWS:
        raise OptionError(f"--batch must be {MAX_BATCH_ROWS:,} or less, not {options['batch']}.")
    stop_after = rows_or_seconds(options["stop_after"])
    lock_seconds = seconds(options["lock_timeout"])
    return RunOptions(
        concurrency=options["concurrency"],
        batch=options["batch"],
        restart=options["restart"],
        take_over=options["take_over"],
        vacuum=not options["no_vacuum"],
        preflight=not options["no_preflight"],
        # Nobody waits for an estimate that nobody reads.
        sample=not options["no_sample"] and (options["dry_run"] or is_terminal(sys.stderr)),
        stop_after_rows=stop_after if isinstance(stop_after, int) else None,
        stop_after_seconds=stop_after if isinstance(stop_after, float) else None,
        outage_budget_seconds=seconds(options["outage_budget"]),
        limits=WaitLimits.of_lock_seconds(lock_seconds),
    )
