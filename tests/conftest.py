"""The set-up that all tests share."""

from typing import Any, Final

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.signals import stop_ignoring_signals

# Its virtual environments are made once for the file, and the databases of its projects have fixed names.
_FILES_FOR_ONE_PROCESS: Final = (
    "tests/acceptance/test_install.py",
    "tests/foreign/test_foreign_models.py",
    "tests/foreign/test_tenants.py",
)


def pytest_configure() -> None:
    # Some tests send a signal to their own process, others start processes without the acceptance harness.
    stop_ignoring_signals()


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist ships no types for it
    """Hands out single tests, except for some files, which one process runs from first to last.

    ``--dist=loadgroup`` does the same, but has no effect with pytest 9.2: pytest-xdist's issue 1386.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return file if file in _FILES_FOR_ONE_PROCESS else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:  # noqa: ANN401
    return Scheduling(config, log)
