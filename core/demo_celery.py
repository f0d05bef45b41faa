"""A rotation by two Celery workers, with a broker of its own: ``make demo-celery``."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import django
from django.db import connection

from core.broker import broker_url, running_broker

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")


def main() -> int:
    """Rotate the tickets, and count how many tokens are new."""
    parser = argparse.ArgumentParser(description="Rotate the tickets' tokens by Celery workers.")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, default=2, help="connections of each (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=2000, help="rows a range (default: %(default)s)")
    options = parser.parse_args()
    django.setup()
    _query("DROP TABLE IF EXISTS demo_leaked")
    _query("CREATE TABLE demo_leaked AS SELECT id, token FROM tickets_ticket")
    with tempfile.TemporaryDirectory() as folder, running_broker(Path(folder)):
        environment = {**os.environ, "CELERY_BROKER_URL": broker_url(Path(folder))}
        with _workers(options.workers, environment):
            command = [
                "async_rotate",
                "--celery",
                f"--concurrency={options.concurrency}",
                f"--batch={options.batch}",
            ]
            status = subprocess.run(
                [sys.executable, "manage.py", *command], env=environment, check=False
            ).returncode
    ((rows, new),) = _query(
        "SELECT count(*), count(*) FILTER (WHERE t.token <> l.token)"
        " FROM tickets_ticket t JOIN demo_leaked l USING (id)"
    )
    ((distinct,),) = _query("SELECT count(DISTINCT token) FROM tickets_ticket")
    _query("DROP TABLE demo_leaked")
    sys.stdout.write(
        f"Counted: {new:,} of {rows:,} tickets have a new token, and {distinct:,} tokens are distinct.\n"
    )
    return status or int(new != rows)


@contextmanager
def _workers(number: int, environment: dict[str, str]) -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "celery",
        "--app",
        "core.celery",
        "worker",
        "--concurrency=1",
        "--loglevel=WARNING",
    ]
    started = [
        subprocess.Popen([*command, f"--hostname=demo{at}@%h"], env=environment, stdout=subprocess.DEVNULL)
        for at in range(number)
    ]
    try:
        yield
    finally:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.wait()


def _query(statement: str) -> list[tuple[int, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


if __name__ == "__main__":
    sys.exit(main())
