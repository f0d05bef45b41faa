"""A TCP proxy in front of a server that can fail in every way a network does, and exactly at a COMMIT."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Self, TypeVar

from core.ports import unused_port

T = TypeVar("T")

_PIECE_BYTES: Final = 65_536
_MOST_PIECES_TRAVELLING: Final = 256
_THROTTLED_PIECES_PER_SECOND: Final = 20
_LATE_SECONDS: Final = 0.7
_ANSWER_SECONDS: Final = 10.0
_RESET: Final = struct.pack("ii", 1, 0)

# The manual's chapter "Frontend/Backend Protocol": the messages that come before the start-up message, and
# have no type of their own.
_HEAD: Final = struct.Struct("!iI")
_BEFORE_START: Final = frozenset({80877103, 80877104})
_LENGTH: Final = struct.Struct("!i")
# Query, Sync and Flush.
_ANSWERED: Final = (b"Q", b"S", b"H")


class At(Enum):
    """When the connection that sends a COMMIT is cut; the client can tell none of them from the others."""

    BEFORE = "before it is forwarded: nothing was committed"
    AFTER = "after the server has answered, but before the client hears it: all was committed"
    LATE = "at once, and only then is it forwarded: it is committed after the client has left"
    NEVER = "at once, and it is never forwarded: the server keeps the transaction, and its locks, open"


class FrontendMessages:
    """Parts what a client of PostgreSQL sends into messages, however it arrives.

    Attributes:
        is_awaiting: Whether the client has sent all that the server needs to answer.
    """

    def __init__(self) -> None:
        self.is_awaiting = False
        self._rest = b""
        self._started = False
        self._transaction = bytearray()

    def before_commit(self, piece: bytes, containing: bytes) -> int | None:
        """Take the next piece.

        Args:
            piece: What has arrived.
            containing: What the client must have sent since its last COMMIT, for this one to count.

        Returns:
            How many bytes of the piece come before a COMMIT; None where there is none in it.
        """
        buffered = self._rest + piece
        position = 0
        found: int | None = None
        while (end := self._end(buffered, position)) is not None:
            message = buffered[position:end]
            if self._started and _is_commit(message):
                if found is None and containing in self._transaction:
                    found = max(0, position - len(self._rest))
                self._transaction.clear()
            else:
                self._transaction += message
            self.is_awaiting = self._started and message[:1] in _ANSWERED
            if not self._started:
                self._started = _HEAD.unpack_from(message)[1] not in _BEFORE_START
            position = end
        self._rest = buffered[position:]
        self.is_awaiting = self.is_awaiting and not self._rest
        return found

    def _end(self, buffered: bytes, position: int) -> int | None:
        """Where the message at this position ends; None where it has not arrived as a whole."""
        start = position + 1 if self._started else position
        if len(buffered) < start + (_LENGTH.size if self._started else _HEAD.size):
            return None
        end = start + int(_LENGTH.unpack_from(buffered, start)[0])
        return end if end <= len(buffered) else None


def _is_commit(message: bytes) -> bool:
    kind, body = message[:1], message[1 + _LENGTH.size :]
    if kind == b"Q":
        statement = body
    elif kind == b"P":
        # Parse: the prepared statement's name comes first.
        statement = body.partition(b"\0")[2]
    else:
        return False
    return statement.partition(b"\0")[0].strip().rstrip(b";").upper() == b"COMMIT"


class _LongWay:
    """What a reader reads, later: pieces travel behind each other, and none waits for the one before."""

    def __init__(self, reader: asyncio.StreamReader, seconds: Callable[[], float]) -> None:
        self._reader = reader
        self._seconds = seconds
        self._travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_PIECES_TRAVELLING)
        self._clock = asyncio.get_running_loop().time

    async def take_in(self, piece_bytes: Callable[[], int]) -> None:
        """Let what comes in set out, until there is no more."""
        piece = b"not the last one"
        while piece:
            try:
                piece = await self._reader.read(piece_bytes())
            except OSError:
                piece = b""
            await self._travelling.put((self._clock() + self._seconds(), piece))

    async def read(self) -> bytes:
        """The next piece, once it has arrived; empty at the end."""
        due, piece = await self._travelling.get()
        # Even a sleep of no time lets others go first.
        if (left := due - self._clock()) > 0:
            await asyncio.sleep(left)
        return piece


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trap:
    at: At
    containing: bytes


@dataclass(slots=True, eq=False)
class _Link:
    """One client and the connection to the server that was opened for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    messages: FrontendMessages = field(default_factory=FrontendMessages)
    forwards: bool = True
    swallows_answers: bool = False
    translate_errors: asyncio.Event = field(default_factory=asyncio.Event)


