"""Signals that the test process may ignore: some since it was started, and two since a rotation ran in it."""

import signal
from types import FrameType


def stop_ignoring_signals() -> None:
    """Let the processes that this one starts have the default actions of these signals.

    A process inherits an ignored signal from its parent, but not a handler. So a handler that does nothing
    replaces each "ignore": this process still survives the signal.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass
