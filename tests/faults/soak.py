"""Rotations under faults drawn at random, for as long as it is told, with an audit of every single row."""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")

from core.own_server import OwnServer
from core.proxy import At, Proxy
from tests.acceptance.harness import MANAGE, Running, wait_until
from tests.faults.database import TABLE, Audit, Database, make_tickets, slow_down, speed_up
from tests.faults.harness import Rotations
from tests.faults.neighbour import Neighbour

_DATABASE: Final = "soak"
_RANGE_SECONDS: Final = 0.01
_START_SECONDS: Final = 0.8
_ENDS_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.01
_SETTLED_SECONDS: Final = 0.2
_LAST_RUNS: Final = 3


@dataclass(kw_only=True, slots=True)
class Findings:
    """What has come of it.

    Attributes:
        faults: How often each fault was injected.
        runs: How many processes were started.
        rotations: How many rotations were completed and audited.
        violations: What must not have happened.
    """

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    rotations: int = 0
    violations: list[str] = field(default_factory=list)


class Soak:
    """One table that is rotated again and again while everything goes wrong.

    Args:
        server: A server that may be crashed.
        database: With tickets in it.
        audit: Of these tickets.
        proxy: In front of the server.
        folder: For what the processes say.
        chance: Draws the faults.
    """

    def __init__(
        self,
        server: OwnServer,
        database: Database,
        audit: Audit,
        proxy: Proxy,
        folder: Path,
        chance: random.Random,
    ) -> None:
        self.findings = Findings()
        self._server = server
        self._database = database
        self._audit = audit
        self._proxy = proxy
        self._rotations = Rotations(folder)
        self._chance = chance
        self._sent: set[int] = set()
        self._running: Running | None = None
        self._faults: dict[str, Callable[[Running], None]] = {
            "kill -9": lambda running: self._signal(running, signal.SIGKILL),
            "Ctrl-C": lambda running: self._signal(running, signal.SIGINT),
            "SIGTERM": lambda running: self._signal(running, signal.SIGTERM),
            "frozen and overtaken": self._freeze,
            "connections cut": self._cut,
            "cut at a COMMIT": self._cut_at_commit,
            "server crashed": self._crash,
            "rows locked by others": self._lock,
            "paused and resumed": self._pause,
            "paused and killed": self._pause_and_kill,
            "paused by a signal": self._pause_by_signal,
            "limits changed": self._set_limits,
            "cancelled": self._cancel,
        }

    def kill(self, kills: int) -> None:
        """Kill so many runs, each at a random moment, and let the last one complete."""
        while self.findings.faults["kill -9"] < kills:
            running = self._run()
            self._wait_for_a_moment(running)
            if running.is_alive:
                self._inject("kill -9", running)
            self._reap()
            self._tell(f"{self.findings.faults['kill -9']} of {kills} kills")
        self._complete()

    def go_on(self, minutes: float) -> None:
        """Inject faults of every kind for so long, and let the last run complete."""
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until:
            running = self._run()
            self._wait_for_a_moment(running)
            if running.is_alive:
                self._inject(self._chance.choice(list(self._faults)), running)
            if not running.is_alive:
                self._reap()
            self._tell(f"{max(0.0, until - time.monotonic()):.0f} s to go")
        self._complete()

    def _tell(self, rest: str) -> None:
        if sum(self.findings.faults.values()) % 10 == 0:
            _say(f"{self.findings.runs} runs, {self.findings.rotations} rotations completed; {rest}")

    def _run(self) -> Running:
        """The process that rotates; a new one where there is none."""
        if self._running is None or not self._running.is_alive:
            self._reap()
            self._running = self._start()
        return self._running

    def _start(self, *options: str) -> Running:
        self.findings.runs += 1
        unfinished = "SELECT count(*) FROM rotator_rotation WHERE status NOT IN ('completed', 'abandoned')"
        if not self._database.number(unfinished):
            options += ("--restart",)
        return self._rotations.rotate(
            self._database.url(port=self._proxy.port),
            f"--batch={self._chance.choice((20, 100, 500, 2000, 5000))}",
            f"--concurrency={self._chance.randint(1, 8)}",
            *options,
        )

    def _wait_for_a_moment(self, running: Running) -> None:
        """Mostly until ranges are being written, and then for a moment more; else for any moment at all."""
        if self._chance.random() < 1 / 3:
            time.sleep(self._chance.uniform(0, _START_SECONDS))
            return
        done, until = self._database.checkpoints(), time.monotonic() + _ENDS_SECONDS
        while running.is_alive and self._database.checkpoints() <= done:
            if time.monotonic() > until:
                self.findings.violations.append(f"no progress in {_ENDS_SECONDS:.0f} s: {running.err}")
                running.kill()
            time.sleep(_POLL_SECONDS)
        time.sleep(self._chance.uniform(0, 0.3))

    def _inject(self, name: str, running: Running) -> None:
        self.findings.faults[name] += 1
        self._faults[name](running)

    def _signal(self, running: Running, number: signal.Signals) -> None:
        self._sent.add(number)
        running.send(number)
        self._ended(running)

    def _freeze(self, running: Running) -> None:
        running.send(signal.SIGSTOP)
        time.sleep(_SETTLED_SECONDS)
        owned = (
            f"SELECT count(*) FROM rotator_rotation WHERE status = 'running' AND owner_pid = {running.pid}"
        )
        if not self._database.number(owned):
            # It has completed, and another run would begin another rotation before this one was audited; or
            # it has yet to begin, and would continue next to the other.
            running.send(signal.SIGCONT)
            self._ended(running)
            return
        self._running = self._start("--take-over")
        self._wait_for_a_moment(self._running)
        until = time.monotonic() + _ENDS_SECONDS
        # On a busy machine the other one takes longer to start.
        while self._database.number(owned) and self._running.is_alive and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        # If its connection is cut before it has taken over, it ends, and the frozen one is still the owner.
        is_overtaken = self._running.is_alive or not self._database.number(owned)
        running.send(signal.SIGCONT)
        self._ended(running)
        finished = running.wait()
        if (is_overtaken and finished.status != 1) or "Traceback" in finished.err:
            self.findings.violations.append(
                f"thawed with status {finished.status}: {finished.err}the other: {self._running.err}"
            )

    def _cut(self, _running: Running) -> None:
        self._proxy.cut()

    def _cut_at_commit(self, _running: Running) -> None:
        self._proxy.cut_at_commit(self._chance.choice(list(At)))

    def _crash(self, _running: Running) -> None:
        self._server.restart("immediate")

    def _lock(self, _running: Running) -> None:
        with self._database.connect() as neighbour, neighbour.transaction():
            neighbour.execute(
                f"SELECT FROM {TABLE} WHERE mod(id, 1000) = %s FOR UPDATE".encode(),
                [self._chance.randint(0, 999)],
            )
            time.sleep(self._chance.uniform(0.1, 1.5))

    def _request(self, **values: object) -> None:
        """Write the control row of the rotation, as a user does."""
        names = ", ".join(values)
        self._database.query(
            "INSERT INTO rotator_control (rotation_id, revision, paused, paused_by, pace, cancelled_by,"
            " changed_by) SELECT id, 0, false, 'soak', '', 'soak', 'soak' FROM rotator_rotation"
            " WHERE status NOT IN ('completed', 'abandoned') ON CONFLICT DO NOTHING"
        )
        self._database.query(
            f"UPDATE rotator_control SET revision = revision + 1, ({names}) ="
            f" ROW ({', '.join(map(str, values.values()))})"
        )

    def _pause(self, _running: Running) -> None:
        self._request(paused="true")
        time.sleep(self._chance.uniform(0, 3))
        self._request(paused="false")

    def _pause_and_kill(self, running: Running) -> None:
        self._request(paused="true")
        time.sleep(self._chance.uniform(0, 3))
        self._signal(running, signal.SIGKILL)
        self._reap()
        # The server can still commit what the killed run has sent. Sessions that were cut at a COMMIT stay.
        time.sleep(_SETTLED_SECONDS)
        active = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND application_name <> 'tests' AND state = 'active'"
        )
        wait_until(lambda: not self._database.number(active), "no statement of a rotation is active")
        paused = (
            "SELECT count(*) FROM rotator_control JOIN rotator_rotation r ON r.id = rotation_id"
            " WHERE paused AND status NOT IN ('completed', 'abandoned')"
        )
        if not self._database.number(paused):
            # There was no row to pause yet, or the rotation has completed.
            return
        done = self._database.checkpoints()
        self._run()
        time.sleep(self._chance.uniform(0, 3))
        if self._database.checkpoints() > done:
            self.findings.violations.append("a run that resumed a paused rotation did not wait")
        self._request(paused="false")

    def _pause_by_signal(self, running: Running) -> None:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            # They end a process that does not handle them yet.
            self._sent.add(number)
            running.send(number)
            time.sleep(self._chance.uniform(0, 2))

    def _set_limits(self, _running: Running) -> None:
        self._request(concurrency=self._chance.randint(1, 8), batch=self._chance.choice((50, 700, 5000)))

    def _cancel(self, running: Running) -> None:
        # It ends like Ctrl-C.
        self._sent.add(signal.SIGINT)
        self._request(cancel_revision="revision + 1")
        self._ended(running)

    def _ended(self, running: Running) -> None:
        try:
            running.wait(_ENDS_SECONDS)
        except subprocess.TimeoutExpired:
            self.findings.violations.append(f"it does not end: {running.err}")
            running.kill()

    def _reap(self) -> None:
        """Take note of how the last process ended, and audit a rotation that it completed."""
        running, self._running = self._running, None
        sent, self._sent = self._sent, set()
        if running is None:
            return
        self._ended(running)
        finished = running.wait()
        expected = {0} | {-number if number == signal.SIGKILL else 128 + number for number in sent}
        # Before it listens to them, signals end it the way they end any process.
        expected |= {-number for number in sent}
        if finished.status not in expected and not self._could_not_begin(finished.err):
            self.findings.violations.append(
                f"ended with status {finished.status}: {finished.err.strip()} {finished.out.strip()}"
            )
        if "Traceback" in finished.err and not sent:
            self.findings.violations.append(finished.err)
        if self._database.number("SELECT count(*) FROM rotator_rotation WHERE status <> 'completed'") == 0:
            self._check()

    @staticmethod
    def _could_not_begin(said: str) -> bool:
        """Whether a connection was lost before the rotation was acquired, which ends a run."""
        has_begun = " starts: " in said or " resumes: " in said
        # While it is still importing, an interrupt ends it as Python does.
        return not has_begun and ("Traceback" not in said or said.rstrip().endswith("KeyboardInterrupt"))

    def _check(self) -> None:
        if self._database.number("SELECT count(*) FROM rotator_rotation") == self.findings.rotations:
            return
        self.findings.rotations += 1
        faults = self._audit.faults()
        self.findings.violations += [
            f"rotation {self.findings.rotations}: {rows} {what}" for what, rows in faults.items()
        ]
        self._audit.begin_again()

    def _complete(self) -> None:
        speed_up(self._database)
        for _ in range(_LAST_RUNS):
            running = self._run()
            self._ended(running)
            self._reap()
            if self._database.status() == "completed":
                return
        self.findings.violations.append("it cannot be completed")

    def close(self) -> None:
        """End what is left."""
        self._rotations.end()


