"""Telling a process that is there from one that was."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from rotator.postgres.owner import Owner, this_process

_NAME_YOURSELF = """
from rotator.postgres.owner import this_process
owner = this_process()
print(owner.pid, owner.process, flush=True)
input()
"""

pytestmark = pytest.mark.skipif(
    not this_process().process, reason="this system does not tell processes with the same pid apart"
)


def test_this_process_is_not_gone() -> None:
    assert not this_process().is_gone()


def test_a_zombie_process_counts_as_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _NAME_YOURSELF], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        pid, _, process = child.stdout.readline().strip().partition(" ")
        owner = replace(this_process(), pid=int(pid), process=process)
        assert owner.pid == child.pid
        assert not owner.is_gone()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert owner.is_gone()
        child.wait()
        assert owner.is_gone()


def test_another_process_with_the_same_pid_is_not_the_owner() -> None:
    owner = this_process()
    machine = owner.process.rpartition(" ")[0]
    assert replace(owner, process=f"{machine} 1").is_gone()


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"host": "another.example"},
        {"process": ""},
        {"process": "another-boot pid:[1] 1"},
    ],
)
def test_nothing_is_said_of_processes_elsewhere(elsewhere: dict[str, str]) -> None:
    # A pid that no process has: only the host, the boot or the namespace can speak against a verdict.
    owner = this_process()
    gone = replace(owner, pid=2**30)
    assert gone.is_gone()
    assert not replace(gone, **elsewhere).is_gone()  # type: ignore[arg-type] # mypy takes the values for every field's


def test_an_owner_is_named_by_user_host_and_pid() -> None:
    owner = Owner(host="db.example", pid=42, process="", user="ann", version="1")
    assert str(owner) == "ann on db.example (pid 42)"
    assert str(replace(owner, user="")) == "an unknown user on db.example (pid 42)"
