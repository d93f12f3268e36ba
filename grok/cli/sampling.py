"""Options of sampling, the engine and the lines typed, for `grok sample` and `grok chat`."""

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any

import click

from grok.cli.startup import without_gc
from grok.errors import ConfigError

if TYPE_CHECKING:
    from grok.config.sampling import SamplingParams
    from grok.data.tokenizers import Tokenizer
    from grok.infer.engine import Engine
    from grok.infer.interactive import ChatTurns

# A conversation reads better a little below the model's own distribution.
DEFAULTS = {"temperature": 0.7, "top_p": 0.95}


class SamplingCommand(click.Command):
    """A command whose options besides its own are the fields of SamplingConfig, `n` and `seed`, but
    for those named in `without`."""

    def __init__(self, *args: Any, without: tuple[str, ...] = (), **options: Any):
        super().__init__(*args, **options)
        self._without = without

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Arguments and options, those for sampling made when they are asked for."""
        from grok.config.sampling import SamplingConfig, SamplingParams
        from grok.config.schema import schema

        options: list[click.Parameter] = []
        settings = schema(SamplingParams)
        for name in [*schema(SamplingConfig), "n", "seed"]:
            if name in self._without:
                continue
            setting = settings[name]
            repeated = isinstance(setting.default, tuple)
            option = click.Option(
                [f"--{name.replace('_', '-')}"],
                type=str if repeated else setting.type,
                multiple=repeated,
                default=None if repeated else DEFAULTS.get(name, setting.default),
                show_default=not repeated,
                help=f"{setting.meaning.capitalize()}.",
            )
            options.append(option)
        return [*self.params, *options, *super().get_params(ctx)[len(self.params) :]]


@without_gc()
def start_engine(checkpoint: str, overrides: tuple[str, ...]) -> tuple["Engine", "Tokenizer"]:
    """The engine of the weights at `checkpoint`, on one device unless overrides say otherwise, and
    their tokenizer."""
    note("loading JAX")
    from grok.infer.loader import config_of, find_tokenizer, make_mesh

    # The type of products of a run is for its training.
    config = config_of(checkpoint, None, ("model.matmul_dtype=compute", *overrides))
    tokenizer_file = find_tokenizer(checkpoint, None, config)

    from grok.hardware import configure_devices

    configure_devices(config.mesh.simulated_devices)

    from grok.data.tokenizers import load_tokenizer
    from grok.infer.engine import Engine
    from grok.infer.programs import ProgramStore
    from grok.progress import byte_progress
    from grok.weights.load import load

    tokenizer = load_tokenizer(tokenizer_file)
    mesh = make_mesh(config.mesh, config.model)
    dtype = config.model.param_dtype
    note(f"reading the weights at {checkpoint}, {dtype}")
    with byte_progress() as on_progress:
        model = load(checkpoint, config.model, mesh, dtype, on_progress)
    return Engine(model, tokenizer, mesh, config.engine, ProgramStore.of_user()), tokenizer


def chat_turns(
    tokenizer: "Tokenizer",
    template: str,
    params: "SamplingParams",
    allow_special: bool = False,
    system: str = "",
) -> tuple["ChatTurns", "SamplingParams"]:
    """A conversation by a chat template, and `params` with what ends an answer in it."""
    from grok.infer.interactive import ChatTurns
    from grok.infer.loader import find_chat
    from grok.infer.request import with_answer_ends

    encoder = find_chat(template, tokenizer, allow_special)
    if encoder is None:
        problem = "a chat needs a template, and there is none beside the tokenizer"
        raise ConfigError(f"{problem}; --chat-template grok-1, or a file, would work.")
    for notice in encoder.notices:
        click.echo(notice, err=True)
    return ChatTurns(encoder, system), with_answer_ends(params, encoder.answers)


def converse(engine: "Engine", turns: Any, params: "SamplingParams") -> None:
    """Answers each line that is typed, until the end of the input."""
    from grok.infer.interactive import ChatTurns, chat_loop, with_commands

    note("compiling")
    engine.warm_up()
    with contextlib.suppress(ImportError):
        # Arrow keys move within what is typed and bring back earlier lines.
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A stray byte does not end the conversation.
        sys.stdin.reconfigure(errors="replace")
    ask = with_commands(_ask, turns, click.echo) if isinstance(turns, ChatTurns) else _ask
    chat_loop(engine, turns, params, ask, click.echo, _tell_speed)


def note(text: str) -> None:
    """Tells somebody at a terminal what takes its time."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _tell_speed(tokens: int, seconds: float) -> None:
    if sys.stderr.isatty():
        click.secho(
            f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} a second", dim=True, err=True
        )


def _ask() -> str | None:
    try:
        return click.prompt("", prompt_suffix="> ")
    except click.Abort:
        click.echo("")
        return None