class Proxy:
    """Listens on a port of this host for as long as its context lasts, in a thread of its own.

    Args:
        port: The server's port on this host; or
        path: the server's unix socket.
    """

    def __init__(self, *, port: int | None = None, path: str | None = None) -> None:
        self.port = unused_port()
        self.commits_cut = 0
        self._upstream_port = port
        self._upstream_path = path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumps: set[asyncio.Future[None]] = set()
        self._links: set[_Link] = set()
        self._traps: list[_Trap] = []
        self._to_server_seconds = 0.0
        self._to_client_seconds = 0.0
        self._bytes_per_second: float | None = None
        self._new_ones_are_silent = False

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        """Cut what is left and end."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many clients are connected through it."""
        return len(self._links)

    def cut(self) -> int:
        """Reset all connections, on both sides, and return how many they were."""
        return self._call(self._cut())

    def refuse(self) -> None:
        """Refuse new connections; open ones stay open."""
        self._call(self._stop_listening())

    def accept(self) -> None:
        """Accept connections again, on the same port."""
        self._call(self._listen())

    def go_silent(self, *, new_ones_too: bool = False) -> None:
        """Forward nothing more in either direction, and acknowledge everything all the same.

        Args:
            new_ones_too: Whether those that connect from now on are treated like that as well.
        """
        self._call(self._go_silent(new_ones_too=new_ones_too))

    def delay(self, *, to_server_seconds: float = 0.0, to_client_seconds: float = 0.0) -> None:
        """Make the way longer: each piece arrives so much later, however many are on their way."""
        self._to_server_seconds = to_server_seconds
        self._to_client_seconds = to_client_seconds

    def throttle(self, bytes_per_second: float | None) -> None:
        """Forward no more than this, on each connection and in each direction; None for no limit."""
        self._bytes_per_second = bytes_per_second

    def cut_at_commit(self, at: At, *, containing: bytes = b"") -> None:
        """Cut one connection when it sends the next COMMIT; to be called once for each.

        Args:
            at: When.
            containing: Text that the transaction must have sent, e.g. the name of a table.
        """
        self._loop.call_soon_threadsafe(self._traps.append, _Trap(at=at, containing=containing))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            # Not wait_closed(), which waits for those that are in as well.
            self._listener.close()
            self._listener = None

    async def _close(self) -> None:
        await self._stop_listening()
        await self._cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._tasks)

    async def _cut(self) -> int:
        links = list(self._links)
        for link in links:
            _reset(link.client)
            _reset(link.server)
        self._links.clear()
        return len(links)

    async def _go_silent(self, *, new_ones_too: bool) -> None:
        self._new_ones_are_silent = new_ones_too
        for link in self._links:
            link.forwards = False

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("A connection is served by a task.")
        self._tasks.add(task)
        try:
            server_reader, server = await self._connect()
        except OSError:
            _reset(client)
            self._tasks.discard(task)
            return
        link = _Link(client, server, forwards=not self._new_ones_are_silent)
        self._links.add(link)
        to_server = _LongWay(client_reader, lambda: self._to_server_seconds)
        to_client = _LongWay(server_reader, lambda: self._to_client_seconds)
        intakes = {asyncio.ensure_future(way.take_in(self._piece_bytes)) for way in (to_server, to_client)}
        pumps = {
            asyncio.ensure_future(self._pump_to_server(link, to_server)),
            asyncio.ensure_future(self._pump_to_client(link, to_client)),
        }
        self._pumps |= pumps
        # When one side hangs up, so does the other.
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps | intakes:
            pump.cancel()
        await asyncio.gather(*pumps, *intakes, return_exceptions=True)
        self._pumps -= pumps
        client.close()
        server.close()
        self._links.discard(link)
        self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._upstream_path is not None:
            return await asyncio.open_unix_connection(self._upstream_path)
        return await asyncio.open_connection("127.0.0.1", self._upstream_port)

    async def _pump_to_server(self, link: _Link, way: _LongWay) -> None:
        with contextlib.suppress(OSError):
            while piece := await way.read():
                await self._throttle(piece)
                if not link.forwards:
                    continue
                trap = self._sprung(link, piece)
                if trap is not None:
                    await self._cut_at_commit(link, way, piece, *trap)
                    return
                link.server.write(piece)
                await link.server.drain()

    async def _pump_to_client(self, link: _Link, way: _LongWay) -> None:
        with contextlib.suppress(OSError):
            while piece := await way.read():
                link.translate_errors.set()
                if link.swallows_answers:
                    continue
                await self._throttle(piece)
                if link.forwards:
                    link.client.write(piece)
                    await link.client.drain()
        link.translate_errors.set()
        if link.swallows_answers:
            # The pump to the server knows when it is over.
            await asyncio.Event().wait()

    def _sprung(self, link: _Link, piece: bytes) -> tuple[_Trap, int] | None:
        trap = self._traps[0] if self._traps else None
        before = link.messages.before_commit(piece, trap.containing if trap else b"")
        if trap is None or before is None:
            return None
        del self._traps[0]
        return trap, before

    async def _cut_at_commit(
        self, link: _Link, way: _LongWay, piece: bytes, trap: _Trap, before: int
    ) -> None:
        link.swallows_answers = True
        while not link.messages.is_awaiting and (more := await way.read()):
            link.messages.before_commit(more, trap.containing)
            piece += more
        link.server.write(piece[:before])
        await link.server.drain()
        if trap.at in (At.LATE, At.NEVER):
            _reset(link.client)
        if trap.at is At.LATE:
            await asyncio.sleep(_LATE_SECONDS)
        if trap.at in (At.AFTER, At.LATE):
            link.translate_errors.clear()
            link.server.write(piece[before:])
            # Until it has answered, or it seems to have ended the connection without a word.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await link.translate_errors.wait()
        _reset(link.client)
        self.commits_cut += 1
        if trap.at is At.NEVER:
            await asyncio.Event().wait()
        _reset(link.server)

    def _piece_bytes(self) -> int:
        if self._bytes_per_second is None:
            return _PIECE_BYTES
        return max(1, int(self._bytes_per_second / _THROTTLED_PIECES_PER_SECOND))

    async def _throttle(self, piece: bytes) -> None:
        if self._bytes_per_second is not None:
            await asyncio.sleep(len(piece) / self._bytes_per_second)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the peer gets a RST: without lingering, and with nothing sent any more."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
