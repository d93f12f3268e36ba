"""Starts a server from its config, and stops it."""

import os
import signal
import socket
from pathlib import Path
from types import FrameType

import click
import uvicorn

from grok import storage
from grok.config.infer import ServeConfig
from grok.errors import ConfigError, GrokError
from grok.infer.loader import ServedModel
from grok.serve.app import App
from grok.serve.engine_thread import EngineThread

KEYS_VARIABLE = "GROK_API_KEYS"
SHUTDOWN_SECONDS = 30  # for requests under way when the server is asked to stop


def run(config: ServeConfig) -> None:
    """Serves until it is asked to stop. Raises ConfigError, DataError and CheckpointError for what
    cannot work, and GrokError where the engine breaks down."""
    keys, listener = read_keys(config), bind(config)
    model = ServedModel(config)
    name = config.name or Path(config.weights.rstrip("/")).name
    engine = model.engine(lambda text: click.echo(text, err=True))
    engine.warm_up()
    broken: list[BaseException] = []

    def stop(error: BaseException) -> None:
        broken.append(error)
        server.should_exit = True

    engine_thread = EngineThread(engine, stop)
    server = make_server(App(config, name, engine_thread, model.parser(config.max_choices), keys))
    host = f"[{config.host}]" if ":" in config.host else config.host
    click.echo(f"{name} answers at http://{host}:{listener.getsockname()[1]}", err=True)
    server.run(sockets=[listener])
    if broken:
        raise GrokError(f"the engine broke down: {broken[0]}") from broken[0]


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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGINT or SIGTERM."""
        super().handle_exit(sig, frame)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # To the descriptor itself: the signal may have interrupted a print.
        seconds = b"in %d s at most; once more stops at once\n" % SHUTDOWN_SECONDS
        os.write(2, b"\nstopping when requests under way are answered, " + seconds)


def make_server(app: App) -> uvicorn.Server:
    """The HTTP server of an application, to be run on a bound socket."""
    settings = uvicorn.Config(app.asgi, log_level="warning", server_header=False)
    settings.timeout_graceful_shutdown = SHUTDOWN_SECONDS
    return _Server(settings)


def read_keys(config: ServeConfig) -> list[str]:
    """API keys from the file and the environment. Raises ConfigError where the file cannot be
    read, or where there are none and other machines could reach the server."""
    keys = os.environ.get(KEYS_VARIABLE, "").split()
    if config.api_keys_file:
        try:
            with storage.errors(f"api_keys_file={config.api_keys_file}", ConfigError):
                text = storage.read_bytes(config.api_keys_file).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"api_keys_file={config.api_keys_file}: {error}.") from None
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
