"""The engine: requests in, tokens out, many at a time.

A request's tokens depend on it and its seed alone, never on what runs beside it: its prompt goes
through one program and its answer through another, whatever the load; rows of a product, tiles of
an expert, attention and the draw compute each token by itself; page numbers do not matter. In
float32 on CPU this holds to the bit, and tests say so. Elsewhere, and in bfloat16, it holds as far
as a compiled program computes a row alike wherever it stands; where it does not, a near-tie between
tokens or experts may fall the other way. Engines of other slots, chunks or meshes round otherwise.

Letters: B groups of devices, U blocks of a step, Q tokens of a block, T = U*Q, D embed, L layers,
C chosen experts.
"""

import dataclasses
from collections.abc import Container, Generator, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.errors import RequestError
from grok.infer.completion import Completion
from grok.infer.request import EngineStats, Output, Request, TokenLogprobs
from grok.infer.sampling import Sampled
from grok.infer.scheduler import ScheduledStep, Scheduler, SequenceState
from grok.infer.step import forward_and_sample, score_prompt
from grok.infer.step_inputs import StepInputs
from grok.model.attend import init_cache
from grok.model.decoder import Grok

DEFAULTS = EngineConfig()


@dataclasses.dataclass
class _Job:
    """A request in flight: its answers, and those of them that still run."""

    answers: list[Completion]
    open: dict[int, SequenceState]


