"""Prompts in text, answers as they come."""

from collections.abc import Callable, Sequence

from grok.data.tokenizer import StreamDecoder, Tokenizer
from grok.infer.engine import Engine, SamplingOptions


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SamplingOptions,
    echo: Callable[..., None],
) -> None:
    """Writes each prompt and its continuation, piece by piece, through `echo(text, nl=...)`."""
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        decoder = StreamDecoder(tokenizer, after=ids)
        echo(prompt, nl=False)
        for (token,) in engine.generate([ids], options, tokenizer.eos_id):
            if token is not None:
                echo(decoder.push(token), nl=False)
        echo(decoder.flush() + "\n")
