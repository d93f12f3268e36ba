"""Sampling parameters, declared once for configs, requests, `grok sample` and the engine."""

import copy
import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from grok.config.section import (
    Count32,
    CountOrZero32,
    Float32,
    PositiveFloat32,
    PositiveOrZeroFloat32,
    Section,
    Share,
)
from grok.config.validate import expectation
from grok.errors import ConfigError, RequestError

MAX_LOGPROBS = 20  # of likeliest tokens a position
# Each token is compared with all of them, while every other request waits.
MAX_STOP_TEXTS, MAX_STOP_LENGTH = 64, 1000
# Tokens and bounds of logit_bias, as in OpenAI's interface. A slot of the engine holds as many.
MAX_LOGIT_BIAS, BAN = 300, -100

TOKEN_LISTS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")

Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Texts = Annotated[tuple[Text, ...], Field(max_length=MAX_STOP_TEXTS, fail_fast=True)]
Tokens = Annotated[tuple[CountOrZero32, ...], Field(fail_fast=True)]
Biases = Annotated[
    dict[CountOrZero32, Annotated[float, Field(ge=BAN, le=-BAN)]], Field(max_length=MAX_LOGIT_BIAS)
]
TopCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """Defaults for requests that leave a parameter out. Penalties and bans change the logits, which
    are divided by the temperature; a token is drawn from those that top_k, top_p, min_p leave."""

    max_tokens: Annotated[Count32, "new tokens at most"] = 128
    min_tokens: Annotated[CountOrZero32, "new tokens before it may end"] = 0
    temperature: Annotated[PositiveOrZeroFloat32, "divides logits; 0: the likeliest token"] = 1.0
    top_k: Annotated[CountOrZero32, "draw from the k likeliest and ties; 0: all"] = 0
    top_p: Annotated[Share, "draw from the nucleus of this probability"] = 1.0
    min_p: Annotated[Share, "least probability, over the likeliest token's"] = 0.0
    repetition_penalty: Annotated[
        PositiveFloat32, "divides logits of tokens seen so far; 1: none"
    ] = 1.0
    presence_penalty: Annotated[Float32, "subtracted from logits of answered tokens; 0: none"] = 0.0
    frequency_penalty: Annotated[Float32, "the same for each occurrence; 0: none"] = 0.0
    stop: Annotated[Texts, "texts that end the answer, and are cut from it"] = ()

    def __post_init__(self) -> None:
        try:
            _check(self)
        except RequestError as error:
            raise ConfigError(f"sampling.{error}") from None

    def params(self, **changes: Any) -> "SamplingParams":
        """The parameters of a request that sets these fields."""
        return SamplingParams(**{**dataclasses.asdict(self), **changes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingConfig):
    """All parameters of one request; `max_tokens` may be 0 where the prompt's log-probabilities are
    asked for. Raises RequestError for a value that cannot be."""

    max_tokens: Annotated[CountOrZero32, "new tokens at most"] = 128
    stop_token_ids: Annotated[Tokens, "tokens that end it, besides EOS"] = ()
    allowed_token_ids: Annotated[Tokens, "no other tokens; none: all"] = ()
    banned_token_ids: Annotated[Tokens, "tokens that are never chosen"] = ()
    logit_bias: Annotated[
        Biases | None, "added to logits by token id, from -100, which bans it, to 100"
    ] = None
    n: Annotated[Count32, "answers to each prompt"] = 1
    best_of: Annotated[Count32 | None, "answers made, of which the n likeliest are returned"] = None
    logprobs: Annotated[TopCount | None, "log-probabilities of each token and k likeliest"] = None
    prompt_logprobs: Annotated[TopCount | None, "the same of the prompt"] = None
    seed: Annotated[int, Field(ge=0, le=(1 << 64) - 1), "seed of the draws"] = 0
    ignore_eos: Annotated[bool, "do not end at EOS"] = False
    experts: Annotated[bool, "return the experts of the answer's tokens"] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _with_integer_keys(self.logit_bias))
        _check(self)
        for name in TOKEN_LISTS:
            # Once each: the engine goes through them while other requests wait.
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError("max_tokens", "max_tokens=0 must be more than 0.")
        if self.best_of is not None and self.best_of < self.n:
            problem = f"best_of={self.best_of} is fewer than n={self.n}"
            raise RequestError("best_of", f"{problem}; best_of={self.n} would work.")

    @property
    def never_chosen(self) -> tuple[int, ...]:
        """Tokens that it bans: those of banned_token_ids, and those with the bias that bans."""
        biases = self.logit_bias or {}
        return (*self.banned_token_ids, *(i for i, bias in biases.items() if bias == BAN))

    def with_seed(self, seed: int) -> "SamplingParams":
        """The same with another seed, from 0 to 2^64 - 1; nothing is checked again."""
        params = copy.copy(self)
        object.__setattr__(params, "seed", seed)
        return params


@functools.cache
def _validators(params: type) -> dict[str, TypeAdapter]:
    hints = typing.get_type_hints(params, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(params)}


def _check(params: SamplingConfig) -> None:
    """Refuses, as RequestError, what the declarations above do not allow; lists become tuples."""
    kind: Any = type(params)
    for name, validator in _validators(kind).items():
        if isinstance(value := getattr(params, name), list):
            object.__setattr__(params, name, value := tuple(value))
        try:
            validator.validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            expected = expectation(first) or first["msg"]
            if isinstance(value, Mapping) and first["loc"]:
                _refuse_bias(name, first, expected)
            raise RequestError(name, f"{name}={_brief(value)} must be {expected}.") from None
    if params.min_tokens > params.max_tokens:
        problem = f"min_tokens={params.min_tokens} is more than max_tokens={params.max_tokens}"
        raise RequestError("min_tokens", f"{problem}; min_tokens={params.max_tokens} would work.")


def _with_integer_keys(biases: Any) -> Any:
    """The biases with token ids for the texts that JSON has in their place."""
    if not isinstance(biases, Mapping):
        return biases
    if len(biases) > MAX_LOGIT_BIAS:
        problem = f"logit_bias has {len(biases)} tokens"
        raise RequestError("logit_bias", f"{problem}; {MAX_LOGIT_BIAS} at most would work.")
    ids = {str(token) for token in biases if type(token) is int}
    return {
        int(key) if isinstance(key, str) and _is_id(key) and key not in ids else key: bias
        for key, bias in biases.items()
    }


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20 and str(int(text)) == text


def _refuse_bias(name: str, error: Mapping[str, Any], expected: str) -> None:
    """Refuses the key or the value in a mapping that an error of pydantic is about."""
    key, *rest = error["loc"]
    if rest:
        message = f"{name} has the key {_brief(error['input'])}, which must be {expected}"
    else:
        message = f"{name} has {_brief(error['input'])} for {key}, which must be {expected}"
    raise RequestError(name, f'{message}; {{"5": -100}} would work.') from None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
