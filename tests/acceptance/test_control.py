"""Pause, resume, cancel and set from another process, while a rotation runs."""

import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator

import pytest
from django.core.management import CommandError, call_command

from rotator.events import ActionKind
from rotator.models import Action, Control, Rotation, Span
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.celery_hosts import Hosts, kill_all, running_hosts
from tests.acceptance.harness import (
    MANAGE,
    Commands,
    Finished,
    Running,
    checkpoints,
    wait_for_checkpoints,
    wait_until,
)

ROWS = 4_000
# Longer than a range, and than the time between two of them.
STILL_SECONDS = 0.6
USER = re.escape(os.environ.get("USER") or "root")


def ask(*words: str) -> Finished:
    """Run ``rotations``; in this process, since a new one takes a second to start."""
    out, err, status = io.StringIO(), "", 0
    try:
        call_command("rotations", *words, stdout=out)
    except CommandError as error:
        err, status = f"CommandError: {error}\n", error.returncode
    except SystemExit as ended:
        status = int(ended.code or 0)
    return Finished(status=status, out=out.getvalue(), err=err)


def change(action: ActionKind, **values: object) -> Control:
    """Do what the command does, without the time that a process takes to start."""
    return Control.change(Rotation.objects.get(), action, values, by="alice")


def pause() -> Control:
    return change(ActionKind.PAUSED, paused=True)


def resume() -> Control:
    return change(ActionKind.PAUSE_ENDED, paused=False)


def assert_stops() -> None:
    """The ranges in flight are completed, and no other one is."""

    def is_still() -> bool:
        done = checkpoints()
        time.sleep(STILL_SECONDS)
        return checkpoints() == done

    wait_until(is_still, "no range is completed")
    assert Rotation.objects.get().status == "running"


def assert_moving() -> None:
    done = checkpoints()
    wait_until(lambda: checkpoints() > done, "a range is completed")


def started(commands: Commands, *options: str) -> Running:
    """Start a rotation that takes long."""
    slow_down(0.2)
    running = commands.start("--batch=20", "--concurrency=2", *options)
    wait_for_checkpoints(5)
    return running


