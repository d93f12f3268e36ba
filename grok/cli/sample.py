"""`grok sample`."""

import contextlib
import io
import sys
from pathlib import Path

import click

from grok.errors import ConfigError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; may be given several times. None: texts are asked for, one after the "
    "other, each continued with all before it.",
)
@click.option(
    "--max-tokens",
    default=128,
    show_default=True,
    type=click.IntRange(1),
    help="New tokens at most.",
)
@click.option(
    "--temperature",
    default=0.7,
    show_default=True,
    type=click.FloatRange(0),
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    default=0.95,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of probability that the nucleus keeps.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Likeliest tokens; 0: all.",
)
@click.option(
    "--min-p",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Least probability, relative to the likeliest token's.",
)
@click.option(
    "--repetition-penalty", default=1.0, show_default=True, help="Above 1: fewer repetitions."
)
@click.option("--stop", multiple=True, help="Text that ends an answer; may be given several times.")
@click.option("--n", default=1, show_default=True, type=click.IntRange(1), help="Answers a prompt.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draws.")
def sample(checkpoint, overrides, prompts, **chosen) -> None:
    """Continue text with the newest checkpoint in CHECKPOINT, the folder of a run.

    One device is used unless KEY=VALUE says otherwise, as in mesh.tensor=4.
    """
    from grok.infer.request import SamplingParams

    params = SamplingParams(**chosen)
    if params.n > 1 and not prompts:
        raise ConfigError(f"--n {params.n} needs --prompt: what is typed has one answer.")

    _note("loading JAX")
    from grok.config.load import load_config
    from grok.infer.load import ONE_DEVICE, config_file

    alone = (*ONE_DEVICE, "mesh.simulated_devices=0")
    config = load_config(config_file(checkpoint), (*alone, *overrides))

    from grok.hardware import configure_devices

    configure_devices(config.mesh.simulated_devices)

    from grok.infer.engine import Engine
    from grok.infer.interactive import chat_loop, stream
    from grok.infer.load import load_run, make_run_mesh

    mesh = make_run_mesh(config)
    _note(f"reading the weights at {checkpoint}, {config.model.param_dtype}")
    model, tokenizer = load_run(checkpoint, config, mesh)
    engine = Engine(model, tokenizer, mesh, config.engine)
    _note("compiling")
    if prompts:
        stream(engine, tokenizer, prompts, params, click.echo)
    else:
        engine.warm_up()
        with contextlib.suppress(ImportError):
            # Arrow keys move within what is typed, and a line may be of any length.
            import readline  # noqa: F401
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A stray byte does not end the conversation.
            sys.stdin.reconfigure(errors="replace")
        chat_loop(engine, tokenizer, params, _ask, click.echo)


def _note(text: str) -> None:
    """Says what takes time, where someone watches."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _ask() -> str | None:
    """A line from the user; None at the end of input."""
    try:
        return click.prompt("", prompt_suffix="> ")
    except click.Abort:
        click.echo("")
        return None
