"""`grok chat`."""

import click

from grok.cli.completion import overrides_argument
from grok.cli.options import PATH
from grok.cli.sampling import SamplingCommand, chat_turns, converse, start_engine


@click.command(cls=SamplingCommand, without=("n", "stop"))
@click.argument("checkpoint", type=PATH)
@overrides_argument("train")
@click.option("--system", default="", metavar="TEXT", help="System message before the first.")
@click.option(
    "--chat-template",
    default="",
    metavar="NAME",
    help="grok-1, grok-2, or a file.  [default: the one beside the tokenizer]",
)
def chat(checkpoint, overrides, system, chat_template, **sampling) -> None:
    """Chat with the weights at CHECKPOINT: the folder of a run or weights in any other format, with
    their tokenizer and chat template.

    /help lists the commands in a conversation. Ctrl-C ends an answer, Ctrl-D the conversation. One
    device is used unless KEY=VALUE says otherwise, as in mesh.tensor=4."""
    from grok.config.sampling import SamplingParams

    params = SamplingParams(**sampling)
    engine, tokenizer = start_engine(checkpoint, overrides)
    turns, params = chat_turns(tokenizer, chat_template, params, system=system)
    click.echo("/help lists the commands.", err=True)
    converse(engine, turns, params)
