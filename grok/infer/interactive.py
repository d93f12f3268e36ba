"""Text in, text out as it is generated: several prompts at once, or a conversation."""

import itertools
import signal
from collections.abc import Callable, Sequence

from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer, encode_prompt
from grok.errors import RequestError
from grok.infer.engine import Engine
from grok.infer.request import Request

Ask = Callable[[], str | None]
Echo = Callable[..., None]

_numbers = itertools.count()


def stream(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams, echo: Echo
) -> list[str]:
    """Writes each prompt and its completions through `echo(text, nl=...)`; returns the latter. All
    prompts run at once. The first completion is written as its tokens come, each other one as soon
    as those before it are written."""
    requests = [_request(tokenizer, prompt, params) for prompt in prompts]
    index = {request.id: i * params.n for i, request in enumerate(requests)}
    texts = [prompt for prompt in prompts for _ in range(params.n)]
    finished, written, current = set(), 0, 0
    for output in engine.generate(requests):
        completion = index[output.request_id] + output.choice
        texts[completion] += output.text
        if output.finish_reason is not None:
            finished.add(completion)
        while current < len(texts):
            echo(texts[current][written:], nl=False)
            written = len(texts[current])
            if current not in finished:
                break
            echo("\n")
            current, written = current + 1, 0
    return [text[len(prompts[i // params.n]) :] for i, text in enumerate(texts)]


def chat_loop(
    engine: Engine, tokenizer: Tokenizer, params: SamplingParams, ask: Ask, echo: Echo
) -> None:
    """Continues each line that `ask` returns, conditioned on the whole conversation, until None.
    Ctrl-C ends an answer early. Pages of earlier turns are not computed again; once the context
    window is full, the conversation is forgotten."""
    interrupts: list[int] = []  # read between two steps: an exception in one would lose the cache

    def write_answer(prompt: str) -> str:
        interrupts.clear()
        before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
        answer = ""
        try:
            outputs = engine.generate([_request(tokenizer, prompt, params)])
            for output in itertools.takewhile(lambda _: not interrupts, outputs):
                echo(output.text, nl=False)
                answer += output.text
            outputs.close()
        finally:
            signal.signal(signal.SIGINT, before)
        echo("")
        return answer

    text, line = "", ask()
    while line is not None:
        try:
            answer = write_answer(text + line)
        except RequestError as error:
            if text:
                echo("What came before leaves no room for more, and is forgotten.")
                text = ""
                continue
            echo(str(error))
        else:
            text += f"{line}{answer}\n"
        line = ask()


def _request(tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Request:
    ids = encode_prompt(tokenizer, prompt)
    return Request(f"interactive-{next(_numbers)}", tuple(ids), params)