def main() -> NoReturn:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument(
        "--minutes", type=float, default=5.0, metavar="N", help="for how long (default: %(default)s)"
    )
    how_long.add_argument(
        "--kills", type=int, metavar="N", help="only kill, this often, however long that takes"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="draws the faults (default: one of its own)")
    parser.add_argument(
        "--rows",
        type=int,
        default=50_000,
        metavar="N",
        help="how many tickets there are (default: %(default)s)",
    )
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    try:
        sys.exit(0 if _soak(options, seed) else 1)
    except KeyboardInterrupt:
        _say("interrupted; nothing is left behind")
        sys.exit(128 + signal.SIGINT)


def _soak(options: argparse.Namespace, seed: int) -> bool:
    started = time.monotonic()
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    with _prepared(options.rows) as (server, database, proxy, folder):
        audit = make_tickets(database, options.rows)
        soak = Soak(server, database, audit, proxy, folder, chance)
        slow_down(database, _RANGE_SECONDS)
        neighbour = Neighbour(database)
        try:
            if options.kills is not None:
                soak.kill(options.kills)
            else:
                with neighbour.at_work():
                    soak.go_on(options.minutes)
        finally:
            soak.close()
    findings = soak.findings
    if neighbour.refused:
        findings.violations.append(f"the neighbour was told of {Counter(neighbour.refused)}")
    _print(options, seed, findings, neighbour, time.monotonic() - started)
    return not findings.violations


