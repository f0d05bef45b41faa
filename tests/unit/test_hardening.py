"""What another user's processes and a patched process are taken for."""

import os
import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

from rotator.api import prepare
from rotator.exceptions import OptionError
from rotator.options import RunOptions
from rotator.postgres import owner as owner_module
from rotator.postgres.owner import this_process
from tests.acceptance.harness import wait_until


def test_a_process_that_proc_hides_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = this_process()
    # hidepid=2: the folder of a process of another user seems not to exist.
    monkeypatch.setattr(owner_module, "_stat", lambda _pid: [])
    assert not owner.is_gone()


@pytest.mark.parametrize(
    ("module", "asks"), [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")]
)
def test_a_monkey_patched_process_is_refused(module: str, asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{asks: lambda name: name == "socket"}))
    with pytest.raises(
        OptionError,
        match=rf"^{module.split('.', maxsplit=1)[0]} has monkey-patched the process {os.getpid()} on ",
    ):
        prepare(["tickets.Ticket.token"], "default", RunOptions())


def test_a_broker_that_swallows_connections_costs_few_threads() -> None:
    distributed = pytest.importorskip("rotator.tasks")
    clock = [0.0]
    calls = distributed.BrokerCalls(lambda: clock[0])
    over, hanging = threading.Event(), list[threading.Thread]()
    try:
        # An hour, in which the coordinator tries every ten seconds.
        for clock[0] in map(float, range(0, 3600, 10)):
            with suppress(TimeoutError):
                calls.check()
                thread = threading.Thread(target=calls.tracked(over.wait))
                thread.start()
                hanging.append(thread)
                wait_until(lambda: len(calls.running_since) >= len(hanging), "the call runs")
        assert 3 < len(hanging) < 20
    finally:
        over.set()
        for thread in hanging:
            thread.join()
    calls.check()
