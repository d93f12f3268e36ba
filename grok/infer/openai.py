"""The words of OpenAI's completions interface: bodies to requests, outputs to bodies.

`grok batch` and `grok serve` both speak them.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grok.data.tokenizer import Tokenizer
from grok.errors import DataError
from grok.infer.chat import Render
from grok.infer.config import SamplingConfig
from grok.infer.request import Output, Request, RequestError, SamplingParams, TokenLogprobs

# Of the engine's parameters a body may name all but this one, which `echo` stands for.
PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)} - {"prompt_logprobs"}
# What both kinds of body may have beside; `user` and `metadata` are the caller's own notes.
OTHERS = {"model", "stream", "stream_options", "user", "metadata"}
COMPLETION = PARAMETERS | OTHERS | {"prompt", "echo"}
CHAT = (PARAMETERS - {"best_of"}) | OTHERS | {"messages", "max_completion_tokens", "top_logprobs"}


@dataclasses.dataclass(frozen=True)
class Call:
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


class BodyReader:
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

    def completion(self, body: Mapping[str, Any]) -> Call:
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

    def chat(self, body: Mapping[str, Any]) -> Call:
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
    ) -> Call:
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
        return Call(
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


@dataclasses.dataclass
class Answer:
    """One answer as far as it is there: what Outputs said of it, joined."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


class Answers:
    """The answers to a call, put together from Outputs."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        self.call, self._tokenizer = call, tokenizer
        count = len(call.prompts) * call.params.n
        self._answers = [Answer() for _ in range(count)]
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._offsets = [0] * count

    def add(self, output: Output) -> dict[str, Any]:
        """Takes an output of one of the call's requests; its part of a stream, one choice."""
        prompt = int(output.request_id.rpartition("/")[2])
        index = prompt * self.call.params.n + output.choice
        answer = self._answers[index]
        first = not (answer.tokens or answer.text)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = output.prompt_logprobs
        answer.finish_reason = output.finish_reason or answer.finish_reason
        new = Answer(finish_reason=output.finish_reason)
        if not self.call.scores_only:
            new.text, new.tokens = output.text, list(output.token_ids)
            new.logprobs = list(output.logprobs or ())
        answer.text += new.text
        answer.tokens += new.tokens
        answer.logprobs += new.logprobs
        return self._choice(index, new, first and self.call.echo)

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(answer.finish_reason for answer in self._answers)

    @property
    def tokens(self) -> int:
        """New tokens so far."""
        return sum(len(answer.tokens) for answer in self._answers)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each answer ended."""
        return [answer.finish_reason for answer in self._answers]

    def usage(self) -> dict[str, int]:
        """Counts of tokens, as a body has them."""
        read = sum(map(len, self.call.prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
        }

    def choices(self) -> list[dict[str, Any]]:
        """The answers as a body that is not streamed has them."""
        self._offsets = [0] * len(self._answers)
        return [
            self._choice(index, answer, self.call.echo, whole=True)
            for index, answer in enumerate(self._answers)
        ]

    def _choice(
        self, index: int, part: Answer, with_prompt: bool, whole: bool = False
    ) -> dict[str, Any]:
        common = {"index": index, "finish_reason": part.finish_reason}
        if self.call.chat:
            logprobs = None
            if self.call.params.logprobs is not None:
                logprobs = {"content": [self._chat_token(each) for each in part.logprobs]}
            message = {"role": "assistant", "content": part.text}
            return {**common, ("message" if whole else "delta"): message, "logprobs": logprobs}
        prompt = index // self.call.params.n
        text, tokens = part.text, list[tuple[int, TokenLogprobs | None]]()
        if with_prompt:
            text = self.call.texts[prompt] + text
            known = self._prompt_logprobs.get(prompt, [None] * len(self.call.prompts[prompt]))
            tokens += zip(self.call.prompts[prompt], known, strict=True)
        tokens += zip(part.tokens, part.logprobs, strict=False)
        logprobs = None
        if self.call.params.logprobs is not None:
            logprobs = self._completion_logprobs(index, tokens)
        return {**common, "text": text, "logprobs": logprobs}

    def _completion_logprobs(
        self, index: int, tokens: Iterable[tuple[int, TokenLogprobs | None]]
    ) -> dict[str, Any]:
        ids, known = [], []
        for token, logprobs in tokens:
            ids.append(token)
            known.append(logprobs)
        texts = [self._token_text(token) for token in ids]
        lengths = [len(self._tokenizer.piece_bytes(token).decode(errors="ignore")) for token in ids]
        *offsets, self._offsets[index] = itertools.accumulate(lengths, initial=self._offsets[index])
        return {
            "tokens": texts,
            "token_logprobs": [each and each.logprob for each in known],
            "top_logprobs": [
                each and {self._token_text(token): value for token, value in each.top}
                for each in known
            ],
            "text_offset": offsets,
        }

    def _chat_token(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        def one(token: int, value: float) -> dict[str, Any]:
            data = self._tokenizer.piece_bytes(token)
            return {"token": self._token_text(token), "logprob": value, "bytes": list(data)}

        top = [one(token, value) for token, value in logprobs.top]
        return {**one(logprobs.token, logprobs.logprob), "top_logprobs": top}

    def _token_text(self, token: int) -> str:
        """A token's text; of a part of a character, `bytes:` and they."""
        data = self._tokenizer.piece_bytes(token)
        try:
            return data.decode() or self._tokenizer.piece(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def error_body(parameter: str | None, message: str, kind: str, code: str | None = None) -> dict:
    """An error as a body: `kind` is OpenAI's type of it, such as invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    for name in body:
        if name not in known:
            raise RequestError(
                name,
                f"there is no parameter {name!r:.60} here; there are {', '.join(sorted(known))}.",
            )


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
