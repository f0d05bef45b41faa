"""Rotate the tickets' tokens and count the new ones independently: ``make demo`` and ``make demo-celery``."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Final

import django
from django.db import connection

from core.broker import broker_url, running_broker

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Not the tokens themselves: no copy of a leaked secret is to outlive its rotation.
_DIGEST: Final = "sha256(convert_to(token::text, 'UTF8'))"


def main() -> int:
    """Rotate the tickets, count the new tokens, and return the exit status."""
    parser = argparse.ArgumentParser(description="Rotate the tickets' tokens and count the new ones.")
    parser.add_argument("--celery", action="store_true", help="by Celery workers, with an embedded broker")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=2, help="connections (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2000, help="rows a range (default: %(default)s)")
    options = parser.parse_args()
    django.setup()
    for number in _SIGNALS:
        # Otherwise they would end the process with the digests left behind. nohup ignores SIGHUP.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        return _demonstrate(options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        # A resumed rotation is counted against the tokens before its start.
        if not _is_unfinished():
            _query("DROP TABLE IF EXISTS demo_digests")


def _demonstrate(options: argparse.Namespace) -> int:
    is_resumed = _is_unfinished()
    if not is_resumed:
        _query("DROP TABLE IF EXISTS demo_digests")
        _query(f"CREATE TABLE demo_digests AS SELECT id, {_DIGEST} AS digest FROM tickets_ticket")
    with tempfile.TemporaryDirectory() as folder:
        status = _rotate(options, Path(folder), is_resumed=is_resumed)
    if _is_unfinished():
        sys.stdout.write("The rotation is unfinished: the same make command resumes it.\n")
        return status or 1
    return status or int(not _is_right())


def _rotate(options: argparse.Namespace, folder: Path, *, is_resumed: bool) -> int:
    command = [
        "async_rotate",
        "--noinput",
        f"--concurrency={options.concurrency}",
        f"--batch={options.batch}",
    ]
    environment = {**os.environ, "CELERY_BROKER_URL": broker_url(folder)}
    command += ["--celery"] if options.celery else []
    command += [] if is_resumed else ["--restart"]
    with (
        running_broker(folder) if options.celery else nullcontext(),
        _workers(options.workers if options.celery else 0, environment),
        subprocess.Popen([sys.executable, "manage.py", *command], env=environment) as process,
        _passing_signals_on(process),
    ):
        return process.wait()


def _is_right() -> bool:
    """Count the new and the distinct tokens; return whether those are all."""
    if not _number("SELECT count(*) FROM pg_class WHERE oid = to_regclass('demo_digests')"):
        sys.stdout.write("Not counted: this rotation was begun by another command.\n")
        return True
    ((rows, new),) = _query(
        f"SELECT count(*), count(*) FILTER (WHERE {_DIGEST} <> digest)"
        " FROM tickets_ticket JOIN demo_digests USING (id)"
    )
    distinct = _number("SELECT count(DISTINCT token) FROM tickets_ticket")
    sys.stdout.write(
        f"Counted: {new:,} of {rows:,} tickets have a new token, and {distinct:,} tokens are distinct.\n"
    )
    return new == rows == distinct


@contextmanager
def _passing_signals_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave the end to the command: it drains, and says how it ended."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the command as well.
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _workers(number: int, environment: Mapping[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "--app", "core.celery", "worker", "--concurrency=1"]
    started = [
        subprocess.Popen(
            [*command, "--loglevel=WARNING", f"--hostname=demo{at}@%h"],
            env=environment,
            stdout=subprocess.DEVNULL,
            # A Ctrl-C is for the command, which has the workers drain.
            start_new_session=True,
        )
        for at in range(number)
    ]
    try:
        yield
    finally:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.wait()


def _is_unfinished() -> bool:
    from rotator.models import Rotation  # noqa: PLC0415 - after django.setup()

    return Rotation.objects.filter(target="tickets.Ticket.token", status__in=Rotation.UNFINISHED).exists()


def _number(statement: str) -> int:
    ((number,),) = _query(statement)
    return int(number)


def _query(statement: str) -> list[tuple[int, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


if __name__ == "__main__":
    sys.exit(main())
