"""Text in, text out as it is generated: several prompts at once, or a conversation."""

import itertools
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from grok.config.sampling import SamplingParams
from grok.data.chat.encoder import ChatEncoder
from grok.data.tokenizers import Tokenizer, encode_prompt
from grok.errors import DataError, RequestError
from grok.infer.engine import Engine
from grok.infer.request import Request, prompt_seed

Ask = Callable[[], str | None]
Echo = Callable[..., None]

_numbers = itertools.count()


class Turns(Protocol):
    """The lines of a conversation. `separator` is shown between a line and its answer, which begins
    with `lead`, that is not shown."""

    separator: str
    lead: str

    def prompt(self, line: str) -> Sequence[int]:
        """The tokens of all before, and of `line`."""

    def add(self, line: str, answer: str) -> None:
        """Takes a line and its answer."""

    def forget(self) -> bool:
        """Begins anew; False where there was nothing to forget."""
        ...


class TextTurns:
    """`Turns` as one text that goes on, with special tokens read as such if `allow_special`."""

    separator = lead = ""

    def __init__(self, tokenizer: Tokenizer, allow_special: bool = False):
        self._tokenizer, self._allow_special, self._text = tokenizer, allow_special, ""

    def prompt(self, line: str) -> Sequence[int]:
        """The tokens of the text with `line` at its end."""
        text = self._text + line
        return encode_prompt(self._tokenizer, text, allow_special=self._allow_special)

    def add(self, line: str, answer: str) -> None:
        """Lengthens the text."""
        self._text += f"{line}{answer}\n"

    def forget(self) -> bool:
        """Begins anew; False where there was nothing to forget."""
        text, self._text = self._text, ""
        return bool(text)


CHAT_COMMANDS = """/help     lists these commands
/reset    begins a new conversation
/history  shows all messages
/exit     ends; so does Ctrl-D
//...     sends a line that begins with /"""


class ChatTurns:
    """`Turns` as messages that a chat template writes, after the message `system`, if any."""

    separator = "\n"

    def __init__(self, chat: ChatEncoder, system: str = ""):
        self._chat, self.lead = chat, chat.answers.lead
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages = [*self._system]

    def prompt(self, line: str) -> Sequence[int]:
        """The tokens of all messages, `line` being the last."""
        try:
            return self._chat.prompt([*self._messages, {"role": "user", "content": line}])[0]
        except DataError as error:
            message = f"the chat template cannot write this: {error}."
            raise RequestError("messages", message) from None

    def add(self, line: str, answer: str) -> None:
        """Takes a message and its answer."""
        answer = answer.removeprefix(self.lead)
        self._messages.append({"role": "user", "content": line})
        self._messages.append({"role": "assistant", "content": answer})

    def forget(self) -> bool:
        """Begins anew; False where there was nothing to forget."""
        messages, self._messages = self._messages, [*self._system]
        return len(messages) > len(self._system)

    @property
    def messages(self) -> Sequence[dict[str, str]]:
        """All messages so far, each with `role` and `content`."""
        return self._messages


def with_commands(ask: Ask, turns: ChatTurns, echo: Echo) -> Ask:
    """`ask`, but for lines that begin with /, which are commands and run here."""

    def ask_for_message() -> str | None:
        while (line := ask()) is not None:
            if not line.startswith("/"):
                return line
            if line.startswith("//"):
                return line[1:]
            match line.strip():
                case "/exit":
                    return None
                case "/help":
                    echo(CHAT_COMMANDS)
                case "/reset":
                    turns.forget()
                    echo("A new conversation begins.")
                case "/history":
                    for message in turns.messages:
                        echo(f"{message['role']}: {message['content']}")
                case unknown:
                    echo(f"There is no command {unknown}; /help lists those that are.")
        return None

    return ask_for_message


def stream(
    engine: Engine,
    turns: Turns,
    prompts: Sequence[str],
    params: SamplingParams,
    echo: Echo,
    mark: Callable[[str], str] = str,
) -> list[str]:
    """Writes each prompt, the beginning of a conversation, and its completions through
    `echo(text, nl=...)`; returns the latter. All prompts run at once. The first completion is
    written as its tokens come, each other one as soon as those before it are written. `mark` sets
    a prompt apart from its completion."""
    requests = [
        _request(turns.prompt(prompt), params.with_seed(prompt_seed(params.seed, i)))
        for i, prompt in enumerate(prompts)
    ]
    index = {request.id: i * params.n for i, request in enumerate(requests)}
    texts = [""] * (params.n * len(prompts))
    finished, written, current = set(), None, 0
    for output in engine.generate(requests):
        completion = index[output.request_id] + output.choice
        texts[completion] += output.text
        if output.finish_reason is not None:
            finished.add(completion)
        while current < len(texts):
            if written is None:
                echo(mark(prompts[current // params.n]) + turns.separator, nl=False)
            echo(texts[current][written or 0 :], nl=False)
            written = len(texts[current])
            if current not in finished:
                break
            echo("\n")
            current, written = current + 1, None
    return texts


def chat_loop(
    engine: Engine,
    turns: Turns,
    params: SamplingParams,
    ask: Ask,
    echo: Echo,
    on_answer: Callable[[int, float], object] = lambda tokens, seconds: None,
) -> None:
    """Continues each line that `ask` returns, conditioned on the whole conversation, until None.
    Ctrl-C ends an answer early. Pages of earlier turns are not computed again; once the context
    window is full, the conversation is forgotten. `on_answer` gets the tokens of each answer and
    the seconds that they took."""
    interrupts: list[int] = []  # read between two steps: an exception in one would lose the cache

    def write_answer(prompt: Sequence[int]) -> str:
        interrupts.clear()
        before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
        answer, tokens, began = "", 0, time.monotonic()
        try:
            outputs = engine.generate([_request(prompt, params)])
            for output in itertools.takewhile(lambda _: not interrupts, outputs):
                echo(output.text if answer else output.text.removeprefix(turns.lead), nl=False)
                answer += output.text
                tokens += len(output.token_ids)
            outputs.close()
        finally:
            signal.signal(signal.SIGINT, before)
        echo("")
        on_answer(tokens, time.monotonic() - began)
        return answer

    line = ask()
    while line is not None:
        try:
            answer = write_answer(turns.prompt(line))
        except RequestError as error:
            if turns.forget():
                echo("What came before leaves no room for more, and is forgotten.")
                continue
            echo(str(error))
        else:
            turns.add(line, answer)
        line = ask()


def _request(prompt: Sequence[int], params: SamplingParams) -> Request:
    return Request(f"interactive-{next(_numbers)}", tuple(prompt), params)
