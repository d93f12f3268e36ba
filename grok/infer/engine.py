"""The engine: requests in, tokens out, many at a time. B groups of devices, U chunks of a step, Q
tokens of a chunk, T = U*Q, D embed, L layers, C chosen experts."""

import dataclasses
from collections.abc import Generator, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.errors import RequestError
from grok.infer.page_pool import PageLayout
from grok.infer.request import Completion, Limits, Output, Request, TokenLogprobs
from grok.infer.sampling import Sampled
from grok.infer.scheduler import ScheduledStep, Scheduler, SequenceState
from grok.infer.step import StepInputs, forward_and_sample, score_prompt
from grok.model.attend import init_cache
from grok.model.decoder import Decoder

DEFAULTS = EngineConfig()


def _count(meaning: str, total: bool = False) -> int:
    return dataclasses.field(metadata={"meaning": meaning, "total": total})


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts of the present state and, where `total`, since the engine was made."""

    tokens_in: int = _count("tokens of prompts, those found in the cache included", total=True)
    tokens_cached: int = _count("tokens of prompts that were found in the cache", total=True)
    tokens_out: int = _count("new tokens", total=True)
    preempted: int = _count("sequences that lost their pages and were computed again", total=True)
    running: int = _count("sequences in slots")
    waiting: int = _count("sequences that wait for a slot")
    pages_used: int = _count("pages of the cache that sequences in slots hold")
    pages_cached: int = _count("pages of the cache that hold prefixes alone")
    pages_free: int = _count("pages of the cache that hold nothing")


class Engine:
    """A model on its mesh, a paged cache, and the requests in flight. A request's tokens depend on
    it and its seed alone, never on its batch: prompts always go through one program and answers
    through another, and rows are computed independently. In float32 on CPU this holds to the bit;
    elsewhere a program may round a row differently by its position, which can flip near-ties.
    Another number of sequences, chunk size or mesh rounds differently. One thread makes all calls;
    every process of the mesh makes the same ones in the same order."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        options: EngineConfig = DEFAULTS,
    ):
        """Makes the cache; sequences and pages are rounded up to a multiple of the groups. Without
        a tokenizer, completions have no text and end at their length or stop_token_ids."""
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        config, size = model.config, options.page_size
        dtype = config.compute_dtype if options.cache_dtype == "compute" else options.cache_dtype
        with jax.set_mesh(mesh):
            groups = sharding.axis_size("batch")
            slots = -(-options.max_num_seqs // groups)
            chunks = options.prefill_chunk_size // size
            layout = PageLayout(size, chunks, config.attention.window)
            self._table_length = -(-config.context_length // size)
            max_pages = layout.max_pages(config.context_length)
            pages = -(-options.num_pages // groups) or slots * max_pages
            self._cache = jax.jit(lambda: init_cache(config, groups * pages, size, dtype))()
        self._limits = Limits(config.vocab_size, config.context_length, layout, pages, groups)
        self._scheduler = Scheduler(groups, slots, pages, layout)
        self._inputs = StepInputs(config, tokenizer, mesh)
        self._requests: dict[str, list[SequenceState]] = {}  # in flight
        self._cancelled: list[Output] = []
        self._tokens_in = self._tokens_out = 0

    @property
    def unfinished(self) -> int:
        """Completions whose last Output is still to come."""
        return sum(map(len, map(_running, self._requests.values()))) + len(self._cancelled)

    @property
    def stats(self) -> EngineStats:
        """Counts of tokens, sequences and pages."""
        counts = (pool.counts() for pool in self._scheduler.pools)
        used, cached, free = map(sum, zip(*counts, strict=True))
        return EngineStats(
            tokens_in=self._tokens_in,
            tokens_cached=self._scheduler.cached_tokens,
            tokens_out=self._tokens_out,
            preempted=self._scheduler.preempted,
            running=len(self._scheduler.running()),
            waiting=len(self._scheduler.waiting),
            pages_used=used,
            pages_cached=cached,
            pages_free=free,
        )

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError where it could never be run."""
        self._check(request)
        params, sequences = request.params, self._requests.setdefault(request.id, [])
        for choice in range(params.best_of or params.n):
            completion = Completion(request, choice, self._tokenizer)
            no_prefix_reuse = choice == 0 and params.prompt_logprobs is not None
            sequences.append(SequenceState(completion, list(request.prompt), no_prefix_reuse))
            self._scheduler.add(sequences[-1])

    def cancel(self, request_id: str) -> None:
        """Ends a request and frees its pages at once; unknown ids are ignored."""
        self._cancelled += self._end(request_id)

    def step(self) -> list[Output]:
        """Runs one step on the devices, a prefill or a decode, and returns what is new."""
        outputs, self._cancelled = self._cancelled, []
        if (step := self._scheduler.next_step()) is None:
            return outputs
        size = self._limits.layout.page_size if step.prefill else 1
        tokens_BT, batch = self._inputs.paged_batch(step, size, self._table_length)
        with jax.set_mesh(self._mesh):
            sampled, x_BTD, experts_LBTC, self._cache = forward_and_sample(
                self._model, self._cache, tokens_BT, batch, self._inputs.sampling(step)
            )
        sampled = jax.tree.map(np.asarray, sampled)
        scored = [(chunk, row) for chunk, row in step.chunks() if chunk.sequence.no_prefix_reuse]
        if step.prefill and scored:
            self._score_prompts(step, scored, x_BTD)
        for chunk, row in step.chunks():
            sequence = chunk.sequence
            if chunk.start + chunk.count < len(sequence.tokens):
                continue
            if sequence.request.params.experts and not step.prefill:
                sequence.completion.experts.append(np.asarray(experts_LBTC)[:, *row].tolist())
            outputs += self._append_token(sequence, sampled, row)
        return outputs

    def generate(self, requests: Iterable[Request]) -> Generator[Output, None, None]:
        """Runs requests to their ends, beside whatever else is in flight; closed early, ends those
        that still run. Raises RequestError where one could never be run, and then runs none."""
        submitted = []
        try:
            for request in requests:
                self.submit(request)
                submitted.append(request.id)
            while self.unfinished:
                yield from self.step()
        finally:
            for request_id in submitted:
                self._end(request_id)

    def warm_up(self) -> None:
        """Answers once, so that both programs are compiled before anyone waits for them."""
        request = Request("warm-up", (0,), SamplingParams(max_tokens=2, ignore_eos=True))
        list(self.generate([request]))

    def _end(self, request_id: str) -> list[Output]:
        sequences = self._requests.pop(request_id, [])
        cut_short = _running(sequences)
        for sequence in cut_short:
            self._scheduler.remove(sequence)
            sequence.completion.finish("cancelled")
        if sequences and len(sequences) > (n := sequences[0].request.params.n):
            cut_short = sequences[:n]  # best_of: none was returned yet
        return [sequence.completion.drain() for sequence in cut_short]

    def _score_prompts(self, step: ScheduledStep, scored, x_BTD: jax.Array) -> None:
        next_BUQ = np.zeros((*step.shape, self._limits.layout.page_size), np.int32)
        for chunk, row in scored:
            first = chunk.start + 1
            targets = chunk.sequence.request.prompt[first : first + chunk.count]
            next_BUQ[row][: len(targets)] = targets
        with jax.set_mesh(self._mesh):
            scores = [np.asarray(array) for array in score_prompt(self._model, x_BTD, next_BUQ)]
        for chunk, row in scored:
            sequence, request = chunk.sequence, chunk.sequence.request
            top = request.params.prompt_logprobs or 0
            if chunk.start == 0:
                sequence.prompt_logprobs = [None]
            targets = slice(chunk.start + 1, chunk.start + 1 + chunk.count)
            for q, token in enumerate(request.prompt[targets]):
                logprobs = _logprobs(token, top, *(array[*row, q] for array in scores))
                sequence.prompt_logprobs.append(logprobs)
            if len(sequence.prompt_logprobs) == sequence.prompt_length:
                sequence.completion.prompt_logprobs = tuple(sequence.prompt_logprobs)
                # After a preemption the prompt may reuse pages, and is not scored twice.
                sequence.no_prefix_reuse = False

    def _append_token(
        self, sequence: SequenceState, sampled: Sampled, row: tuple[int, int]
    ) -> list[Output]:
        """Gives a sequence its new token; returns what is new of its request."""
        request, completion = sequence.request, sequence.completion
        params, token = request.params, int(sampled.token_B[row])
        if len(sequence.tokens) == sequence.prompt_length and completion.choice == 0:
            self._tokens_in += sequence.prompt_length
        logprobs = sampled.logprob_B[row], sampled.top_BX[row], sampled.top_logprob_BX[row]
        completion.add(_logprobs(token, params.logprobs or 0, *logprobs))
        sequence.tokens.append(token)
        self._tokens_out += 1
        sequences = self._requests[request.id]
        if completion.finish_reason is not None:
            self._scheduler.remove(sequence)
        if not (running := _running(sequences)):
            del self._requests[request.id]
        if len(sequences) == params.n:
            return [completion.drain()]
        return [] if running else _best([s.completion for s in sequences], params.n)

    def _check(self, request: Request) -> None:
        params = request.params
        if request.id in self._requests:
            message = f"id={request.id!r} is that of a request in flight; another one would work."
            raise RequestError("id", message)
        self._limits.check(request)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", "stop texts need a tokenizer, and this engine has none.")
        if params.experts and self._model.config.moe is None:
            raise RequestError("experts", "this model has no experts; experts=false would work.")
        if params.experts and self._mesh.is_multi_process:
            message = "experts need one process with the whole mesh; experts=false would work."
            raise RequestError("experts", message)
        if self._inputs.bans(params, early=params.min_tokens > 0).all():
            name = "allowed_token_ids" if params.allowed_token_ids else "banned_token_ids"
            message = f"{name} leaves no token that may be chosen; one such token would work."
            raise RequestError(name, message)


def _running(sequences: list[SequenceState]) -> list[SequenceState]:
    return [sequence for sequence in sequences if sequence.completion.finish_reason is None]


def _logprobs(token: int, top: int, logprob, top_X, top_logprob_X) -> TokenLogprobs:
    pairs = zip(top_X[:top].tolist(), top_logprob_X[:top].tolist(), strict=True)
    return TokenLogprobs(token, float(logprob), tuple(pairs))


def _best(completions: list[Completion], n: int) -> list[Output]:
    """The n completions of highest mean log-probability, from the best."""
    best = sorted(completions, key=lambda completion: -completion.mean_logprob)[:n]
    prompt_logprobs, completions[0].prompt_logprobs = completions[0].prompt_logprobs, None
    best[0].prompt_logprobs = prompt_logprobs
    for choice, completion in enumerate(best):
        completion.choice = choice
    return [completion.drain() for completion in best]
