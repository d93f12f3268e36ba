"""What is asked of the engine and what it answers. Nothing here imports JAX.

`grok.infer.engine.Engine` takes a `Request` with `submit` and gives `Output`s from `step`.
"""

import dataclasses

from grok.config.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt in tokens, and what is wanted after it. `id` is the caller's, unique in flight."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = dataclasses.field(default=SamplingParams())


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
