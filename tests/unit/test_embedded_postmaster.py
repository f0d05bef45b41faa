import os
import subprocess
import sys

import pytest

from core.embedded.postmaster import command_line, complaint


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("LOG:  starting\nFATAL:  out of luck\nLOG:  database system is shut down\n", "FATAL:  out of luck"),
        ("initdb: error: no room\ninitdb: removing contents\n", "initdb: error: no room"),
        ("sh: not found\n", "sh: not found"),
        ("", ""),
    ],
)
def test_the_line_that_names_the_error_is_quoted(printed: str, expected: str) -> None:
    assert complaint(printed) == expected


def test_a_process_is_known_by_its_command_line() -> None:
    program = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "two words"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        # For a moment after exec the kernel shows no command line.
        child.stdout.readline()
        assert command_line(child.pid).endswith(f" -c {program} two words ")
        child.kill()


def test_a_zombie_counts_as_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not command_line(child.pid).strip()


def test_a_process_that_has_just_begun_is_not_taken_for_one_that_is_gone() -> None:
    for _ in range(200):
        with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert command_line(child.pid)
            child.kill()
