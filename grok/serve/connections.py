"""Connections of clients, with limits that the HTTP library lacks: on their number, and on the time
that headers take, or a client that does not read its answer."""

import contextlib
import os
import resource
import socket
import struct
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from grok.config.infer import HttpConfig
from grok.infer.openai.responses import error_response, json_text

# Files, devices and pipes that a server may open after its start.
SPARE_DESCRIPTORS = 64
NO_LINGER = struct.pack("ii", 1, 0)
FULL_MESSAGE = "there are too many connections; try again in a moment."
FULL_BODY = json_text(error_response(None, FULL_MESSAGE, "server_error")).encode()
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
) % (len(FULL_BODY), FULL_BODY)


def max_connections(config: HttpConfig) -> int:
    """The connections that there may be at a time: those of the config, or as many as this process
    may have descriptors for, whose limit is raised as far as the system allows."""
    used = len(os.listdir("/dev/fd")) + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < used + config.max_connections:
        limit = used + config.max_connections
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
    if soft == resource.RLIM_INFINITY:
        return config.max_connections
    return max(1, min(config.max_connections, soft - used))


class Connection(H11Protocol):
    """A client's connection. `check` ends it where the client is too slow."""

    config: Any  # uvicorn's, with `limits`, an HttpConfig

    def __init__(self, *args: Any, **options: Any):
        """As uvicorn makes it."""
        super().__init__(*args, **options)
        self.waits_since = self.loop.time()  # for the headers of a request, or for a client to send
        self._has_begun = True  # the client owes headers: it is new, or has sent a part of them
        self._unread, self._read_at = 0, 0.0  # bytes that the client has still to take

    @property
    def busy(self) -> bool:
        """True while a request is answered."""
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Takes a new client. Where there are too many, the connection that has waited longest for
        a request makes room; where all are busy, this one is refused."""
        super().connection_made(transport)
        if len(self.connections) <= self.config.limits.max_connections:
            return
        others: Any = self.connections - {self}
        idle = [connection for connection in others if not connection.busy]
        if idle:
            min(idle, key=lambda connection: connection.waits_since).transport.abort()
        else:
            transport.write(FULL)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Takes what the client sent."""
        if not (self.busy or self._has_begun):
            self.waits_since, self._has_begun = self.loop.time(), True
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Begins to wait for the next request."""
        self.waits_since, self._has_begun = self.loop.time(), False
        super().on_response_complete()

    def check(self, now: float) -> None:
        """Ends the connection where its headers are late, or nothing of an answer was taken for too
        long; `now` is a time of the loop."""
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread < self._unread or not self._unread:
            self._read_at = now
        self._unread = unread
        limits = self.config.limits
        owes_headers = self._has_begun and not self.busy
        if owes_headers and now - self.waits_since > limits.header_timeout_seconds:
            self.transport.abort()
        elif unread and now - self._read_at > limits.write_timeout_seconds:
            self._reset()

    def _reset(self) -> None:
        """Ends the connection, and drops what the system would still send to the client."""
        if (connection := self.transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()
