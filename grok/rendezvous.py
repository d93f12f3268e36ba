"""Rendezvous: the processes of a run meet at the coordinator's address before JAX connects them.

JAX's service dies of a segmentation fault where its port is taken, and ends all processes of a run,
even one that is under way, when two of them have the same number. So process 0 first listens at
that address itself. Every process sends it one line of JSON, is asked to wait, and is told to
continue when all are there, or a reason to leave. The port is free again when JAX starts."""

import asyncio
import contextlib
import errno
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from grok.errors import RESTART, ConfigError, GrokError, Lost

# Longest wait for what a restart of a run may leave behind: a port of a process that is just
# ending, a host name that is not published yet.
PATIENCE_SECONDS = 6
ANSWER_SECONDS = 3  # a process that listens answers within
RETRY_SECONDS = 0.25
MAX_LINE_BYTES = 1 << 12
HELLO = {"process": int, "count": int, "host": str, "token": str}


def meet(address: str, count: int, index: int, timeout_seconds: int) -> None:
    """Returns when all `count` processes have called it, this one as number `index`, or raises in
    all of them: ConfigError where two have the same number, or not all the same count; Lost where
    one does not come within `timeout_seconds`, or the address, HOST:PORT, cannot be used."""
    name, _, port = address.rpartition(":")
    host = name.strip("[]")
    deadline = time.monotonic() + timeout_seconds
    values = index, count, socket.gethostname(), secrets.token_hex(8)
    hello = dict(zip(HELLO, values, strict=True))
    _resolve(host, address)
    attend = functools.partial(_attend, host, int(port), hello, deadline)
    if index:
        attend()
    else:
        listener = _listen(host, int(port), hello)
        _obey(asyncio.run(_take_roll(count, timeout_seconds, listener, attend)))


