"""Bodies of OpenAI's completions interface, which `grok batch` and `grok serve` both read, to calls
of the engine."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from grok.config.sampling import SamplingConfig, SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.errors import DataError, RequestError
from grok.infer.chat_template import Render
from grok.infer.request import Request

# Of the engine's parameters a body may name all but this one, which `echo` stands for.
PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)} - {"prompt_logprobs"}
# What both kinds of body may have beside; `user` and `metadata` are the caller's own notes.
OTHERS = {"model", "stream", "stream_options", "user", "metadata"}
COMPLETION = PARAMETERS | OTHERS | {"prompt", "echo"}
CHAT = (PARAMETERS - {"best_of"}) | OTHERS | {"messages", "max_completion_tokens", "top_logprobs"}


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """What a body asks for: its prompts, each a request with the same parameters.

    `scores_only`: of a body with max_tokens 0, which the engine knows as 1; that token is left out.
    """

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    params: SamplingParams
    chat: bool
    model: str
    seeded: bool
    echo: bool = False
    scores_only: bool = False
    stream: bool = False
    include_usage: bool = False

    def requests(self, key: str, seed: int) -> list[Request]:
        """One for each prompt, with ids `key/0` and on; `seed` where the body gives none."""
        params = self.params if self.seeded else dataclasses.replace(self.params, seed=seed)
        return [
            Request(f"{key}/{number}", prompt, params) for number, prompt in enumerate(self.prompts)
        ]


class RequestParser:
    """Reads bodies, whatever was sent: all that is wrong with one is a RequestError."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        context_length: int,
        render: Render | None = None,
        most_choices: int = 128,
    ):
        """`most_choices` is how many answers a body may ask for, over all its prompts."""
        self._tokenizer, self._sampling, self._render = tokenizer, sampling, render
        self._context_length, self._most_choices = context_length, most_choices

    def completion(self, body: Mapping[str, Any]) -> CompletionRequest:
        """What a body of /v1/completions asks for."""
        _refuse_unknown(body, COMPLETION)
        given = {name: value for name, value in body.items() if value is not None}
        prompts, texts = self._prompts(given.get("prompt"))
        params = {name: given[name] for name in PARAMETERS & given.keys()}
        echo = _flag(given, "echo")
        if echo:
            params["prompt_logprobs"] = params.get("logprobs")
        scores_only = params.get("max_tokens") == 0 and echo
        if scores_only:
            params["max_tokens"] = 1
        return self._call(given, params, prompts, texts, echo=echo, scores_only=scores_only)

    def chat(self, body: Mapping[str, Any]) -> CompletionRequest:
        """What a body of /v1/chat/completions asks for."""
        _refuse_unknown(body, CHAT)
        if self._render is None:
            raise RequestError(
                "messages",
                "chat needs a template that makes a prompt of messages, and chat_template in the "
                "config is empty; `prompt` in place of `messages` would work.",
            )
        given = {name: value for name, value in body.items() if value is not None}
        text = self._render(_messages(given.get("messages")))
        params = {name: given[name] for name in PARAMETERS & given.keys()}
        if "max_completion_tokens" in given:
            params["max_tokens"] = given["max_completion_tokens"]
        wanted = _flag(params, "logprobs")
        params["logprobs"] = given.get("top_logprobs", 0) if wanted else None
        if "top_logprobs" in given and not wanted:
            raise RequestError("top_logprobs", "top_logprobs goes with logprobs=true alone.")
        return self._call(given, params, (self._encode(text),), (text,), chat=True)

    def _call(
        self,
        given: Mapping[str, Any],
        params: dict[str, Any],
        prompts: tuple[tuple[int, ...], ...],
        texts: tuple[str, ...],
        chat: bool = False,
        **how: bool,
    ) -> CompletionRequest:
        if isinstance(params.get("stop"), str):
            params["stop"] = (params["stop"],)
        if "max_tokens" not in params:
            # A default should not make a prompt too long that alone is not.
            room = self._context_length - max(map(len, prompts))
            params["max_tokens"] = max(1, min(self._sampling.max_tokens, room))
        checked = self._sampling.params(**params)
        choices = len(prompts) * max(checked.n, checked.best_of or 1)
        if choices > self._most_choices:
            raise RequestError(
                "n",
                f"{choices} answers are asked for at once; {self._most_choices} would work.",
            )
        stream = _flag(given, "stream")
        if stream and checked.best_of is not None and checked.best_of > checked.n:
            raise RequestError("stream", "the best of several answers cannot be streamed.")
        options = given.get("stream_options", {})
        if not isinstance(options, dict) or options.keys() - {"include_usage"}:
            raise RequestError("stream_options", "stream_options may have include_usage alone.")
        model = given.get("model", "")
        if not isinstance(model, str):
            raise RequestError("model", "model should be text.")
        usage = _flag(options, "include_usage")
        seeded = "seed" in params
        return CompletionRequest(
            prompts, texts, checked, chat, model, seeded, stream=stream, include_usage=usage, **how
        )

    def _prompts(self, given: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """Tokens and text of the prompts: one as a text or as tokens, or a list of either."""
        if isinstance(given, str) or (_is_list(given) and all(type(each) is int for each in given)):
            given = [given]
        if not _is_list(given) or not all(
            isinstance(each, str) or (_is_list(each) and all(type(i) is int for i in each))
            for each in given
        ):
            raise RequestError(
                "prompt", "prompt should be a text, a list of tokens, or a list of these."
            )
        prompts = tuple(
            self._encode(each) if isinstance(each, str) else self._checked(each) for each in given
        )
        texts = tuple(
            each if isinstance(each, str) else self._tokenizer.decode(each) for each in given
        )
        return prompts, texts

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            ids = tuple(self._tokenizer.encode(text))
        except DataError as error:
            raise RequestError("prompt", str(error)) from None
        return self._checked(ids)

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        if not ids:
            raise RequestError(
                "prompt", "the prompt is empty; one token at least is needed to continue from."
            )
        if not 0 <= min(ids) <= max(ids) < self._tokenizer.vocab_size:
            raise RequestError(
                "prompt",
                f"the prompt has a token that is not from 0 to {self._tokenizer.vocab_size - 1}.",
            )
        return tuple(ids)


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        # Clients send null for what they leave open.
        if name not in known and value is not None:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
            right = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}."
            raise RequestError(name, f"there is no parameter {name!r:.60} here; {right}")


def _messages(given: Any) -> list[dict[str, Any]]:
    if not (_is_list(given) and given and all(isinstance(each, dict) for each in given)):
        raise RequestError(
            "messages", "messages should be a list of objects with role and content, one at least."
        )
    return [{**each, "content": _content(each.get("content"))} for each in given]


def _content(given: Any) -> str:
    """A message's text, also where it comes in parts."""
    if isinstance(given, str):
        return given
    texts = []
    for part in given if _is_list(given) else [None]:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise RequestError("messages", "the content of a message should be text.")
        texts.append(text)
    return "".join(texts)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(name, f"{name} should be true or false.")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
