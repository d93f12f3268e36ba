"""Starts a server from its config, and stops it."""

import asyncio
import dataclasses
import os
import signal
import socket
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import click
import uvicorn

from grok import distributed, storage
from grok.config.infer import HttpConfig, ServeConfig
from grok.errors import SAVED, ConfigError, EngineError
from grok.infer.loader import ServedModel
from grok.serve.app import App
from grok.serve.channel import FollowerChannel
from grok.serve.connections import Connection, max_connections
from grok.serve.engine_thread import EngineThread
from grok.serve.replicated import ReplicatedEngine, follow, open_channel
from grok.serve.watchdog import Watchdog

KEYS_VARIABLE = "GROK_API_KEYS"
TICKS_PER_SECOND = 10  # of uvicorn's main loop
SHUTDOWN_SECONDS = 30  # for requests under way when the server is asked to stop


def run(config: ServeConfig) -> int:
    """Serves until it is asked to stop; returns the exit code, SAVED. Of several processes, which
    all call this, process 0 serves and the others step its engine. Raises ConfigError, DataError
    and CheckpointError for what cannot work, Lost, and EngineError."""
    several = distributed.process_count() > 1
    front = HttpFront(config) if distributed.is_primary() else None
    with Watchdog(config) as watchdog:
        channel = open_channel(config) if several else None
        model = ServedModel(config, spans_all_hosts=several)
        engine = model.engine(_print if front else _ignore)
        engine.warm_up()
        if isinstance(channel, FollowerChannel):
            watchdog.ready(lambda: None)  # a step that hangs does so in process 0, too
            follow(engine, channel)
            return SAVED
        assert front
        if channel is None:
            front.serve(model, engine, watchdog, threading.Event())
            return SAVED
        replicated = ReplicatedEngine(engine, channel)
        front.serve(model, replicated, watchdog, channel.stop_requested)
        channel.end()
    return SAVED


def _print(text: str) -> None:
    click.echo(text, err=True)


def _ignore(text: str) -> None:
    pass


class HttpFront:
    """The side of a server that clients see: its keys and its address, checked when it is made."""

    def __init__(self, config: ServeConfig):
        """Raises ConfigError for keys or an address that cannot be had."""
        self._config, self._keys, self._listener = config, read_keys(config), bind(config)

    def serve(
        self,
        model: ServedModel,
        engine: Any,
        watchdog: Watchdog,
        stop_requested: threading.Event,
    ) -> None:
        """Answers until a signal or `stop_requested` ends it. Raises EngineError where the engine
        breaks down, and Lost where that is because another process is gone."""
        config = self._config
        name = config.name or Path(config.weights.rstrip("/")).name
        broken: list[BaseException] = []

        def on_failure(error: BaseException) -> None:
            broken.append(error)
            server.should_exit = True

        def stop_when_requested() -> None:
            stop_requested.wait()
            server.should_exit = True

        thread = EngineThread(engine, on_failure)
        watchdog.ready(lambda: thread.step_began)
        app = App(config, name, thread, model.parser(config.max_choices), self._keys)
        server = make_server(app, config.http)
        threading.Thread(target=stop_when_requested, daemon=True).start()
        host = f"[{config.host}]" if ":" in config.host else config.host
        _print(f"{name} answers at http://{host}:{self._listener.getsockname()[1]}")
        server.run(sockets=[self._listener])
        if broken:
            traceback.print_exception(broken[0])
            error = distributed.lost_contact(broken[0])
            raise error or EngineError(f"the engine broke down: {broken[0]}") from broken[0]


def bind(config: ServeConfig) -> socket.socket:
    """A listening socket, made before anything slow; clients wait until the server runs. Raises
    ConfigError where the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        # Two processes could both bind it, but only one can listen.
        listener.listen()
    except OSError as error:
        listener.close()
        problem = f"host={config.host} port={config.port} cannot be listened on"
        right = "port=0 takes any port that is free"
        raise ConfigError(f"{problem}: {storage.reason(error)}; {right}.") from None
    return listener


class _Server(uvicorn.Server):
    """A server that finishes the requests under way at the first signal, and ends at the second."""

    async def on_tick(self, counter: int) -> bool:
        """Ends connections that are too slow, once a second; True to stop."""
        if counter % TICKS_PER_SECOND == 0:
            now = asyncio.get_running_loop().time()
            connections: Any = self.server_state.connections
            for connection in list(connections):
                connection.check(now)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGINT or SIGTERM. Uvicorn's own would raise it again at the end."""
        self.should_exit = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # To the descriptor itself: the signal may have interrupted a print.
        seconds = b"in %d s at most; once more stops at once\n" % SHUTDOWN_SECONDS
        os.write(2, b"\nstopping when requests under way are answered, " + seconds)


class _Settings(uvicorn.Config):
    limits: HttpConfig


def make_server(app: App, limits: HttpConfig) -> uvicorn.Server:
    """The HTTP server of an application, to be run on a bound socket."""
    settings = _Settings(
        app.asgi,
        http=Connection,
        ws="none",
        proxy_headers=False,
        # Of a warning each request could make some; what is wrong with one is in its response.
        log_level="error",
        server_header=False,
        timeout_keep_alive=limits.idle_timeout_seconds,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    settings.limits = dataclasses.replace(limits, max_connections=max_connections(limits))
    return _Server(settings)


def read_keys(config: ServeConfig) -> list[str]:
    """API keys from the file and the environment. Raises ConfigError where the file cannot be
    read, or where there are none and other machines could reach the server."""
    keys = os.environ.get(KEYS_VARIABLE, "").split()
    if config.api_keys_file:
        try:
            with storage.errors(f"api_keys_file={config.api_keys_file}", ConfigError):
                text = storage.read_bytes(config.api_keys_file).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problem = f"api_keys_file={config.api_keys_file} is not UTF-8 at byte {error.start}"
            raise ConfigError(f"{problem}; the same text as UTF-8 would work.") from None
        lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
        keys += filter(None, lines)
        if not keys:
            file = f"api_keys_file={config.api_keys_file}"
            raise ConfigError(f"{file} has no keys; one a line would work.")
    if not config.local and not keys and not config.allow_anyone:
        right = f"api_keys_file=FILE, keys in {KEYS_VARIABLE}, or allow_anyone=true would work"
        problem = f"host={config.host} lets other machines in, and there are no keys"
        raise ConfigError(f"{problem}; {right}.")
    return keys
