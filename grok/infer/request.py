"""What is asked of the engine and what it answers. Nothing here imports JAX.

`grok.infer.engine.Engine` takes a `Request` with `submit` and gives `Output`s from `step`.
"""

import dataclasses
import math
from collections.abc import Sequence

from grok.errors import REFUSED, GrokError

MOST_LOGPROBS = 20


class RequestError(GrokError, ValueError):
    """A request that cannot be run as it is; `parameter` names what of it has to change."""

    exit_code = REFUSED

    def __init__(self, parameter: str, message: str):
        super().__init__(message)
        self.parameter = parameter


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, when they end, and what is told of them.

    In this order: penalties and bans change the logits; temperature 0 takes the likeliest; else
    logits are divided by it and drawn from what top_k, then top_p, then min_p leave. Raises
    RequestError for a value that cannot be.
    """

    max_tokens: int = 128
    min_tokens: int = 0  # tokens before the end token, and stop_token_ids, may be chosen
    temperature: float = 1.0
    top_k: int = 0  # the likeliest so many, with ties; 0: all
    top_p: float = 1.0  # share of probability that the nucleus keeps
    min_p: float = 0.0  # least probability, relative to the likeliest token's
    repetition_penalty: float = 1.0  # divides positive logits, of tokens in prompt or answer
    presence_penalty: float = 0.0  # taken off logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each time
    stop: tuple[str, ...] = ()  # texts that end the answer, and are cut from it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end it, as the tokenizer's end token does
    allowed_token_ids: tuple[int, ...] = ()  # none but these; (): all
    banned_token_ids: tuple[int, ...] = ()
    n: int = 1  # answers
    best_of: int | None = None  # answers made, of which the n of highest mean log-probability stay
    logprobs: int | None = None  # log-probabilities of each new token and this many top ones
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    seed: int = 0
    ignore_eos: bool = False
    experts: bool = False  # tell the experts that the answer's tokens went to

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name, (kinds, right, holds) in _RIGHT.items():
            value = getattr(self, name)
            if type(value) not in kinds or not holds(value):
                raise RequestError(name, f"{name}={value!r} should be {right}.")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                "min_tokens",
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                f"min_tokens={self.max_tokens} would work.",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                "best_of",
                f"best_of={self.best_of} is fewer than n={self.n}; best_of={self.n} would work.",
            )


def _real(value) -> bool:
    return math.isfinite(value)


def _ids(values) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


_INT, _FLOAT, _OR_NONE = (int,), (int, float), (int, type(None))
_COUNT_OF_TOP = f"a whole number from 0 to {MOST_LOGPROBS}, or none"

# Of each parameter: its types, what it should be in words, and the same as a test.
_RIGHT = {
    "max_tokens": (_INT, "a whole number from 1", lambda v: v >= 1),
    "min_tokens": (_INT, "a whole number from 0", lambda v: v >= 0),
    "temperature": (_FLOAT, "a number from 0", lambda v: _real(v) and v >= 0),
    "top_k": (_INT, "a whole number from 0 (0: all tokens)", lambda v: v >= 0),
    "top_p": (_FLOAT, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "min_p": (_FLOAT, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": (_FLOAT, "a number above 0 (1: none)", lambda v: _real(v) and v > 0),
    "presence_penalty": (_FLOAT, "a number (0: none)", _real),
    "frequency_penalty": (_FLOAT, "a number (0: none)", _real),
    "stop": (
        (tuple,),
        "a list of texts, none empty",
        lambda v: all(isinstance(text, str) and text for text in v),
    ),
    "stop_token_ids": ((tuple,), "a list of tokens", _ids),
    "allowed_token_ids": ((tuple,), "a list of tokens", _ids),
    "banned_token_ids": ((tuple,), "a list of tokens", _ids),
    "n": (_INT, "a whole number from 1", lambda v: v >= 1),
    "best_of": (_OR_NONE, "a whole number from 1, or none", lambda v: v is None or v >= 1),
    "logprobs": (_OR_NONE, _COUNT_OF_TOP, lambda v: v is None or 0 <= v <= MOST_LOGPROBS),
    "prompt_logprobs": (_OR_NONE, _COUNT_OF_TOP, lambda v: v is None or 0 <= v <= MOST_LOGPROBS),
    "seed": (_INT, "a whole number from 0 to 2^64 - 1", lambda v: 0 <= v < 1 << 64),
    "ignore_eos": ((bool,), "true or false", lambda v: True),
    "experts": ((bool,), "true or false", lambda v: True),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt in tokens, and what is wanted after it. `id` is the caller's, unique in flight."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token, and of the likeliest ones in order as (token, value).

    They are the model's own: before penalties, bans and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """What is new of one answer (`choice` 0..n-1) of one request since its last Output.

    `token_ids` leave out the token that ended the answer. `text` never holds part of a character,
    nor what may still turn out to begin a stop text: joined, the texts of an answer are the whole
    of it. `finish_reason` is "stop", "length" or "cancelled" in the last Output of an answer.
    `experts`, if asked, are those of further tokens of the answer in order, (L, C) each: a token
    goes to them when the one after it is computed, so joined they lack those of the last token
    where nothing was computed after it.
    """

    request_id: str
    choice: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each of token_ids, if asked
    # One for each token of the prompt, the first of which has none; given once, by choice 0.
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    experts: tuple[list[list[int]], ...] | None = None


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was made, and holds now."""

    tokens_in: int  # of prompts that were read, those found in shared pages included
    tokens_shared: int  # of those, found in pages that were there already
    tokens_out: int
    preempted: int  # times that a sequence gave up its pages and was run again later
    running: int  # answers in slots
    waiting: int  # answers not in a slot
    pages_used: int  # pages that sequences in slots hold
    pages_kept: int  # pages of no sequence that hold prefixes, given up when others need them
    pages_free: int
