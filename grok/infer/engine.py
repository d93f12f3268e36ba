"""The engine: requests in, tokens out, many at a time. B groups of devices, U chunks of a step, Q
tokens of a chunk."""

import dataclasses
import math
import traceback
from collections.abc import Generator, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer
from grok.errors import GrokError, RequestError
from grok.infer.programs import Programs, ProgramStore
from grok.infer.request import Completion, Limits, Output, Request, TokenLogprobs, best_outputs
from grok.infer.scheduler import Chunk, ScheduledStep, Scheduler, SequenceState
from grok.infer.shapes import EngineShapes
from grok.infer.slot_state import floats_of
from grok.infer.stats import EngineStats
from grok.infer.step import StepResult, clear_cache, forward_and_sample, score_prompt
from grok.infer.step_inputs import StepInputs
from grok.model.decoder import Decoder
from grok.model.flat import FlatModel, flat

DEFAULTS = EngineConfig()
NOT_FINITE = "the model's log-probabilities are not finite; its weights may be damaged"


@dataclasses.dataclass
class DispatchedStep:
    """A step that the devices have begun or will, and what the host is to fetch of it."""

    step: ScheduledStep
    result: StepResult
    has_top: bool  # some row asked for the likeliest tokens
    scored: list[tuple[Chunk, tuple[int, int]]]  # chunks of prompts to score
    scores: tuple[jax.Array, ...]


