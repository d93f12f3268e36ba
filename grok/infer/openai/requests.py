"""Bodies of OpenAI's completions interface, which `grok batch` and `grok serve` both parse, as
requests to the engine."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from grok.config.sampling import SamplingConfig, SamplingParams
from grok.data.chat.encoder import ChatEncoder
from grok.data.tokenizers import StreamDecoder, Tokenizer, encode_prompt
from grok.errors import DataError, RequestError
from grok.infer.openai.fields import CHAT, COMPLETION, SAMPLING, known_fields
from grok.infer.openai.messages import chat_prompt
from grok.infer.request import Request, prompt_seed, with_answer_ends

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
        fields = known_fields(body, COMPLETION)
        params = _sampling_fields(fields)
        prompts = self._prompts(fields["prompt"])
        if echo := fields.get("echo", False):
            # Scores are all that the engine has to do for an answer without tokens.
            least = 0 if params.get("max_tokens") == 0 else None
            params["prompt_logprobs"] = params.get("logprobs", least)
        return self._request(fields, params, prompts, echo=echo)

    def chat(self, body: Mapping[str, Any]) -> CompletionRequest:
        """Parses a body of /v1/chat/completions."""
        fields = known_fields(body, CHAT)
        params = _sampling_fields(fields)
        prompt = chat_prompt(self.chat_encoder, fields)
        assert self.chat_encoder is not None
        answers = self.chat_encoder.answers
        if "max_completion_tokens" in fields:
            params["max_tokens"] = fields["max_completion_tokens"]
        logprobs = params.get("logprobs", False)
        params["logprobs"] = fields.get("top_logprobs", 0) if logprobs else None
        if "top_logprobs" in fields and not logprobs:
            raise RequestError("top_logprobs", "top_logprobs goes with logprobs=true alone.")
        request = self._request(fields, params, [prompt], chat=True)
        ended = with_answer_ends(request.params, answers)
        return dataclasses.replace(request, params=ended, lead=answers.lead)

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
        stream = fields.get("stream", False)
        if stream and sampling.best_of is not None and sampling.best_of > sampling.n:
            raise RequestError("stream", "the best of several answers cannot be streamed.")
        include_usage = fields.get("stream_options", {}).get("include_usage", False)
        flags |= {"stream": stream, "include_usage": include_usage}
        tokens, texts = zip(*prompts, strict=True)
        model = fields.get("model", "")
        return CompletionRequest(tokens, texts, sampling, model, "seed" in params, **flags)

    def _check_choices(self, choices: int) -> None:
        if choices > self.max_choices:
            message = f"{choices} answers are asked for at once; {self.max_choices} would work."
            raise RequestError("n", message)

    def _prompts(self, prompt: Any) -> Prompts:
        """Tokens and text of the prompts: one as a text or as tokens, or a list of either."""
        prompts = [prompt] if isinstance(prompt, str) or _is_tokens(prompt) else prompt
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


def _sampling_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in SAMPLING if name in fields}


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
