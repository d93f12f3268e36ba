"""A request to the engine and the completion that grows from it. Nothing here imports JAX."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from grok.config.sampling import TOKEN_LISTS, SamplingParams
from grok.data.chat.encoder import Answers
from grok.data.tokenizers import StreamDecoder, Tokenizer
from grok.errors import RequestError
from grok.infer.page_pool import PageLayout


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt in tokens and its sampling parameters; `id` is unique among those in flight."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = dataclasses.field(default=SamplingParams())


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes that every request has to fit: of the model, and of one group's pages."""

    vocab_size: int
    context_length: int
    layout: PageLayout
    pages_per_group: int
    groups: int

    def check(self, request: Request) -> None:
        """Raises RequestError, with what would fit, for a request that could never run."""
        if problem := next(self._problems(request), None):
            raise RequestError(*problem)

    def _problems(self, request: Request) -> Iterator[tuple[str, str]]:
        params, context = request.params, self.context_length
        prompt, length = len(request.prompt), len(request.prompt) + params.max_tokens
        if not prompt:
            yield "prompt", "the prompt is empty; one token at least is needed to continue from."
        lists = {name: getattr(params, name) for name in (*TOKEN_LISTS, "logit_bias")}
        for name, ids in {"prompt": request.prompt, **lists}.items():
            bounds = (min(ids), max(ids)) if ids else ()
            for token in bounds:
                if not 0 <= token < self.vocab_size:
                    yield (
                        name,
                        f"{name} has token {token} and the model's vocabulary {self.vocab_size} "
                        "tokens; the tokenizer must be the one the model was trained with.",
                    )
        tokens = f"a prompt of {prompt} tokens"
        longest = context - min(1, params.max_tokens)
        if prompt > longest:
            room = "leaves no room for a new one in" if params.max_tokens else "is longer than"
            room = f"{room} the model's context of {context}"
            yield "prompt", f"{tokens} {room}; at most {longest} tokens fit."
        tokens += f" with {params.max_tokens} new ones"
        if length > context:
            room = f"is longer than the model's context of {context}"
            yield "max_tokens", f"{tokens} {room}; at most {context - prompt} new tokens fit."
        if (pages := self.layout.max_pages(length)) > self.pages_per_group:
            enough, size = pages * self.groups, self.layout.page_size
            room = f"needs more than the {self.pages_per_group} pages of {size} tokens"
            yield "max_tokens", f"{tokens} {room}; engine.num_pages={enough} would work."


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token, and of the likeliest ones in order as (token, value). They are
    the model's own: before penalties, bans and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """New tokens and text of one completion (`choice` 0..n-1) of a request since its last Output.
    `token_ids` leave out the token that ended the completion. `text` holds neither part of a
    character nor what may become a stop text. `finish_reason` is "stop", "length", "cancelled" or
    "error" in the last Output, and then `error` says why. `experts`, if asked for, are (L, C) for
    each token in order: they are known when the next token is computed, so those of the last token
    may be missing."""

    request_id: str
    choice: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each of token_ids, if asked for
    # One for each token of the prompt, None for the first; given once, by choice 0.
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    experts: tuple[list[list[int]], ...] | None = None
    error: str | None = None


class Completion:
    """One choice of a request as it grows: its tokens, and its text up to the first stop text."""

    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer | None):
        self.request, self.choice = request, choice
        self.finish_reason: str | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, request.prompt)
        params = request.params
        eos = () if tokenizer is None or params.ignore_eos else tokenizer.eos_ids
        self._stop_tokens = frozenset((*params.stop_token_ids, *eos))
        self._length, self._logprob_sum = 0, 0.0
        self._error: str | None = None
        # New since the last `drain`.
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.experts: list[list[list[int]]] = []  # of the first tokens that have none yet
        self._text = ""

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens, which ranks the completions of `best_of`."""
        return self._logprob_sum / max(1, self._length)

    def add(self, logprobs: TokenLogprobs) -> None:
        """Takes the next token; afterwards `finish_reason` may be set."""
        params, token = self.request.params, logprobs.token
        if token in self._stop_tokens:
            self.finish("stop")
            return
        self._tokens.append(token)
        self._logprobs.append(logprobs)
        self._length += 1
        self._logprob_sum += logprobs.logprob
        if self._decoder is not None:
            self._add_text(self._decoder.push(token))
        if self.finish_reason is None and self._length == params.max_tokens:
            self.finish("length")

    def drain(self) -> Output:
        """Returns what is new since the last call."""
        safe = len(self._text) - (self._stop_prefix_length() if self.finish_reason is None else 0)
        params = self.request.params
        output = Output(
            self.request.id,
            self.choice,
            tuple(self._tokens),
            self._text[:safe],
            None if params.logprobs is None else tuple(self._logprobs),
            self.prompt_logprobs,
            self.finish_reason,
            tuple(self.experts) if params.experts else None,
            self._error,
        )
        self._tokens, self._logprobs, self.experts = [], [], []
        self._text, self.prompt_logprobs = self._text[safe:], None
        return output

    def cut_short(self, error: str | None) -> None:
        """Ends it here, cancelled or by an error, with what came of it before."""
        self.finish_reason, self._error = "cancelled" if error is None else "error", error

    def finish(self, reason: str) -> None:
        """Ends it here, for this reason unless a stop text comes first."""
        if self._decoder is not None:
            self._add_text(self._decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def _add_text(self, text: str) -> None:
        self._text += text
        positions = [at for stop in self.request.params.stop if (at := self._text.find(stop)) >= 0]
        if positions:
            self._text = self._text[: min(positions)]
            self.finish_reason = "stop"

    def _stop_prefix_length(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        lengths = (
            length
            for stop in self.request.params.stop
            for length in range(1, min(len(stop), len(self._text) + 1))
            if stop.startswith(self._text[-length:])
        )
        return max(lengths, default=0)


def best_outputs(completions: list[Completion], n: int) -> list[Output]:
    """Outputs of the n completions of highest mean log-probability, from the best."""
    best = sorted(completions, key=lambda completion: -completion.mean_logprob)[:n]
    prompt_logprobs, completions[0].prompt_logprobs = completions[0].prompt_logprobs, None
    best[0].prompt_logprobs = prompt_logprobs
    for choice, completion in enumerate(best):
        completion.choice = choice
    return [completion.drain() for completion in best]


def with_answer_ends(params: SamplingParams, answers: Answers) -> SamplingParams:
    """`params` with the ends of a chat template's answers beside EOS."""
    if params.ignore_eos:
        return params
    stop = tuple(dict.fromkeys((*params.stop, *answers.end_texts)))
    ids = tuple(dict.fromkeys((*params.stop_token_ids, *answers.end_ids)))
    return dataclasses.replace(params, stop=stop, stop_token_ids=ids)


def prompt_seed(seed: int, index: int) -> int:
    """The seed of the prompt of this index among those of a request, so that they are drawn
    independently of each other; the first one has the request's."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest())


def submit_all(engine: Any, requests: Sequence[Request]) -> None:
    """Submits all requests to an engine, or none: RequestError where it refuses one of them."""
    submitted = []
    try:
        for request in requests:
            engine.submit(request)
            submitted.append(request.id)
    except Exception:
        for request_id in submitted:
            engine.cancel(request_id)
        raise
