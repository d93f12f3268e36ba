"""The channel of a server that several processes step: JSON from process 0 to the others and back.

A frame is its length in four bytes and that many bytes of JSON; nothing that arrives is executed.
Each side sends a heartbeat, so that one that was killed or stopped is found by the others, also
while their main threads wait for its part of a step."""

import contextlib
import hmac
import json
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from grok.errors import Lost

LENGTH = struct.Struct(">I")
HEARTBEAT = None  # as a frame; the frames of others are objects
HEARTBEATS_PER_TIMEOUT = 4
MAX_HELLO_BYTES = 4096
HELLO_SECONDS = 5  # for a new connection to say who it is

OnLost = Callable[[int, str], object]


class Closed(Exception):
    """The other side closed the connection, or sent something that is no frame."""


def encode(data: Any) -> bytes:
    """A frame that holds `data`."""
    payload = json.dumps(data, separators=(",", ":")).encode()
    return LENGTH.pack(len(payload)) + payload


def receive(connection: socket.socket, max_bytes: int = 2**32) -> Any:
    """The data of the next frame. Raises Closed, and TimeoutError as the socket is set."""
    (size,) = LENGTH.unpack(_receive_bytes(connection, LENGTH.size))
    if size > max_bytes:
        raise Closed(f"a frame of {size} bytes where {max_bytes} are allowed")
    try:
        return json.loads(_receive_bytes(connection, size))
    except (ValueError, RecursionError):
        raise Closed("a frame that is not JSON") from None


def _receive_bytes(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (part := connection.recv(min(size - len(data), 1 << 20))):
            raise Closed("the connection was closed")
        data += part
    return bytes(data)


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Peer:
    """The connection to another process, read and kept alive by threads of its own."""

    def __init__(
        self,
        connection: socket.socket,
        index: int,
        timeout_seconds: float,
        on_frame: Callable[[Any], None],
        on_lost: OnLost,
    ):
        """`on_frame` gets every frame but heartbeats, `on_lost` the index of the process and the
        reason why there will be no more: it closed the connection before `close`, or was silent for
        too long."""
        connection.settimeout(timeout_seconds)
        with contextlib.suppress(OSError):  # of a socket pair, in tests
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._index, self._timeout = connection, index, timeout_seconds
        self._on_frame, self._on_lost = on_frame, on_lost
        self._closed, self._sending = threading.Event(), threading.Lock()
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def send(self, frame: bytes) -> None:
        """Sends an encoded frame."""
        try:
            with self._sending:
                self._connection.sendall(frame)
        except OSError as error:
            self._lose(error)

    def expect_end(self) -> None:
        """From here on the other side may close the connection."""
        self._closed.set()

    def close(self) -> None:
        """Ends the connection and its threads."""
        self._closed.set()
        _shut_down(self._connection)

    def _read(self) -> None:
        try:
            with self._connection:
                while True:
                    if (frame := receive(self._connection)) is not HEARTBEAT:
                        self._on_frame(frame)
        except (OSError, Closed) as error:
            self._lose(error)

    def _beat(self) -> None:
        while not self._closed.wait(self._timeout / HEARTBEATS_PER_TIMEOUT):
            self.send(encode(HEARTBEAT))

    def _lose(self, error: Exception) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        silent = f"was silent for {self._timeout:g} s (heartbeat_timeout_seconds)"
        reason = silent if isinstance(error, TimeoutError) else "is gone"
        sentence = f"process {self._index} {reason}; all processes end, to be started again."
        self._on_lost(self._index, sentence)


class PrimaryChannel:
    """Process 0's side: listens at `port` on all interfaces until every follower is connected."""

    def __init__(self, num_followers: int, timeout_seconds: float, on_lost: OnLost):
        """`on_lost` is called, in another thread, with the process that was lost and a sentence."""
        self._missing = set(range(1, num_followers + 1))
        self._timeout, self._on_lost = timeout_seconds, on_lost
        self._peers: list[Peer] = []
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(32)
        self.stop_requested = threading.Event()  # by a signal to a follower

    def accept(self, seconds: float) -> None:
        """Waits for all followers; connections without the token are closed. Raises Lost where
        they do not come in time."""
        until = time.monotonic() + seconds
        with self._listener:
            while self._missing:
                self._listener.settimeout(max(0.001, until - time.monotonic()))
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    absent = ", ".join(map(str, sorted(self._missing)))
                    problem = f"process {absent} did not connect to process 0 within {seconds:g} s"
                    raise Lost(f"{problem}; its port {self.port} must be reachable.") from None
                self._greet(connection)

    def _greet(self, connection: socket.socket) -> None:
        # A timeout of the socket would begin anew with each byte.
        deadline = threading.Timer(HELLO_SECONDS, _shut_down, [connection])
        deadline.start()
        hello = None
        with contextlib.suppress(OSError, Closed):
            hello = receive(connection, MAX_HELLO_BYTES)
        deadline.cancel()
        match hello:
            case {"process": int(index), "token": str(token)}:
                # JSON may have half of a surrogate pair, which UTF-8 has not.
                token_bytes = token.encode(errors="replace")
                is_ours = hmac.compare_digest(token_bytes, self.token.encode())
            case _:
                index, is_ours = 0, False
        if not is_ours or index not in self._missing:
            connection.close()
            return
        self._missing.remove(index)
        self._peers.append(Peer(connection, index, self._timeout, self._on_frame, self._on_lost))

    def _on_frame(self, _: Any) -> None:
        self.stop_requested.set()  # the only thing that followers ask for

    def send(self, data: dict[str, Any]) -> None:
        """Sends `data` to every follower."""
        frame = encode(data)
        for peer in self._peers:
            peer.send(frame)

    def end(self) -> None:
        """Tells the followers that there is nothing more to do."""
        for peer in self._peers:
            peer.expect_end()
        self.send({})

    def close(self) -> None:
        """Closes all connections."""
        self._listener.close()
        for peer in self._peers:
            peer.close()


class FollowerChannel:
    """The side of another process."""

    def __init__(
        self,
        address: tuple[str, int],
        index: int,
        token: str,
        timeout_seconds: float,
        on_lost: OnLost,
    ):
        """Connects to process 0 at `address`. Raises Lost where that is not possible."""
        try:
            connection = socket.create_connection(address, timeout_seconds)
            connection.sendall(encode({"process": index, "token": token}))
        except OSError as error:
            where = f"{address[0]} port {address[1]}"
            raise Lost(f"process 0 cannot be reached at {where}: {error}.") from None
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._peer = Peer(connection, 0, timeout_seconds, self._on_frame, on_lost)

    def receive(self) -> dict[str, Any] | None:
        """The next data from process 0, however long that takes; None at the end."""
        return self._inbox.get() or None

    def request_stop(self) -> None:
        """Asks process 0 to stop the server."""
        self._peer.send(encode({"stop": True}))

    def close(self) -> None:
        """Closes the connection."""
        self._peer.close()

    def _on_frame(self, data: dict[str, Any]) -> None:
        if not data:
            self._peer.expect_end()
        self._inbox.put(data)
