"""What is a request to stop, and what is a second one."""

import asyncio
import signal

import pytest

from rotator.events import DrainStarted, Event
from rotator.runner import stop
from rotator.runner.stop import StopRequests


async def _forever() -> None:
    await asyncio.Event().wait()


async def test_the_first_signal_drains_and_says_so_once() -> None:
    told = list[Event]()
    requests = StopRequests(told.append)
    requests.ask_by_signal(signal.SIGTERM)
    requests.ask("--stop-after")
    assert requests.drain.is_set()
    assert (requests.signal, requests.reason, requests.aborted) == (signal.SIGTERM, "SIGTERM", False)
    assert told == [DrainStarted(reason="SIGTERM")]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
async def test_signals_that_arrive_together_are_one_request(second: signal.Signals) -> None:
    requests = StopRequests(lambda _event: None)
    requests.ask_by_signal(signal.SIGHUP)
    requests.ask_by_signal(second)
    assert not requests.aborted


async def test_ctrl_c_twice_cancels_the_work_at_once() -> None:
    requests = StopRequests(lambda _event: None)
    work = asyncio.create_task(_forever())
    with requests.aborting(work):
        requests.ask_by_signal(signal.SIGINT)
        assert not work.cancelling()
        requests.ask_by_signal(signal.SIGINT)
        with pytest.raises(asyncio.CancelledError):
            await work
    assert requests.aborted


async def test_a_later_signal_of_any_kind_cancels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "SAME_REQUEST_SECONDS", 0.0)
    requests = StopRequests(lambda _event: None)
    requests.ask_by_signal(signal.SIGTERM)
    requests.ask_by_signal(signal.SIGTERM)
    assert requests.aborted


async def test_waiting_ends_with_the_request() -> None:
    requests = StopRequests(lambda _event: None)
    assert not await requests.wait(0)
    waiting = asyncio.create_task(requests.wait(60))
    await asyncio.sleep(0)
    requests.ask("--stop-after")
    assert await waiting


async def test_handlers_are_those_of_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests = StopRequests(lambda _event: None)
    with requests.signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
