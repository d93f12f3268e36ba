"""`grok sample`."""

from typing import Any

import click

from grok.cli.completion import overrides_argument
from grok.cli.options import PATH
from grok.cli.sampling import SamplingCommand, chat_turns, converse, note, start_engine
from grok.errors import ConfigError


@click.command(cls=SamplingCommand)
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

    engine, tokenizer = start_engine(checkpoint, overrides)
    from grok.infer.interactive import TextTurns, stream

    turns: Any = TextTurns(tokenizer, allow_special)
    if chat:
        turns, params = chat_turns(tokenizer, chat_template, params, allow_special)
    if not prompts:
        converse(engine, turns, params)
        return
    note("compiling")
    # Styles are dropped where the output is no terminal.
    stream(engine, turns, prompts, params, click.echo, lambda text: click.style(text, bold=True))
