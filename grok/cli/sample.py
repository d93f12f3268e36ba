"""`grok sample`."""

import contextlib
import io
import sys

import click

from grok.cli.completion import overrides_argument
from grok.cli.options import PATH
from grok.errors import ConfigError

# A conversation reads better a little below the model's own distribution.
DEFAULTS = {"temperature": 0.7, "top_p": 0.95}


class _SampleCommand(click.Command):
    """A command whose options besides its own are the fields of SamplingConfig, `n` and `seed`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Arguments and options, those for sampling made when they are asked for."""
        from grok.config.sampling import SamplingConfig, SamplingParams
        from grok.config.schema import schema

        options: list[click.Parameter] = []
        settings = schema(SamplingParams)
        for name in [*schema(SamplingConfig), "n", "seed"]:
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


@click.command(cls=_SampleCommand)
@click.argument("checkpoint", type=PATH)
@overrides_argument("train")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; may be given several times. Without it, the command is interactive: "
    "each turn continues the whole conversation.",
)
@click.option("--chat", is_flag=True, help="Answer messages, as the chat template writes them.")
@click.option(
    "--chat-template",
    default="",
    metavar="NAME",
    help="With --chat: grok-1, grok-2, or a file.  [default: the one beside the tokenizer]",
)
@click.option(
    "--allow-special-tokens", "allow_special", is_flag=True, help="Read them in prompts as such."
)
def sample(checkpoint, overrides, prompts, chat, chat_template, allow_special, **sampling) -> None:
    """Continue text with the weights at CHECKPOINT: the folder of a run (its newest checkpoint is
    read) or weights in any other format, with their tokenizer.

    One device is used unless KEY=VALUE says otherwise, as in mesh.tensor=4."""
    from grok.config.sampling import SamplingParams

    params = SamplingParams(**sampling)
    if params.n > 1 and not prompts:
        raise ConfigError(f"--n {params.n} needs --prompt: what is typed has one answer.")
    if chat_template and not chat:
        raise click.UsageError("--chat-template is of messages; it needs --chat.")

    _note("loading JAX")
    from grok.infer.loader import config_of, find_tokenizer, make_mesh

    config = config_of(checkpoint, None, overrides)
    tokenizer_file = find_tokenizer(checkpoint, None, config)

    from grok.hardware import configure_devices

    configure_devices(config.mesh.simulated_devices)

    from grok.data.tokenizers import load_tokenizer
    from grok.infer.engine import Engine
    from grok.infer.interactive import chat_loop, stream
    from grok.progress import byte_progress
    from grok.weights.load import load

    tokenizer = load_tokenizer(tokenizer_file)
    turns, params = _turns(tokenizer, chat, chat_template, params, allow_special)
    mesh = make_mesh(config.mesh, config.model)
    dtype = config.model.param_dtype
    _note(f"reading the weights at {checkpoint}, {dtype}")
    with byte_progress() as on_progress:
        model = load(checkpoint, config.model, mesh, dtype, on_progress)
    engine = Engine(model, tokenizer, mesh, config.engine)
    _note("compiling")
    if prompts:
        stream(engine, turns, prompts, params, click.echo)
    else:
        engine.warm_up()
        with contextlib.suppress(ImportError):
            # Arrow keys move within what is typed, and a line may be of any length.
            import readline  # noqa: F401
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A stray byte does not end the conversation.
            sys.stdin.reconfigure(errors="replace")
        chat_loop(engine, turns, params, _ask, click.echo)


def _turns(tokenizer, chat, chat_template, params, allow_special):
    """The kind of conversation, and the sampling parameters with what ends an answer in it."""
    from grok.infer.interactive import ChatTurns, TextTurns
    from grok.infer.loader import find_chat
    from grok.infer.request import with_answer_ends

    if not chat:
        return TextTurns(tokenizer, allow_special), params
    encoder = find_chat(chat_template, tokenizer, allow_special)
    if encoder is None:
        problem = "--chat needs a template, and there is none beside the tokenizer"
        raise ConfigError(f"{problem}; --chat-template grok-1, or a file, would work.")
    for notice in encoder.notices:
        click.echo(notice, err=True)
    return ChatTurns(encoder), with_answer_ends(params, encoder.answers)


def _note(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _ask() -> str | None:
    try:
        return click.prompt("", prompt_suffix="> ")
    except click.Abort:
        click.echo("")
        return None
