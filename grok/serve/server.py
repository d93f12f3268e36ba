"""From a config to a server that answers."""

import os
import signal
import socket
from pathlib import Path
from types import FrameType

import click
import uvicorn

from grok import storage
from grok.config.serve import ServeConfig
from grok.errors import ConfigError, GrokError
from grok.infer.loader import ServedModel
from grok.serve.app import App
from grok.serve.engine_thread import EngineThread

KEYS = "GROK_API_KEYS"
# A request that is under way when the server is asked to stop has so long.
STOP_SECONDS = 30


def run(config: ServeConfig) -> None:
    """Serves until it is asked to stop. Raises ConfigError, DataError and CheckpointError for what
    cannot work, and GrokError where the engine breaks down."""
    keys, place = read_keys(config), bind(config)
    model = ServedModel(config)
    name = config.name or Path(config.weights.rstrip("/")).name
    engine = model.engine(lambda text: click.echo(text, err=True))
    engine.warm_up()
    broken: list[BaseException] = []

    def stop(error: BaseException) -> None:
        broken.append(error)
        server.should_exit = True

    engine_thread = EngineThread(engine, stop)
    reader = model.parser(config.max_choices)
    app = App(config, name, engine_thread, reader, model.tokenizer, keys)
    server = make_server(app)
    host = f"[{config.host}]" if ":" in config.host else config.host
    click.echo(f"{name} answers at http://{host}:{place.getsockname()[1]}", err=True)
    server.run(sockets=[place])
    if broken:
        raise GrokError(f"the engine broke down: {broken[0]}") from broken[0]


def bind(config: ServeConfig) -> socket.socket:
    """The address, taken before anything slow; who connects waits until the server runs. Raises
    ConfigError where it cannot be had."""
    place = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((config.host, config.port))
        # Two that only bind it could both have it.
        place.listen()
    except OSError as error:
        place.close()
        raise ConfigError(
            f"host={config.host} port={config.port} cannot be listened on: "
            f"{storage.reason(error)}; port=0 takes any port that is free."
        ) from None
    return place


class _Server(uvicorn.Server):
    """Asked to stop once it answers what is under way, and says so; twice, the process ends."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGINT or SIGTERM."""
        super().handle_exit(sig, frame)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(
            2,
            b"\nstopping when requests under way are answered, in %d s at most; once more stops "
            b"at once\n" % STOP_SECONDS,
        )


def make_server(app: App) -> uvicorn.Server:
    """The HTTP server of an application, to be run on a bound socket."""
    return _Server(
        uvicorn.Config(
            app.asgi,
            log_level="warning",
            timeout_graceful_shutdown=STOP_SECONDS,
            server_header=False,
        )
    )


def read_keys(config: ServeConfig) -> list[str]:
    """The keys of the file and of the environment. Raises ConfigError where the file cannot be
    read, or others could reach the server and there are none."""
    keys = os.environ.get(KEYS, "").split()
    if config.api_keys_file:
        try:
            text = storage.read_bytes(config.api_keys_file).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = storage.reason(error) if isinstance(error, OSError) else str(error)
            raise ConfigError(f"api_keys_file={config.api_keys_file}: {reason}.") from None
        found = [line.strip() for line in text.splitlines() if not line.startswith("#")]
        keys += [key for key in found if key]
        if not keys:
            raise ConfigError(
                f"api_keys_file={config.api_keys_file} has no keys; one a line would work."
            )
    if not config.local and not keys and not config.allow_anyone:
        raise ConfigError(
            f"host={config.host} lets other machines in, and there are no keys; "
            f"api_keys_file=FILE, keys in {KEYS}, or allow_anyone=true would work."
        )
    return keys
