"""Every acceptance test has committed tables, and processes and tables of its own that end with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.audit import Audit
from tests.acceptance.harness import Commands, wait_for_the_backends_to_go


@pytest.fixture
def commands(transactional_db: None, tmp_path: Path) -> Iterator[Commands]:  # noqa: ARG001
    started = Commands(tmp_path)
    try:
        yield started
    finally:
        started.end()
        # A session with a lock would block the clearing of the tables.
        wait_for_the_backends_to_go()
        Audit.clear()
