"""A Celery broker and worker processes for the acceptance tests."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from core.broker import broker_url, running_broker
from tests.acceptance.harness import COMMAND, MANAGE, Commands, Finished, Running, wait_until


class Hosts:
    """A broker, and processes that know it."""

    def __init__(self, commands: Commands, folder: Path) -> None:
        self._commands = commands
        self._folder = folder
        self._broker = ExitStack()
        self._workers = 0
        self.process = self._broker.enter_context(running_broker(folder))

    @property
    def url(self) -> str:
        return broker_url(self._folder)

    @property
    def report(self) -> Path:
        return self._folder / "report"

    def end(self) -> None:
        self._broker.close()

    def restart_broker(self) -> None:
        """Kill it; the new one knows of no message."""
        self._broker.close()
        self.process = self._broker.enter_context(running_broker(self._folder))

    def worker(self, *, processes: int = 1, pool: str = "prefork") -> Running:
        self._workers += 1
        worker = self._start(
            # gevent patches modules before anything else imports them.
            *(["env"] if pool == "gevent" else []),
            *(sys.executable, "-m", "celery", "--app", "core.celery", "worker", "--loglevel=INFO"),
            f"--concurrency={processes}",
            f"--pool={pool}",
            f"--hostname=worker{self._workers}@%h",
        )
        wait_until(lambda: "ready." in worker.err, "the worker is ready")
        return worker

    def coordinator(self, *options: str, **environment: str) -> Running:
        return self._start(*MANAGE, COMMAND, "--celery", *options, **environment)

    def rotate(self, *options: str) -> Finished:
        return self.coordinator(*options).wait()

    def send_from_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the Celery app of the test's own process use this broker."""
        from core.celery import app  # noqa: PLC0415 - of an extra

        monkeypatch.setattr(app.conf, "broker_url", self.url)
        # Connections to the broker of an earlier test.
        app.close()
        app.amqp._producer_pool = None  # noqa: SLF001 - there is no other way to drop them
        app.set_default()

    def deliver_again(self, rotation: int) -> None:
        """Do as a broker does that has heard nothing for long of who coordinates a rotation."""
        from core.celery import app  # noqa: PLC0415 - of an extra
        from rotator.tasks import coordinate  # noqa: PLC0415 - of an extra

        with app.connection(self.url) as connection:
            coordinate.apply_async(("default", rotation), connection=connection)

    def _start(self, *command: str, **environment: str) -> Running:
        # Warnings of Celery itself, and about root, are not errors here.
        variables = {"PYTHONWARNINGS": "", "CELERY_BROKER_URL": self.url, **environment}
        return self._commands.start(program=command, variables=variables)


def kill_all(worker: Running) -> None:
    """Kill a worker with all of its processes, as a host does that loses its power."""
    os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()


def running_hosts(commands: Commands) -> Iterator[Hosts]:
    """Yield a broker's hosts, as a fixture does; at the end, stop the broker and all processes."""
    # A socket's path has to be short.
    folder = Path(f"/tmp/rotator-broker-{os.getpid()}-{time.monotonic_ns()}")  # noqa: S108 - the name is unique
    folder.mkdir(mode=0o700)
    started = Hosts(commands, folder)
    try:
        yield started
    finally:
        commands.end()
        started.end()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