class Engine:
    """A model on its mesh, a paged cache, and the requests in flight. A request's tokens depend on
    it and its seed alone, never on its batch: prompts always go through one program and answers
    through another, and rows are computed independently. In float32 on CPU this holds to the bit;
    elsewhere a program may round a row differently by its position, which can flip near-ties.
    Another number of sequences, chunk size or mesh rounds differently.

    The devices are always a step ahead: tokens stay there as the next step's inputs, and the host
    looks at those of a step while the next one runs. One thread makes all calls; every process of
    the mesh makes the same ones in the same order, on which alone it depends what a step does."""

    def __init__(
        self,
        model: Decoder | FlatModel,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        options: EngineConfig = DEFAULTS,
        store: ProgramStore | None = None,
    ):
        """Makes the cache; sequences and pages are rounded up to a multiple of the groups. Without
        a tokenizer, completions have no text and end at their length or stop_token_ids. Programs
        are loaded from `store` and kept there."""
        self._model, self._tokenizer, self._mesh = flat(model), tokenizer, mesh
        config = model.config
        # Rows of the embedding table beyond the tokenizer's pieces have no text.
        self._num_pieces = config.vocab_size if tokenizer is None else tokenizer.vocab_size
        with jax.set_mesh(mesh):
            shapes = EngineShapes.of(config, options)
            self._inputs = StepInputs(config, tokenizer, shapes)
            self._run = Programs(store, mesh, shapes)
            self._cache = self._run(jax.jit(shapes.init_cache))
            self._slots = self._run(jax.jit(shapes.init_slots), self._inputs.unused_W)
        self._limits = Limits(
            config.vocab_size, config.context_length, shapes.layout, shapes.pages, shapes.groups
        )
        self._scheduler = Scheduler(shapes.groups, shapes.slots, shapes.pages, shapes.layout)
        self._dispatched: DispatchedStep | None = None
        self._requests: dict[str, list[SequenceState]] = {}  # in flight
        self._cancelled: list[Output] = []
        self._running = self._tokens_in = self._tokens_out = 0

    @property
    def unfinished(self) -> int:
        """Completions whose last Output is still to come."""
        return self._running + len(self._cancelled)

    @property
    def stats(self) -> EngineStats:
        """Counts of tokens, sequences and pages."""
        used, cached, free = self._scheduler.page_counts()
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
        """Queues a request. Raises RequestError where it could never be run. After any error the
        engine is as it was."""
        self._check(request)
        params, sequences = request.params, []
        for choice in range(params.best_of or params.n):
            completion = Completion(request, choice, self._tokenizer)
            no_prefix_reuse = choice == 0 and params.prompt_logprobs is not None
            sequences.append(SequenceState(completion, list(request.prompt), no_prefix_reuse))
        self._requests[request.id] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._running += len(sequences)

    def cancel(self, request_id: str) -> None:
        """Ends a request and frees its pages at once; unknown ids are ignored."""
        self._cancelled += self._end(request_id)

    def step(self) -> list[Output]:
        """Dispatches the next step to the devices, a prefill or a decode, and returns what is new
        by the one before, which they have finished then. What fails on the devices is raised by the
        call that would return it."""
        outputs, self._cancelled = self._cancelled, []
        finished, self._dispatched = self._dispatched, None
        if (step := self._scheduler.next_step()) is not None:
            self._dispatched = self._dispatch(step)
        if finished is not None:
            outputs += self._collect(finished)
        return outputs

    def generate(self, requests: Iterable[Request]) -> Generator[Output, None, None]:
        """Runs requests to their ends, beside whatever else is in flight; closed early, ends those
        that still run. Raises RequestError where one could never be run, and then runs none, and
        GrokError where one fails."""
        submitted = []
        try:
            for request in requests:
                self.submit(request)
                submitted.append(request.id)
            while self.unfinished:
                for output in self.step():
                    if output.error is not None:
                        raise GrokError(f"{output.error}.")
                    yield output
        finally:
            for request_id in submitted:
                self._end(request_id)

    def warm_up(self) -> None:
        """Answers once, so that all programs are compiled before anyone waits for them: those of
        steps, of a prompt's scores, and of penalties, biases and bans."""
        params = SamplingParams(
            max_tokens=2,
            min_tokens=1,
            ignore_eos=True,
            presence_penalty=1.0,
            logit_bias={0: 1.0},
            prompt_logprobs=0,
        )
        list(self.generate([Request("warm-up", (0,), params)]))

    def _end(self, request_id: str, error: str | None = None) -> list[Output]:
        sequences = self._requests.pop(request_id, [])
        ended = [s for s in sequences if s.completion.finish_reason is None]
        for sequence in ended:
            self._scheduler.remove(sequence)
        self._running -= len(ended)
        if sequences and len(sequences) > (n := sequences[0].request.params.n):
            ended = sequences[:n]  # best_of: none was returned yet
        for sequence in sequences:
            sequence.completion.cut_short(error)
        return [sequence.completion.drain() for sequence in ended]

    def _dispatch(self, step: ScheduledStep) -> DispatchedStep:
        inputs, scored, scores = self._inputs, [], ()
        with jax.set_mesh(self._mesh):
            for update, slot, row in inputs.slot_updates(step):
                self._slots = self._run(update, self._slots, *slot, row)
            result, self._cache, self._slots = self._run(
                forward_and_sample, self._model, self._cache, self._slots, inputs.words(step)
            )
            if step.prefill:
                scored = [pair for pair in step.chunks() if pair[0].sequence.no_prefix_reuse]
            if scored:
                arrays = result.x_BTD, inputs.targets(step, scored)
                scores, self._slots = self._run(score_prompt, self._model, self._slots, *arrays)
            for chunk, _ in scored:
                # After a preemption the prompt may reuse pages, and is not scored twice.
                ended = chunk.start + chunk.count == chunk.sequence.prompt_length
                chunk.sequence.no_prefix_reuse = not ended
        has_top = any(chunk.sequence.request.params.logprobs for chunk, _ in step.chunks())
        for array in (result.sampled_BU2, *([result.top_BU2X] if has_top else []), *scores):
            array.copy_to_host_async()
        return DispatchedStep(step, result, has_top, scored, scores)

    def _collect(self, dispatched: DispatchedStep) -> list[Output]:
        """Outputs of a step that was dispatched, once the devices have finished it."""
        step, result = dispatched.step, dispatched.result
        sampled_BU2, experts_LBTC, outputs = np.asarray(result.sampled_BU2), None, []
        top_BU2X = np.asarray(result.top_BU2X if dispatched.has_top else ())
        tokens, logprobs = sampled_BU2[..., 0].tolist(), floats_of(sampled_BU2[..., 1]).tolist()
        self._add_scores(dispatched)
        for chunk, (b, u) in step.chunks():
            sequence, end = chunk.sequence, chunk.start + chunk.count
            params = sequence.request.params
            # One that ended after this step was dispatched, a prompt's first chunks, or a token
            # that is computed again after a preemption.
            if sequence.completion.finish_reason is not None or end < len(sequence.tokens):
                continue
            assert end == len(sequence.tokens)
            if params.experts and not step.prefill:
                if experts_LBTC is None:
                    experts_LBTC = np.asarray(result.experts_LBTC)
                sequence.completion.experts.append(experts_LBTC[:, b, u].tolist())
            new = tokens[b][u], logprobs[b][u]
            token = TokenLogprobs(*new)
            if params.logprobs:
                top_X, words_X = top_BU2X[b, u]
                token = self._logprobs(*new, params.logprobs, top_X, floats_of(words_X))
            outputs += self._append_token(sequence, token)
        return outputs

    def _add_scores(self, dispatched: DispatchedStep) -> None:
        """Gives the scored prompts their log-probabilities."""
        scores = [np.asarray(array) for array in dispatched.scores]
        for chunk, row in dispatched.scored:
            sequence, request = chunk.sequence, chunk.sequence.request
            top = request.params.prompt_logprobs or 0
            if chunk.start == 0:
                sequence.prompt_logprobs = [None]
            targets = slice(chunk.start + 1, chunk.start + 1 + chunk.count)
            for q, token in enumerate(request.prompt[targets]):
                logprob, *top_2X = (array[*row, q] for array in scores)
                logprobs = self._logprobs(token, float(logprob), top, *top_2X)
                sequence.prompt_logprobs.append(logprobs)
            if len(sequence.prompt_logprobs) == sequence.prompt_length:
                sequence.completion.prompt_logprobs = tuple(sequence.prompt_logprobs)

    def _append_token(self, sequence: SequenceState, token: TokenLogprobs) -> list[Output]:
        """Gives a sequence its new token; returns what is new of its request. An error in that is
        the request's alone: it ends, and all others go on."""
        completion, params = sequence.completion, sequence.request.params
        if len(sequence.tokens) == sequence.prompt_length and completion.choice == 0:
            self._tokens_in += sequence.prompt_length
        try:
            self._add_token(sequence, token)
        except Exception as error:
            traceback.print_exception(error)
            return self._end(sequence.request.id, str(error) or type(error).__name__)
        sequences = self._requests[sequence.request.id]
        running = True
        if completion.finish_reason is not None:
            self._running -= 1
            self._scheduler.remove(sequence)
            running = any(s.completion.finish_reason is None for s in sequences)
            if not running:
                del self._requests[sequence.request.id]
        if len(sequences) == params.n:
            return [completion.drain()]
        return [] if running else best_outputs([s.completion for s in sequences], params.n)

    def _add_token(self, sequence: SequenceState, token: TokenLogprobs) -> None:
        completion = sequence.completion
        scores = (entry.logprob for entry in completion.prompt_logprobs or () if entry)
        if not all(map(math.isfinite, (token.logprob, *scores))):
            # Pages with what is no number would pass that on to whoever gets them next.
            self._scheduler.preempt_all()
            with jax.set_mesh(self._mesh):
                self._cache = clear_cache(self._cache)
            raise GrokError(NOT_FINITE)
        if sequence.request.params.max_tokens == 0:  # the prompt's log-probabilities alone
            completion.finish("length")
            return
        completion.add(token)
        sequence.tokens.append(token.token)
        self._tokens_out += 1

    def _logprobs(self, token: int, logprob: float, top: int, top_X, values_X) -> TokenLogprobs:
        pairs = zip(top_X.tolist(), values_X.tolist(), strict=True)
        pieces = [(top_token, value) for top_token, value in pairs if top_token < self._num_pieces]
        return TokenLogprobs(token, logprob, tuple(pieces[:top]))

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
            problem = "experts need one process with all devices of the mesh"
            raise RequestError("experts", f"{problem}; experts=false would work.")
        self._inputs.check_bans(params)
