"""Prompts in text, answers as they come."""

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
    """Writes each prompt and its continuation through `echo(text, nl=...)`; returns the latter.

    All prompts run at once. The first is written piece by piece as its tokens come, each other one
    as soon as those before it are written.
    """
    names = [f"stream-{next(_numbers)}" for _ in prompts]
    requests = [
        Request(name, tuple(tokenizer.encode(prompt)), params)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    turns = [(place, choice) for place in range(len(prompts)) for choice in range(params.n)]
    pieces: dict[tuple[int, int], list[str]] = {turn: [] for turn in turns}
    ended, shown, current = set(), 0, 0
    for output in engine.generate(requests):
        turn = names.index(output.request_id), output.choice
        pieces[turn].append(output.text)
        if output.finish_reason is not None:
            ended.add(turn)
        while current < len(turns):
            if shown == 0:
                echo(prompts[turns[current][0]], nl=False)
                pieces[turns[current]].insert(0, "")
                shown = 1
            echo("".join(pieces[turns[current]][shown:]), nl=False)
            shown = len(pieces[turns[current]])
            if turns[current] not in ended:
                break
            echo("\n")
            current, shown = current + 1, 0
    return ["".join(pieces[turn]) for turn in turns]


def chat_loop(
    engine: Engine,
    tokenizer: Tokenizer,
    params: SamplingParams,
    ask: Callable[[], str | None],
    echo: Callable[..., None],
) -> None:
    """Continues what is typed, with all of what was typed and written before in front of it,
    until `ask` gives None; Ctrl-C ends an answer where it is. Pages of prompts that came before
    are not computed again; where they leave no room, what came before is forgotten."""
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
    """Writes the continuation of a prompt as it comes; all of it, or what came before Ctrl-C."""
    request = Request(f"stream-{next(_numbers)}", tuple(tokenizer.encode(prompt)), params)
    pieces = []
    with _interrupt() as interrupted:
        outputs = engine.generate([request])
        for output in itertools.takewhile(lambda _: not interrupted, outputs):
            echo(output.text, nl=False)
            pieces.append(output.text)
        outputs.close()
    echo("")
    return "".join(pieces)


@contextlib.contextmanager
def _interrupt() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something in, between two steps: thrown inside one, it would leave
    the engine without its cache."""
    found: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
