"""`grok serve`."""

import importlib.util
import sys

import click

from grok.cli.completion import complete_config, overrides_argument
from grok.cli.options import PATH
from grok.errors import ConfigError, how_to_install

NEEDED = ("starlette", "uvicorn", "prometheus_client")


@click.command()
@click.argument("run_or_config", type=PATH, shell_complete=complete_config("serve"))
@overrides_argument("serve")
def serve(run_or_config: str, overrides: tuple[str, ...]) -> None:
    """Answer over HTTP, in the words of OpenAI's completions interface.

    RUN_OR_CONFIG is the folder of a run or of other weights, a YAML file that names them, or a
    preset of configs/serve, to which weights=WEIGHTS and tokenizer=FILE are added. Only this
    machine is answered unless host says otherwise; keys are read from GROK_API_KEYS or
    api_keys_file. http://127.0.0.1:8000 is a page to try it. Ctrl-C lets running requests finish
    (exit code 75). On several hosts, start the same command on each: the first one answers."""
    from grok import compile_cache, distributed
    from grok.config.serve import load_serve_config
    from grok.hardware import configure_devices

    with distributed.exit_together():
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            problem = f"`grok serve` needs {', '.join(missing)}, not installed here"
            raise ConfigError(f"{problem}; {how_to_install('serve')}.")
        config = load_serve_config(run_or_config, overrides)
        # JAX's heartbeat comes after the channel's, whose exit code says to start again.
        distributed.initialize(config, 60 + 3 * config.heartbeat_timeout_seconds)
        configure_devices(config.mesh.simulated_devices // distributed.process_count())
        compile_cache.share(config.compile_cache)

        from grok.serve.server import run

        code = run(config)
    sys.exit(code)