@contextmanager
def _prepared(rows: int) -> Iterator[tuple[OwnServer, Database, Proxy, Path]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _say("starting a server")
        # A crash loses what was committed asynchronously within the last second or so.
        server = stack.enter_context(OwnServer({"wal_writer_delay": "10s", "max_wal_size": "8GB"}))
        with server.connect() as admin:
            admin.execute(f"CREATE DATABASE {_DATABASE}".encode())
        database = Database(server, _DATABASE)
        stack.callback(database.close)
        migrated = Rotations(folder).start_on(database.url(), *MANAGE, "migrate", "--verbosity=0").wait()
        if migrated.status:
            raise SystemExit(migrated.err)
        _say(f"creating {rows:,} tickets")
        yield server, database, stack.enter_context(Proxy(port=server.port)), folder


def _print(
    options: argparse.Namespace, seed: int, findings: Findings, neighbour: Neighbour, seconds: float
) -> None:
    print(
        f"{options.rows:,} rows, seed {seed}: {findings.runs:,} runs and {findings.rotations:,} rotations "
        f"completed in {seconds / 60:.1f} minutes"
    )
    for name, times in findings.faults.items():
        print(f"{name:<24}{times:>6,}")
    if neighbour.transactions:
        print(
            f"A neighbour made {neighbour.transactions:,} transactions; its longest statement took "
            f"{neighbour.longest_seconds:.2f} s, {neighbour.waited:,} took more than 0.02 s, and it got "
            f"{len(neighbour.refused)} errors."
        )
    for violation in findings.violations:
        print(f"violation: {violation}")
    print(
        "Every row got a new value in every rotation, once."
        if not findings.violations
        else f"{len(findings.violations)} violations."
    )


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
