"""The proxy does what its faults are called; otherwise the tests that use it would show nothing."""

import array
import fcntl
import socket
import socketserver
import sys
import termios
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

import core.proxy
from core.proxy import At, FrontendMessages, Proxy
from tests.acceptance.harness import wait_until
from tests.faults.database import Database


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while said := self.request.recv(65_536):
                self.request.sendall(said)
        except ConnectionResetError:
            pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@pytest.fixture
def echo() -> Iterator[Proxy]:
    """A proxy to a server that repeats what it hears."""
    with _Server(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with Proxy(port=server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


def _client(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def _exchange(client: socket.socket, said: bytes) -> float:
    """Return how many seconds the echo took."""
    started = time.monotonic()
    client.sendall(said)
    heard = 0
    while heard < len(said):
        heard += len(client.recv(65_536))
    return time.monotonic() - started


def _assert_echo_takes(client: socket.socket, said: bytes, *, least: float, most: float) -> None:
    """Each echo takes at least so many seconds; one that takes longer than the most has waited for a CPU."""

    def is_quick() -> bool:
        seconds = _exchange(client, said)
        assert seconds >= least
        return seconds < most

    wait_until(is_quick, f"an echo takes less than {most} s")


def test_it_forwards_both_ways(echo: Proxy) -> None:
    with _client(echo) as client:
        assert _exchange(client, b"x" * 300_000) < 30
        assert echo.connections == 1
    wait_until(lambda: echo.connections == 0, "it notices that the client has gone")


def test_cut_resets_every_connection_and_new_ones_are_let_in(echo: Proxy) -> None:
    with _client(echo) as first, _client(echo) as second:
        _exchange(first, b"x")
        _exchange(second, b"x")
        assert echo.cut() == 2
        for client in (first, second):
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    with _client(echo) as third:
        _exchange(third, b"x")


def test_refuse_keeps_those_that_are_in(echo: Proxy) -> None:
    with _client(echo) as inside:
        _exchange(inside, b"x")
        echo.refuse()
        with pytest.raises(ConnectionRefusedError):
            _client(echo)
        _exchange(inside, b"x")
        port = echo.port
        echo.accept()
        assert echo.port == port
        with _client(echo) as late:
            _exchange(late, b"x")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much was not acknowledged")
def test_silence_is_acknowledged(echo: Proxy) -> None:
    with _client(echo) as client:
        _exchange(client, b"x")
        echo.go_silent()
        client.sendall(b"y" * 1_000_000)
        unacknowledged = array.array("i", [1])

        def all_is_acknowledged() -> bool:
            fcntl.ioctl(client, termios.TIOCOUTQ, unacknowledged)
            return unacknowledged[0] == 0

        wait_until(all_is_acknowledged, "everything is acknowledged")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
    with _client(echo) as following:
        _exchange(following, b"x")
        echo.go_silent(new_ones_too=True)
    with _client(echo) as silent:
        silent.settimeout(0.2)
        silent.sendall(b"x")
        with pytest.raises(TimeoutError):
            silent.recv(1)


@pytest.mark.parametrize(
    ("to_server_seconds", "to_client_seconds", "expected"),
    [(0.2, 0.0, 0.2), (0.0, 0.2, 0.2), (0.1, 0.2, 0.3)],
)
def test_each_direction_has_its_delay(
    echo: Proxy, to_server_seconds: float, to_client_seconds: float, expected: float
) -> None:
    with _client(echo) as client:
        _assert_echo_takes(client, b"x", least=0, most=0.1)
        echo.delay(to_server_seconds=to_server_seconds, to_client_seconds=to_client_seconds)
        _assert_echo_takes(client, b"x", least=expected, most=expected + 0.15)


def test_pieces_are_delayed_beside_each_other(echo: Proxy) -> None:
    with _client(echo) as client:
        _exchange(client, b"x")
        echo.delay(to_server_seconds=0.2)

        def are_delayed_together() -> bool:
            began = time.monotonic()
            for _ in range(5):
                client.sendall(b"x")
                # Apart enough to be pieces of their own.
                time.sleep(0.02)
            received = b""
            while len(received) < 5:
                received += client.recv(10)
            seconds = time.monotonic() - began
            assert seconds >= 0.2
            # One after the other they would take a second, and on a busy machine they can.
            return seconds < 0.9

        wait_until(are_delayed_together, "the pieces arrive together")


def test_throttle_limits_the_bytes_per_second(echo: Proxy) -> None:
    with _client(echo) as client:
        _exchange(client, b"x")
        echo.throttle(50_000)
        assert _exchange(client, b"x" * 20_000) >= 0.4
        echo.throttle(None)
        # The next piece may still be awaited by the measure of before.
        _exchange(client, b"x")
        _assert_echo_takes(client, b"x" * 20_000, least=0, most=0.2)


def _connect(proxy: Proxy, database: Database) -> psycopg.Connection:
    return psycopg.connect(database.url(port=proxy.port))


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(("at", "committed"), [(At.BEFORE, 0), (At.AFTER, 1), (At.LATE, 1)])
def test_a_commit_is_cut_where_it_was_asked_for(
    proxy: Proxy, database: Database, at: At, committed: int, *, pipelined: bool
) -> None:
    database.query("CREATE TABLE told (what text)")
    database.query("CREATE TABLE other (what text)")
    proxy.cut_at_commit(at, containing=b"INTO told")
    with _connect(proxy, database) as untouched:
        untouched.execute("INSERT INTO other VALUES ('a')")
        untouched.commit()
    connection = _connect(proxy, database)
    with pytest.raises(psycopg.OperationalError):  # noqa: PT012 - the pipeline's end is part of it
        if pipelined:
            with connection.pipeline():
                connection.execute("INSERT INTO told VALUES (%s)", ["b"])
                connection.execute("COMMIT")
        else:
            connection.execute("INSERT INTO told VALUES (%s)", ["b"])
            connection.commit()
    assert connection.closed

    wait_until(lambda: proxy.commits_cut == 1, "the commit is cut")
    wait_until(lambda: database.backends() == 0, "the server has noticed")
    assert database.number("SELECT count(*) FROM told") == committed
    assert database.number("SELECT count(*) FROM other") == 1


def test_a_late_commit_comes_after_the_client_has_heard_of_the_loss(
    proxy: Proxy, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time enough to look before it, also on a busy machine.
    monkeypatch.setattr(core.proxy, "_LATE_SECONDS", 2.0)
    database.query("CREATE TABLE told (what text)")
    proxy.cut_at_commit(At.LATE)
    connection = _connect(proxy, database)
    connection.execute("INSERT INTO told VALUES ('b')")
    with pytest.raises(psycopg.OperationalError):
        connection.commit()

    assert database.number("SELECT count(*) FROM told") == 0
    wait_until(lambda: database.number("SELECT count(*) FROM told") == 1, "it is committed")


def _frontend(*messages: bytes) -> bytes:
    def framed(message: bytes) -> bytes:
        return message[:1] + (len(message) + 3).to_bytes(4, "big") + message[1:]

    start = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
    start += (8).to_bytes(4, "big") + (196608).to_bytes(4, "big")
    return start + b"".join(map(framed, messages))


def test_a_transaction_can_be_left_open_for_good(proxy: Proxy, database: Database) -> None:
    database.query("CREATE TABLE told (what text)")
    proxy.cut_at_commit(At.NEVER)
    connection = _connect(proxy, database)
    connection.execute("INSERT INTO told VALUES ('b')")
    with pytest.raises(psycopg.OperationalError):
        connection.commit()

    time.sleep(0.3)
    state = database.query("SELECT state FROM pg_stat_activity WHERE query LIKE 'INSERT INTO told%'")
    assert state == [("idle in transaction",)]
    assert proxy.cut() == 1
    wait_until(lambda: database.backends() == 0, "the server has noticed")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_commit_is_found_however_its_bytes_arrive(size: int) -> None:
    sent = _frontend(b"PBEGIN\0\0\0", b"P\0COMMITTED\0", b"QINSERT\0", b"P\0commit \0", b"S", b"QCOMMIT\0")
    commit = b"P\0\0\0\x0d\0commit \0"
    before = sent.index(commit)
    messages = FrontendMessages()
    found = []
    for start in range(0, len(sent), size):
        position = messages.before_commit(sent[start : start + size], b"INSERT")
        if position is not None:
            found.append(start + position)
    # What was forwarded of it before it was whole cannot be held back any more, and is no COMMIT alone.
    assert len(found) == 1
    assert before <= found[0] < before + len(commit)


def test_it_reaches_a_unix_socket_too(database: Database) -> None:
    folder, port = database.server.socket_folder, database.server.port
    with (
        Proxy(path=f"{folder}/.s.PGSQL.{port}") as proxy,
        psycopg.connect(
            host="127.0.0.1", port=proxy.port, user="postgres", dbname=database.name, autocommit=True
        ) as connection,
    ):
        assert connection.execute("SELECT 1").fetchone() == (1,)