class Engine:
    """A model on its mesh, a cache in pages, and the requests in flight.

    One thread makes all calls. Where the mesh has several processes, each makes the same calls in
    the same order.
    """

    def __init__(
        self,
        model: Grok,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        options: EngineConfig = DEFAULTS,
    ):
        """Makes the cache; slots and pages are rounded up to as many for every group of devices.
        Without a tokenizer answers have no text, and no end but their length or stop_token_ids."""
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._config = config = model.config
        self._page_size = size = options.page_size
        with jax.set_mesh(mesh):
            groups = sharding.axis_size("batch")
            slots = -(-options.max_num_seqs // groups)
            self._longest = -(-config.context_length // size)
            self._pages = -(-options.num_pages // groups) or slots * self._longest
            same = options.cache_dtype == "compute"
            dtype = config.compute_dtype if same else options.cache_dtype
            make = jax.jit(lambda: init_cache(config, groups * self._pages, size, dtype))
            self._cache = make()
        self._scheduler = Scheduler(
            groups, slots, self._pages, size, options.prefill_chunk_size // size
        )
        self._jobs: dict[str, _Job] = {}
        self._told: list[Output] = []
        self._tokens_in = self._tokens_out = 0
        self._inputs = StepInputs(config, tokenizer, mesh)

    @property
    def unfinished(self) -> int:
        """Answers of which the last Output is still to come."""
        return sum(len(job.open) for job in self._jobs.values()) + len(self._told)

    @property
    def stats(self) -> EngineStats:
        """Counts of tokens, answers and pages."""
        pools = self._scheduler.pools
        return EngineStats(
            tokens_in=self._tokens_in,
            tokens_shared=self._scheduler.shared,
            tokens_out=self._tokens_out,
            preempted=self._scheduler.preempted,
            running=len(self._scheduler.running()),
            waiting=len(self._scheduler.waiting),
            pages_used=sum(pool.used for pool in pools),
            pages_kept=sum(pool.kept for pool in pools),
            pages_free=sum(pool.free for pool in pools),
        )

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError where it could never be run."""
        self._check(request, self._jobs)
        params = request.params
        answers = [
            Completion(request, c, self._tokenizer) for c in range(params.best_of or params.n)
        ]
        job = _Job(answers, {})
        for choice in range(len(answers)):
            # Logits of all its tokens are wanted, so all have to be run.
            no_prefix_reuse = choice == 0 and params.prompt_logprobs is not None
            job.open[choice] = SequenceState(request, choice, list(request.prompt), no_prefix_reuse)
            self._scheduler.add(job.open[choice])
        self._jobs[request.id] = job

    def cancel(self, request_id: str) -> None:
        """Ends a request, whose pages are free at once; one that is not in flight is no matter."""
        self._told += self._end(request_id)

    def _end(self, request_id: str) -> list[Output]:
        """The same; what there is to tell of it."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return []
        for choice, sequence in job.open.items():
            self._scheduler.remove(sequence)
            job.answers[choice].cancel()
        n = job.answers[0].request.params.n
        ranked = len(job.answers) > n  # of which none was told yet
        told = job.answers[:n] if ranked else [job.answers[choice] for choice in job.open]
        return [answer.drain() for answer in told]

    def step(self) -> list[Output]:
        """Runs one step on the devices, a prefill or a decode, and tells what came of it."""
        told, self._told = self._told, []
        step = self._scheduler.next_step()
        if step is None:
            return told
        chosen, x_BTD, experts_LBTC = self._run(step)
        if step.prefill:
            self._score_prompts(step, x_BTD)
        for block, row in step.blocks():
            sequence = block.sequence
            if block.start + block.count < len(sequence.tokens):
                continue
            if sequence.request.params.experts and not step.prefill:
                answer = self._jobs[sequence.request.id].answers[sequence.choice]
                answer.add_experts(np.asarray(experts_LBTC)[:, *row])
            told += self._take(sequence, chosen, row)
        return told

    def generate(self, requests: Iterable[Request]) -> Generator[Output, None, None]:
        """Runs requests to their ends, beside whatever else is in flight.

        Raises RequestError before any has begun where one could never be run. Left early, it ends
        those that still run.
        """
        requests, names = list(requests), set(self._jobs)
        for request in requests:
            self._check(request, names)
            names.add(request.id)
        try:
            for request in requests:
                self.submit(request)
            while self.unfinished:
                yield from self.step()
        finally:
            for request in requests:
                self._end(request.id)

    def warm_up(self) -> None:
        """Answers once, so that its programs are compiled before anyone waits for them."""
        request = Request("warm-up", (0,), SamplingParams(max_tokens=2, ignore_eos=True))
        for _ in self.generate([request]):
            pass

    def _run(self, step: ScheduledStep) -> tuple[Sampled, jax.Array, jax.Array]:
        """One step on the devices."""
        size = self._page_size if step.prefill else 1
        tokens_BT, places = self._inputs.paged_batch(step, size, self._longest)
        with jax.set_mesh(self._mesh):
            chosen, x_BTD, experts_LBTC, self._cache = forward_and_sample(
                self._model, self._cache, tokens_BT, places, self._inputs.sampling(step)
            )
        return jax.tree.map(np.asarray, chosen), x_BTD, experts_LBTC

    def _score_prompts(self, step: ScheduledStep, x_BTD: jax.Array) -> None:
        """Collects log-probabilities of the prompts' tokens, where they are wanted."""
        wanted = [(block, row) for block, row in step.blocks() if block.sequence.no_prefix_reuse]
        if not wanted:
            return
        next_BUQ = np.zeros((*step.shape, self._page_size), np.int32)
        for block, row in wanted:
            first = block.start + 1
            after = block.sequence.request.prompt[first : first + block.count]
            next_BUQ[row][: len(after)] = after
        with jax.set_mesh(self._mesh):
            found = [np.asarray(part) for part in score_prompt(self._model, x_BTD, next_BUQ)]
        for block, row in wanted:
            sequence = block.sequence
            top = sequence.request.params.prompt_logprobs or 0
            if block.start == 0:
                sequence.scores = [None]
            for offset in range(block.count):
                at = *row, offset
                if block.start + offset + 1 < sequence.prompt_length:
                    token = sequence.request.prompt[block.start + offset + 1]
                    sequence.scores.append(_logprobs(token, top, *(part[at] for part in found)))
            if len(sequence.scores) == sequence.prompt_length:
                answer = self._jobs[sequence.request.id].answers[sequence.choice]
                answer.prompt_logprobs = tuple(sequence.scores)
                # Run again after a preemption, the prompt may be shared and is not told twice.
                sequence.no_prefix_reuse = False

    def _take(self, sequence: SequenceState, chosen: Sampled, row: tuple[int, int]) -> list[Output]:
        """Gives a sequence its new token; what is to be told of it."""
        job, params = self._jobs[sequence.request.id], sequence.request.params
        answer = job.answers[sequence.choice]
        token = int(chosen.token_B[row])
        parts = chosen.logprob_B[row], chosen.top_BX[row], chosen.top_logprob_BX[row]
        if len(sequence.tokens) == sequence.prompt_length and sequence.choice == 0:
            self._tokens_in += sequence.prompt_length
        answer.add(_logprobs(token, params.logprobs or 0, *parts))
        sequence.tokens.append(token)
        self._tokens_out += 1
        if answer.finish_reason is not None:
            self._scheduler.remove(sequence)
            del job.open[sequence.choice]
            if not job.open:
                del self._jobs[sequence.request.id]
        if len(job.answers) == params.n:
            return [answer.drain()]
        return [] if job.open else _best(job.answers, params.n)

    def _check(self, request: Request, others: Container[str]) -> None:
        """Refuses, as RequestError, what could not be run beside requests of these ids."""
        params, prompt = request.params, request.prompt
        V, N = self._config.vocab_size, self._config.context_length
        if request.id in others:
            raise RequestError(
                "id", f"id={request.id!r} is that of a request in flight; another one would work."
            )
        if not prompt:
            raise RequestError(
                "prompt", "the prompt is empty; one token at least is needed to continue from."
            )
        lists = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")
        for name, ids in (("prompt", prompt), *((name, getattr(params, name)) for name in lists)):
            if ids and not 0 <= min(ids) <= max(ids) < V:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise RequestError(
                    name,
                    f"{name} has token {wrong} and the model's vocabulary {V} tokens; the "
                    "tokenizer must be the one the model was trained with.",
                )
        length = len(prompt) + params.max_tokens
        if len(prompt) >= N:
            raise RequestError(
                "prompt",
                f"a prompt of {len(prompt)} tokens leaves no room for a new one in the model's "
                f"context of {N}; at most {N - 1} tokens fit.",
            )
        if length > N:
            raise RequestError(
                "max_tokens",
                f"a prompt of {len(prompt)} tokens with {params.max_tokens} new ones is longer "
                f"than the model's context of {N}; at most {N - len(prompt)} new tokens fit.",
            )
        if length > self._pages * self._page_size:
            raise RequestError(
                "max_tokens",
                f"a prompt of {len(prompt)} tokens with {params.max_tokens} new ones needs more "
                f"than the {self._pages} pages of {self._page_size} tokens that there are; "
                f"engine.num_pages={-(-length // self._page_size) * len(self._scheduler.pools)} "
                "would work.",
            )
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", "stop texts need a tokenizer, and this engine has none.")
        if params.experts and self._mesh.is_multi_process:
            raise RequestError(
                "experts",
                "experts are told only where one process has all of the mesh; experts=false "
                "would work.",
            )
        if self._inputs.bans(params, early=params.min_tokens > 0).all():
            name = "allowed_token_ids" if params.allowed_token_ids else "banned_token_ids"
            raise RequestError(
                name,
                f"{name} leaves no token that is neither banned nor an end; one such token would "
                "work.",
            )


def _logprobs(token: int, top: int, logprob, top_X, top_logprob_X) -> TokenLogprobs:
    pairs = zip(top_X[:top].tolist(), top_logprob_X[:top].tolist(), strict=True)
    return TokenLogprobs(token, float(logprob), tuple(pairs))


def _best(answers: list[Completion], n: int) -> list[Output]:
    """The n answers of highest mean log-probability, from the best."""
    best = sorted(answers, key=lambda answer: -answer.mean_logprob)[:n]
    scores = answers[0].prompt_logprobs
    answers[0].prompt_logprobs = None
    best[0].prompt_logprobs = scores
    for place, answer in enumerate(best):
        answer.choice = place
    return [answer.drain() for answer in best]
