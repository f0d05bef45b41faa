"""The soak test itself: some kills of it, here; more of them, and of everything else, by hand."""

import subprocess
import sys

import pytest

from tests.acceptance.harness import PROJECT

KILLS = 10


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", f"--kills={KILLS}", "--rows=20000", "--seed=1"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{'kill -9':<24}{KILLS:>6}\n" in finished.stdout
    assert finished.stdout.endswith("Every row got a new value in every rotation, once.\n")
