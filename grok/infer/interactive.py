"""Text in, text out as it is generated: several prompts at once, or a conversation."""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence

from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.errors import RequestError
from grok.infer.engine import Engine
from grok.infer.request import Request

_numbers = itertools.count()


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams,
    echo: Callable[..., None],
) -> list[str]:
    """Writes each prompt and its completions through `echo(text, nl=...)`; returns the latter.

    All prompts run at once. The first completion is written as its tokens come, each other one as
    soon as those before it are written.
    """
    requests = [_request(tokenizer, prompt, params) for prompt in prompts]
    index = {request.id: i for i, request in enumerate(requests)}
    keys = [(i, choice) for i in range(len(prompts)) for choice in range(params.n)]
    texts = {key: prompts[key[0]] for key in keys}
    finished, written, current = set(), 0, 0
    for output in engine.generate(requests):
        key = index[output.request_id], output.choice
        texts[key] += output.text
        if output.finish_reason is not None:
            finished.add(key)
        while current < len(keys):
            text = texts[keys[current]]
            echo(text[written:], nl=False)
            written = len(text)
            if keys[current] not in finished:
                break
            echo("\n")
            current, written = current + 1, 0
    return [texts[key][len(prompts[key[0]]) :] for key in keys]


def chat_loop(
    engine: Engine,
    tokenizer: Tokenizer,
    params: SamplingParams,
    ask: Callable[[], str | None],
    echo: Callable[..., None],
) -> None:
    """Continues each line that `ask` returns, conditioned on the whole conversation, until None.

    Ctrl-C ends an answer early. Pages of earlier turns are not computed again; once the context
    window is full, the conversation is forgotten.
    """
    text, line = "", ask()
    while line is not None:
        try:
            answer = _answer(engine, tokenizer, text + line, params, echo)
        except RequestError as error:
            if text:
                echo("What came before leaves no room for more, and is forgotten.")
                text = ""
                continue
            echo(str(error))
        else:
            text += f"{line}{answer}\n"
        line = ask()


def _answer(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    echo: Callable[..., None],
) -> str:
    """Writes the completion of a prompt as it comes; returns all of it, or the text up to
    Ctrl-C."""
    pieces = []
    with _catch_interrupt() as interrupts:
        outputs = engine.generate([_request(tokenizer, prompt, params)])
        for output in itertools.takewhile(lambda _: not interrupts, outputs):
            echo(output.text, nl=False)
            pieces.append(output.text)
        outputs.close()
    echo("")
    return "".join(pieces)


def _request(tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Request:
    return Request(f"interactive-{next(_numbers)}", tuple(tokenizer.encode(prompt)), params)


@contextlib.contextmanager
def _catch_interrupt() -> Iterator[list[int]]:
    """Gives a list that Ctrl-C adds to, to be read between two steps: an exception inside a step
    would leave the engine without its cache."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