def test_pause_and_resume_take_effect(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    running = started(commands)
    number = str(Rotation.objects.get().pk)

    paused = commands.start(number, "pause", program=(*MANAGE, "rotations")).wait()
    assert (paused.status, paused.err) == (0, "")
    assert re.fullmatch(
        rf"Rotation {number} is paused \(revision 1\): applied by its owner, .+ \(pid {running.pid}\)\.\n",
        paused.out,
    )
    assert_stops()
    assert "throttled: paused by " in running.err
    heartbeat = Rotation.objects.get().updated_at
    wait_until(lambda: Rotation.objects.get().updated_at > heartbeat, "the heartbeat goes on")
    facts = json.loads(ask(number, "--json").out)
    assert facts["throttle_reason"].startswith("paused by ")
    assert (facts["control"]["paused"], facts["control"]["applied_revision"]) == (True, 1)
    assert re.search(r"\n  status +paused\n", ask(number).out)

    resume()
    assert_moving()
    pause()
    assert_stops()
    resumed = ask("resume", "--all")
    assert resumed.out.startswith(f"Rotation {number} is not paused (revision 4): applied by its owner, ")
    speed_up()
    finished = running.wait()
    assert finished.status == 0, finished.err
    assert re.search(r"\n  throttled +\d+ s by pause\n", finished.out)
    audit.assert_rotated()
    assert Rotation.objects.get().throttled_seconds > 2 * STILL_SECONDS
    log = ask(number, "--log").out
    kinds = re.findall(rf"^[-0-9]+ [:0-9]+ UTC  (.+?) by (?:alice|{USER})", log, re.MULTILINE)
    assert kinds == ["started", "paused", "pause ended", "paused", "pause ended", "completed", "vacuumed"]


def test_a_pause_survives_a_kill_and_a_resumed_run(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    running = started(commands)
    number = str(Rotation.objects.get().pk)
    running.kill()
    stored = ask(number, "pause")
    assert stored.status == 1
    assert f"Rotation {number}: the request is stored as revision 1. The owner, " in stored.out
    assert "does not answer: the last heartbeat was" in stored.out
    done = checkpoints()

    following = commands.start("--batch=20")
    wait_until(lambda: "throttled: paused by " in following.err, "it says that it is paused")
    following.kill()
    following = commands.start("--batch=20")
    wait_until(lambda: "throttled: paused by " in following.err, "it says that it is still paused")
    assert checkpoints() == done
    speed_up()
    assert ask(number, "resume").status == 0
    assert following.wait().status == 0
    audit.assert_rotated()
    assert [action.kind for action in Action.objects.order_by("pk")] == [
        *("started", "paused", "taken over", "taken over", "pause ended", "completed", "vacuumed")
    ]


def test_cancel_ends_like_ctrl_c_and_can_be_resumed(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    running = started(commands)
    number = str(Rotation.objects.get().pk)
    cancelled = ask(number, "cancel")
    assert cancelled.out == f"Rotation {number} is cancelled. The same command resumes it.\n"
    finished = running.wait()
    assert finished.status == 128 + signal.SIGINT
    assert re.match(r"Interrupted: .*\nCancelled by \S+\.\n", finished.out)
    assert re.search(r" cancelled by \S+: draining; ranges in flight are committed", finished.err)
    assert re.search(r"^  reason +cancelled by ", ask(number).out, re.MULTILINE)
    again = ask(number, "cancel")
    assert again.status == 1
    assert again.complaint == (
        f"Rotation {number} of tickets.Ticket.token is interrupted: no process works on it, so nothing is "
        "cancelled."
    )
    speed_up()
    # The request was for the process that has stopped.
    assert commands.run().status == 0
    audit.assert_rotated()
    refused = ask(number, "pause")
    assert refused.complaint == (
        f"Rotation {number} of tickets.Ticket.token is completed, so it cannot be changed."
    )


def test_limits_are_set_and_an_older_revision_is_refused(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    running = started(commands)
    number = str(Rotation.objects.get().pk)
    assert ask(number, "set", "concurrency=1", "batch=7", "--revision=0").status == 0
    assert re.search(r" limits changed by \S+: 1 worker, 7 rows a range\n", running.err)
    refused = ask(number, "pause", "--revision", "0")
    assert re.fullmatch(
        rf"Rotation {number} was changed since revision 0: its revision is 1, by \S+\. Look at it with "
        rf"rotations {number}, then repeat the change with --revision 1\.",
        refused.complaint,
    )
    assert refused.status == 1
    assert not Control.objects.get().paused
    more = ask(number, "set", "concurrency=3").complaint
    assert "runs with --concurrency 2, and no more workers can be added" in more
    speed_up()
    assert running.wait().status == 0
    audit.assert_rotated()
    sizes = list(Rotation.objects.get().completed_ranges.order_by("-pk").values_list("rows", flat=True))
    assert sizes[0] <= 7


def test_signals_pause_and_resume(commands: Commands) -> None:
    audit = audited_tickets(ROWS)
    running = started(commands)
    running.send(signal.SIGUSR1)
    wait_until(lambda: "throttled: paused by SIGUSR1" in running.err, "it pauses")
    wait_until(lambda: Rotation.objects.get().throttle_reason == "paused by SIGUSR1", "the database says so")
    assert_stops()
    running.send(signal.SIGUSR2)
    assert_moving()
    speed_up()
    assert running.wait().status == 0
    audit.assert_rotated()


@pytest.fixture
def hosts(commands: Commands) -> Iterator[Hosts]:
    yield from running_hosts(commands)


def test_celery_workers_are_paused_resumed_limited_and_cancelled(hosts: Hosts) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.2)
    hosts.worker()
    coordinator = hosts.coordinator("--batch=20", "--concurrency=2")
    wait_for_checkpoints(5)
    pause()
    assert_stops()
    resume()
    assert_moving()
    change(ActionKind.CHANGED, batch=7)
    wait_until(
        lambda: (
            Rotation.objects.get().completed_ranges.order_by("-pk").values_list("rows", flat=True)[0] <= 7
        ),
        "smaller ranges",
    )
    change(ActionKind.CANCELLED)
    finished = coordinator.wait()
    assert finished.status == 128 + signal.SIGINT, finished.err
    speed_up()
    assert hosts.rotate("--batch=20").status == 0
    audit.assert_rotated()


@pytest.mark.slow  # Another message is sent when the lease of the killed task has expired.
@pytest.mark.parametrize("kills_coordinator", [True, False], ids=["worker and coordinator", "worker"])
def test_a_pause_survives_killed_processes_with_celery(
    hosts: Hosts, commands: Commands, *, kills_coordinator: bool
) -> None:
    audit = audited_tickets(ROWS)
    slow_down(0.05)
    worker = hosts.worker()
    coordinator = hosts.coordinator("--batch=20", "--concurrency=2")
    wait_for_checkpoints(10)
    number = str(Rotation.objects.get().pk)
    paused = commands.start(number, "pause", program=(*MANAGE, "rotations")).wait()
    assert (paused.status, paused.err) == (0, "")
    assert_stops()
    done = checkpoints()
    killed = set(Span.objects.exclude(worker="").values_list("worker", flat=True))
    kill_all(worker)
    if kills_coordinator:
        coordinator.kill()
        coordinator = hosts.coordinator("--batch=20", "--concurrency=2")
    hosts.worker()
    wait_until(
        lambda: Span.objects.exclude(worker__in=["", *killed]).exists(), "the new worker has claimed a span"
    )
    assert "throttled: paused by " in coordinator.err
    speed_up()
    assert_stops()
    assert checkpoints() == done
    resumed = commands.start(number, "resume", program=(*MANAGE, "rotations")).wait()
    assert (resumed.status, resumed.err) == (0, "")
    finished = coordinator.wait()
    assert finished.status == 0, finished.err
    audit.assert_rotated()
