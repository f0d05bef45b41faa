"""Each benchmark still runs, with figures that are too small to mean anything."""

import subprocess
import sys

import pytest

from tests.acceptance.harness import PROJECT

pytestmark = pytest.mark.slow

SMALL = {
    "compare": "--rows 3000 --slow-rows 500 --only UPDATE async_rotate",
    "concurrency": "--rows 3000 --concurrencies 1 2 --batches 500",
    "estimate": "--rows 50000 --batch 100",
    "gaps": "--rows 3000",
    "keys": "--rows 3000",
    "memory": "--rows 2000 4000",
    "neighbours": "--rows 20000 --seconds 2 --parts paces quiet",
    "page": "--checkpoints 2000 --hours 2",
    "proof": "--rows 3000 --lines 20",
    "reindex": "--rows 3000",
    "resume": "--checkpoints 10 100 --rest 2000",
    "scaling": "--rows 2000 4000",
    "speed": "--rows 3000",
}
HOLDS, DOES_NOT_HOLD = range(2)
LONGEST_SECONDS = 240


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_its_figures(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--repetitions", "1", *SMALL[name].split()],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )
    assert finished.returncode in (HOLDS, DOES_NOT_HOLD), finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    assert "PostgreSQL" in finished.stdout
