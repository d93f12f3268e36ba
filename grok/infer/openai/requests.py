"""Bodies of OpenAI's completions interface, which `grok batch` and `grok serve` both parse, as
requests to the engine."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from grok.config.sampling import SamplingConfig, SamplingParams
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.renderer import TemplateError
from grok.data.tokenizers import StreamDecoder, Tokenizer, encode_prompt
from grok.errors import DataError, RequestError
from grok.infer.request import Request, prompt_seed, with_answer_ends

# A body may set any sampling parameter but this one, which `echo` stands for.
PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)} - {"prompt_logprobs"}
# Allowed in both kinds of body; `user` and `metadata` are the client's own notes.
COMMON = PARAMETERS | {"model", "stream", "stream_options", "user", "metadata"}
COMPLETION = COMMON | {"prompt", "echo"}
CHAT = (COMMON - {"best_of"}) | {"messages", "max_completion_tokens", "top_logprobs"}

Prompts = list[tuple[tuple[int, ...], str]]  # tokens and text of each


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A parsed body: its prompts, each to be a request with the same parameters."""

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    params: SamplingParams
    model: str
    seeded: bool
    chat: bool = False
    lead: str = ""  # blanks before an answer that are no part of it
    echo: bool = False
    stream: bool = False
    include_usage: bool = False

    def requests(self, key: str, seed: int) -> list[Request]:
        """One for each prompt, with ids `key/0` and on, each with a seed of its own: of the body's,
        or of `seed` where that has none."""
        seed = self.params.seed if self.seeded else seed
        return [
            Request(f"{key}/{i}", prompt, self.params.with_seed(prompt_seed(seed, i)))
            for i, prompt in enumerate(self.prompts)
        ]

    def head(self, key: str, created: int, model: str) -> dict[str, Any]:
        """The first fields of a response, or of each event of a stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{key}",
            "object": f"{kind}.chunk" if self.chat and self.stream else kind,
            "created": created,
            "model": model,
        }


@dataclasses.dataclass(frozen=True)
class RequestParser:
    """Parses bodies, whatever was sent: all that is wrong with one is a RequestError."""

    tokenizer: Tokenizer
    defaults: SamplingConfig
    context_length: int
    chat_encoder: ChatEncoder | None = None
    max_choices: int = 128  # that a body may ask for, over all its prompts
    allow_special: bool = False  # special tokens in a prompt's text are read as such

    def completion(self, body: Mapping[str, Any]) -> CompletionRequest:
        """Parses a body of /v1/completions."""
        fields, params = _known_fields(body, COMPLETION)
        prompts = self._prompts(fields.get("prompt"))
        if echo := _flag(fields, "echo"):
            # Scores are all that the engine has to do for an answer without tokens.
            least = 0 if params.get("max_tokens") == 0 else None
            params["prompt_logprobs"] = params.get("logprobs", least)
        return self._request(fields, params, prompts, echo=echo)

    def chat(self, body: Mapping[str, Any]) -> CompletionRequest:
        """Parses a body of /v1/chat/completions."""
        fields, params = _known_fields(body, CHAT)
        chat = self.chat_encoder
        if chat is None:
            problem = "chat needs a template, and there is none beside the tokenizer"
            right = "`prompt`, or chat_template in the config, would work"
            raise RequestError("messages", f"{problem}; {right}.")
        prompt = _chat_prompt(chat, _messages(fields.get("messages")))
        if "max_completion_tokens" in fields:
            params["max_tokens"] = fields["max_completion_tokens"]
        logprobs = _flag(params, "logprobs")
        params["logprobs"] = fields.get("top_logprobs", 0) if logprobs else None
        if "top_logprobs" in fields and not logprobs:
            raise RequestError("top_logprobs", "top_logprobs goes with logprobs=true alone.")
        request = self._request(fields, params, [prompt], chat=True)
        ended = with_answer_ends(request.params, chat.answers)
        return dataclasses.replace(request, params=ended, lead=chat.answers.lead)

    def _request(
        self, fields: Mapping[str, Any], params: dict[str, Any], prompts: Prompts, **flags: Any
    ) -> CompletionRequest:
        if isinstance(params.get("stop"), str):
            params["stop"] = (params["stop"],)
        if "max_tokens" not in params:
            # The default must not make a prompt too long that would fit with fewer new tokens.
            room = self.context_length - max(len(prompt) for prompt, _ in prompts)
            params["max_tokens"] = max(1, min(self.defaults.max_tokens, room))
        sampling = self.defaults.params(**params)
        self._check_choices(len(prompts) * max(sampling.n, sampling.best_of or 1))
        stream = _flag(fields, "stream")
        if stream and sampling.best_of is not None and sampling.best_of > sampling.n:
            raise RequestError("stream", "the best of several answers cannot be streamed.")
        options = fields.get("stream_options", {})
        if not isinstance(options, dict) or options.keys() - {"include_usage"}:
            raise RequestError("stream_options", "stream_options may have include_usage alone.")
        model = fields.get("model", "")
        if not isinstance(model, str):
            raise RequestError("model", "model should be text.")
        flags |= {"stream": stream, "include_usage": _flag(options, "include_usage")}
        tokens, texts = zip(*prompts, strict=True)
        return CompletionRequest(tokens, texts, sampling, model, "seed" in params, **flags)

    def _check_choices(self, choices: int) -> None:
        if choices > self.max_choices:
            message = f"{choices} answers are asked for at once; {self.max_choices} would work."
            raise RequestError("n", message)

    def _prompts(self, prompt: Any) -> Prompts:
        """Tokens and text of the prompts: one as a text or as tokens, or a list of either."""
        prompts = [prompt] if isinstance(prompt, str) or _is_tokens(prompt) else prompt
        if not _is_list(prompts) or not all(isinstance(p, str) or _is_tokens(p) for p in prompts):
            message = "prompt should be a text, a list of tokens, or a list of these."
            raise RequestError("prompt", message)
        self._check_choices(len(prompts))
        return [(self._encode(p), p if isinstance(p, str) else self._text(p)) for p in prompts]

    def _text(self, ids: Sequence[int]) -> str:
        """The text of a prompt. A character that it only begins is completed by the answer."""
        decoder = StreamDecoder(self.tokenizer)
        return "".join(map(decoder.push, ids))

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        try:
            if isinstance(prompt, str):
                prompt = encode_prompt(self.tokenizer, prompt, allow_special=self.allow_special)
        except DataError as error:
            raise RequestError("prompt", str(error)) from None
        ids = prompt
        last = self.tokenizer.vocab_size - 1
        if ids and not 0 <= min(ids) <= max(ids) <= last:
            raise RequestError("prompt", f"the prompt has a token that is not from 0 to {last}.")
        if len(ids) > (longest := self.context_length):
            room = f"is longer than the model's context of {longest}"
            message = f"a prompt of {len(ids)} tokens {room}; at most {longest} tokens fit."
            raise RequestError("prompt", message)
        return tuple(ids)


def _chat_prompt(chat: ChatEncoder, messages: list[dict[str, Any]]) -> tuple[tuple[int, ...], str]:
    try:
        ids, text = chat.prompt(messages)
    except TemplateError as error:
        start = "" if error.refused else "the chat template cannot write these messages: "
        raise RequestError("messages", f"{start}{str(error).rstrip('.')}.") from None
    except DataError as error:
        raise RequestError("messages", f"{str(error).rstrip('.')}.") from None
    return tuple(ids), text


def _known_fields(body: Mapping[str, Any], known: set[str]) -> tuple[dict, dict]:
    """The fields that are set (clients send null for others), and those that sampling has."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in fields if name not in known]:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
        right = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}."
        raise RequestError(f"{name:.60}", f"there is no parameter {name!r:.60} here; {right}")
    return fields, {name: fields[name] for name in PARAMETERS & fields.keys()}


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not (_is_list(messages) and messages and all(isinstance(m, dict) for m in messages)):
        message = "messages should be a list of objects with role and content, one at least."
        raise RequestError("messages", message)
    return [{**message, "content": _content(message.get("content"))} for message in messages]


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if _is_list(content) else [None]:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise RequestError("messages", "the content of a message should be text.")
        texts.append(text)
    return "".join(texts)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(name, f"{name} should be true or false.")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_tokens(value: Any) -> bool:
    return _is_list(value) and all(type(token) is int for token in value)
