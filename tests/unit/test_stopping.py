"""What is a request to stop, and what is a second one."""

import asyncio
import signal

import pytest

from rotator.events import DrainStarted, Event, StopReason
from rotator.runner import stop
from rotator.runner.stop import StopSignal


async def _forever() -> None:
    await asyncio.Event().wait()


async def test_the_first_signal_drains_and_says_so_once() -> None:
    told = list[Event]()
    stop_signal = StopSignal(told.append)
    stop_signal.request_by_signal(signal.SIGTERM)
    stop_signal.request(StopReason.STOP_AFTER)
    assert stop_signal.drain.is_set()
    assert (stop_signal.signal, stop_signal.reason, stop_signal.aborted) == (signal.SIGTERM, "SIGTERM", False)
    assert told == [DrainStarted(reason=StopReason.SIGTERM)]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
async def test_signals_that_arrive_together_are_one_request(second: signal.Signals) -> None:
    stop_signal = StopSignal(lambda _event: None)
    stop_signal.request_by_signal(signal.SIGHUP)
    stop_signal.request_by_signal(second)
    assert not stop_signal.aborted


async def test_ctrl_c_twice_cancels_the_work_at_once() -> None:
    stop_signal = StopSignal(lambda _event: None)
    work = asyncio.create_task(_forever())
    stop_signal.work = work
    stop_signal.request_by_signal(signal.SIGINT)
    assert not work.cancelling()
    stop_signal.request_by_signal(signal.SIGINT)
    with pytest.raises(asyncio.CancelledError):
        await work
    assert stop_signal.aborted


async def test_a_later_signal_of_any_kind_cancels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "SAME_REQUEST_SECONDS", 0.0)
    stop_signal = StopSignal(lambda _event: None)
    stop_signal.request_by_signal(signal.SIGTERM)
    stop_signal.request_by_signal(signal.SIGTERM)
    assert stop_signal.aborted


async def test_waiting_ends_with_the_request() -> None:
    stop_signal = StopSignal(lambda _event: None)
    assert not await stop_signal.wait(0)
    waiting = asyncio.create_task(stop_signal.wait(60))
    await asyncio.sleep(0)
    stop_signal.request(StopReason.STOP_AFTER)
    assert await waiting


async def test_handlers_are_those_of_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_signal = StopSignal(lambda _event: None)
    with stop_signal.signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