def _resolve(host: str, address: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until:
                raise Lost(
                    f"the coordinator's address {address} cannot be used: the host name {host} "
                    f"does not resolve here ({_reason(error)}); a name or an IP address that every "
                    "host knows would work."
                ) from None
        time.sleep(RETRY_SECONDS)


def _listen(host: str, port: int, hello: dict[str, Any]) -> socket.socket:
    """Listens on all addresses of this machine. Where the port is taken by another process 0 of the
    same run, that one decides; any other is waited for, but not long."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=512)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                with contextlib.suppress(_NotThere):
                    _attend_once(host, port, hello, until)
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise Lost(
                    f"process 0 cannot listen on port {port}, the coordinator's: "
                    f"{os.strerror(error.errno or 0)}; another port, free on this host, would work."
                ) from None
        time.sleep(RETRY_SECONDS)


def _attend(host: str, port: int, hello: dict[str, Any], deadline: float) -> None:
    """Waits for the decision of process 0, however late that starts to listen."""
    strange_since: float | None = None
    while True:
        strange = True
        try:
            _attend_once(host, port, hello, deadline)
            return
        except _NotThere as missing:
            strange, problem = missing.is_strange or not hello["process"], str(missing)
        now = time.monotonic()
        strange_since = (strange_since or now) if strange else None
        if now > deadline or (strange_since and now > strange_since + PATIENCE_SECONDS):
            raise Lost(
                f"process {hello['process']} did not find process 0 at {host}:{port}: {problem}."
            )
        time.sleep(RETRY_SECONDS)


class _NotThere(Exception):
    """Nothing answers as a process 0 that starts would; `is_strange`: but something does."""

    def __init__(self, problem: str, is_strange: bool = False):
        super().__init__(problem)
        self.is_strange = is_strange


def _attend_once(host: str, port: int, hello: dict[str, Any], deadline: float) -> None:
    try:
        connection = socket.create_connection((host, port), timeout=ANSWER_SECONDS)
    except OSError as error:
        raise _NotThere(_reason(error)) from None
    try:
        with connection:
            connection.sendall(_line(hello))
            with connection.makefile("rb") as lines:
                if _parse(lines.readline(MAX_LINE_BYTES)).get("decision") != "wait":
                    raise _strange()
                connection.settimeout(max(1.0, deadline - time.monotonic() + ANSWER_SECONDS))
                decision = _parse(lines.readline(MAX_LINE_BYTES))
    except (TimeoutError, ConnectionResetError):
        raise _strange() from None
    except OSError as error:
        raise _NotThere(_reason(error)) from None
    if not decision:
        raise _NotThere("it ended while it waited for the others")
    _obey(decision)


def _obey(decision: dict[str, Any]) -> None:
    if reason := decision.get("reason"):
        raise (Lost if decision.get("code") == RESTART else ConfigError)(reason)


def _strange() -> _NotThere:
    problem = "what answers there is another program, or a run that is already under way"
    return _NotThere(problem, is_strange=True)


async def _take_roll(
    count: int, timeout_seconds: int, listener: socket.socket, attend: Callable[[], None]
) -> dict[str, Any]:
    return await _Roster(count, timeout_seconds).serve(listener, attend)


class _Roster:
    """The processes that are waiting at process 0, and its decision."""

    def __init__(self, count: int, timeout_seconds: int):
        self._count, self._timeout_seconds = count, timeout_seconds
        self._waiting: dict[int, dict[str, Any]] = {}
        self._sessions: set[asyncio.Task] = set()
        self._came: set[int] = set()
        self._all_came = asyncio.Event()
        self._decision = asyncio.get_running_loop().create_future()

    async def serve(self, listener: socket.socket, attend: Callable[[], None]) -> dict[str, Any]:
        """Listens until there is a decision and all that wait have it; returns it. `attend` is
        called in a thread: process 0 comes by the address too, which shows that it leads here."""
        loop = asyncio.get_running_loop()
        attended = asyncio.Event()
        server = await asyncio.start_server(self._attend, sock=listener, limit=MAX_LINE_BYTES)

        def attend_as_process_0() -> None:
            try:
                attend()
            except GrokError as error:
                loop.call_soon_threadsafe(self._decide, error.exit_code, str(error))
            finally:
                loop.call_soon_threadsafe(attended.set)

        threading.Thread(target=attend_as_process_0, daemon=True).start()
        try:
            await asyncio.wait_for(asyncio.shield(self._decision), self._timeout_seconds)
        except TimeoutError:
            self._decide(RESTART, self._missing())
        await attended.wait()
        # Whoever starts a little later should not wait for a process 0 that has left.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_came.wait(), PATIENCE_SECONDS / 3)
        server.close()
        # Each reads the decision and hangs up first, which leaves the port free at once.
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=ANSWER_SECONDS)
        return self._decision.result()

    def _missing(self) -> str:
        missing = sorted(set(range(self._count)) - self._waiting.keys())
        names = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        return (
            f"not all processes of the run connected within {self._timeout_seconds} s: of "
            f"{self._count}, {len(missing)} did not (process {names})."
        )

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.current_task()
        assert session is not None
        self._sessions.add(session)
        with contextlib.closing(writer), contextlib.suppress(OSError, ValueError, TimeoutError):
            hello = _parse(await asyncio.wait_for(reader.readline(), ANSWER_SECONDS))
            if [type(hello.get(name)) for name in HELLO] != list(HELLO.values()):
                return  # a probe, or another program
            writer.write(_line({"decision": "wait"}))
            self._enter(hello)
            hung_up = asyncio.ensure_future(reader.read(1))
            await asyncio.wait([hung_up, self._decision], return_when=asyncio.FIRST_COMPLETED)
            if self._decision.done():
                writer.write(_line(self._decision.result()))
                await asyncio.wait([hung_up], timeout=ANSWER_SECONDS)
            elif self._waiting.get(hello["process"]) is hello:
                del self._waiting[hello["process"]]
            hung_up.cancel()

    def _enter(self, hello: dict[str, Any]) -> None:
        process, count, host = hello["process"], hello["count"], hello["host"]
        other = self._waiting.setdefault(process, hello)
        self._came.add(process)
        if len(self._came) >= self._count:
            self._all_came.set()
        if count != self._count:
            self._decide(
                ConfigError.exit_code,
                f"GROK_NUM_PROCESSES is {self._count} in process 0 and {count} in process "
                f"{process} on {host}; the same number in all would work.",
            )
        elif other["token"] != hello["token"]:
            places = host if host == other["host"] else f"{other['host']} and {host}"
            self._decide(
                ConfigError.exit_code,
                f"two processes, on {places}, say that they are process {process} "
                f"(GROK_PROCESS_ID) of {count}; numbers from 0 to {count - 1}, each once, "
                "would work.",
            )
        elif len(self._waiting) == self._count:
            self._decide(0, "")

    def _decide(self, code: int, reason: str) -> None:
        if not self._decision.done():
            decision = "leave" if code else "go"
            self._decision.set_result({"decision": decision, "code": code, "reason": reason})


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    """The message of a line; {} for what is none, such as the end of a connection."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    return {}


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
