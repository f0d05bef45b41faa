"""A fork of the server is a process like one that is started by its command line."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.fork_server import Fork, fork
from tests.acceptance.harness import PROJECT, environment, wait_until
from tests.signals import stop_ignoring_signals

_PROBE = """
import atexit, hashlib, os, signal, sys, threading
print(sys.argv, sys.path[1:], sys.flags, sys.warnoptions, os.getcwd(), os.umask(0))
print(os.getsid(0) == os.getpgrp() == os.getpid(), sorted(os.environ))
print(hashlib.sha256(repr(sorted(os.environ.items())).encode()).hexdigest())
print([(number.name, signal.getsignal(number)) for number in signal.Signals])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), sorted(os.listdir("/proc/self/fd")))
print([(stream.encoding, stream.isatty()) for stream in (sys.stdin, sys.stdout, sys.stderr)])
print(sys.stdin.read() == "")
atexit.register(print, "the end")
thread = threading.Timer(0.2, print, ["the thread"])
thread.start()
"""


def _environment(**variables: str) -> dict[str, str]:
    """Return one that the server does not have."""
    return {name: value for name, value in environment("").items() if name != "PATH"} | variables


def _forked(folder: Path, *program: str, **variables: str) -> tuple[Fork, Path, Path]:
    out, err = folder / "fork.out", folder / "fork.err"
    out.touch()
    err.touch()
    return fork([sys.executable, *program], _environment(**variables), out, err), out, err


def _script(folder: Path, text: str) -> str:
    script = folder / "program.py"
    script.write_text(text)
    return str(script)


def test_it_is_like_a_process_of_its_own(tmp_path: Path) -> None:
    program = _script(tmp_path, _PROBE)
    process, out, err = _forked(tmp_path, program, "two words", A_NAME="a value")
    status = process.wait()
    stop_ignoring_signals()
    expected = subprocess.run(
        [sys.executable, program, "two words"],
        check=True,
        cwd=PROJECT,
        env=_environment(A_NAME="a value"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert (status, err.read_text()) == (0, "")
    assert out.read_text() == expected.stdout


@pytest.mark.parametrize(
    ("text", "status", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('refused')", 1, "refused\n"),
        ("raise ValueError('broken')", 1, "ValueError: broken\n"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_its_status_and_its_error(tmp_path: Path, text: str, status: int, error: str) -> None:
    process, _, err = _forked(tmp_path, _script(tmp_path, text))
    assert process.wait() == status
    assert err.read_text().endswith(error)
    assert err.read_text().startswith("Traceback") == ("ValueError" in error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    process, out, _ = _forked(
        tmp_path, _script(tmp_path, "print('up', flush=True)\nimport time; time.sleep(60)")
    )
    wait_until(out.read_text, "it runs")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.send_signal(number)
    assert process.wait() == -number
    # To one that has ended, it does nothing.
    process.send_signal(number)
    process.kill()


@pytest.mark.parametrize(("variable", "options"), [("error", "['error']\n"), ("", "[]\n")])
def test_it_gets_the_variables_of_the_interpreter(tmp_path: Path, variable: str, options: str) -> None:
    program = _script(tmp_path, "import sys; print(sys.warnoptions)")
    process, out, _ = _forked(tmp_path, program, PYTHONWARNINGS=variable)
    assert process.wait() == 0
    assert out.read_text() == options
