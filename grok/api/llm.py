"""A language model in Python: completions, conversations and log-probabilities, by the engine of
`grok sample` and `grok serve`."""

import collections
import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grok.api.devices import prepare_devices
from grok.config import MESH_AXES
from grok.config.infer import InferConfig
from grok.config.load import from_dict
from grok.config.sampling import SamplingParams
from grok.errors import ConfigError, EngineError, GrokError, RequestError
from grok.infer.engine import Engine
from grok.infer.loader import ServedModel
from grok.infer.openai.requests import CompletionRequest
from grok.infer.openai.responses import LeadStripper
from grok.infer.request import Output, Request, TokenLogprobs, submit_all, with_answer_ends

LOGGER = logging.getLogger("grok")
ONE_DEVICE = {**dict.fromkeys(MESH_AXES, 1), "simulated_devices": 0}

Prompts = str | Iterable[str] | Iterable[int] | Iterable[Sequence[int]]
Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """A completion, or what is new of one in a stream. Completion c of prompt p has the `index`
    p*n + c. `token_ids` leave out the token that ended it. `finish_reason` is "stop" or "length",
    and None in a stream until the end. The others are there if SamplingParams asks for them:
    `logprobs` of each token, `prompt_logprobs` (None for the first token; completion 0 of a prompt
    has them), and `experts`, for each token a list over layers of lists of experts; those of the
    last token may be missing."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    experts: tuple[list[list[int]], ...] | None = None


@dataclasses.dataclass(frozen=True)
class TextScore:
    """A text's tokens and the log-probability of each after those before it, in nats; None for the
    first, which follows nothing: bos, where the tokenizer adds it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """Log-probability of all tokens after the first, nats."""
        return sum(value for value in self.logprobs if value is not None)


class LLM:
    """A model with its tokenizer and chat template, ready to answer. `model` is the decoder itself,
    `tokenizer` and `mesh` are what it runs with."""

    def __init__(self, weights: str | os.PathLike[str], **settings: Any):
        """Reads `weights`: the folder of a run (its newest checkpoint), of an import, a `ckpt-0`, a
        Hugging Face folder, or hf://ORG/NAME.

        `settings` are keys that `grok serve` has for a model, such as `param_dtype="int8"`,
        `chat_template="grok-1"`, `tokenizer=PATH`, `engine={"max_num_seqs": 32}`; defaults for
        requests are in `sampling={...}`. One device is used unless `mesh` says otherwise, as in
        `mesh={"tensor": 4}`. Raises ConfigError, DataError and CheckpointError for what cannot
        work, before weights are read."""
        config = _infer_config(os.fspath(weights), settings)
        prepare_devices(config.mesh.simulated_devices)
        served = ServedModel(config)
        for notice in served.notices:
            LOGGER.warning(notice)
        self.tokenizer, self.mesh, self._settings = served.tokenizer, served.mesh, config.engine
        self._parser = served.parser(max_choices=sys.maxsize)
        self.model = served.load(LOGGER.info)
        self._engine: Engine | None = None
        self._inboxes: dict[str, collections.deque[Output]] = {}
        self._numbers = itertools.count()

    def generate(
        self, prompts: Prompts, params: SamplingParams | None = None
    ) -> list[CompletionOutput]:
        """The completions of each prompt, a text or a list of token ids, in order: `params.n` for
        each. All run together; each prompt draws by a seed of its own, the first by `params.seed`,
        so the tokens are those of `grok sample`. Without `params` the defaults hold, and the answer
        may end earlier where the context does. Raises RequestError for a request that cannot run.
        """
        return _joined(self.stream(prompts, params))

    def stream(
        self, prompts: Prompts, params: SamplingParams | None = None
    ) -> Iterator[CompletionOutput]:
        """The same as it grows: what is new of a completion, token by token. Closed early, it ends
        those that still run. Other calls may be made meanwhile, by the same thread."""
        if not (body := _body(prompts))["prompt"] and prompts != "":
            return iter(())
        request = self._parser.completion(body)
        return self._run(request, params or request.params)

    def chat(
        self, messages: Messages | Sequence[Messages], params: SamplingParams | None = None
    ) -> list[CompletionOutput]:
        """The next messages of the assistant, `params.n` of them, in a conversation: a list of
        messages, each with `role` and `content`, which the chat template writes. Several
        conversations, in a list, are answered together. Raises ConfigError without a template, and
        RequestError."""
        return _joined(self.stream_chat(messages, params))

    def stream_chat(
        self, messages: Messages | Sequence[Messages], params: SamplingParams | None = None
    ) -> Iterator[CompletionOutput]:
        """The same as it grows: see `stream`."""
        encoder = self._parser.chat_encoder
        if encoder is None:
            problem = "a chat needs a template, and there is none beside the tokenizer"
            raise ConfigError(f"{problem}; grok.LLM(..., chat_template='grok-1') would work.")
        is_one = isinstance(next(iter(messages), {}), Mapping)
        bodies = [
            {"messages": conversation} for conversation in ([messages] if is_one else messages)
        ]
        parsed = [self._parser.chat(body) for body in bodies]
        prompts = tuple(request.prompts[0] for request in parsed)
        texts = tuple(request.texts[0] for request in parsed)
        if params is None:  # the default, and so many tokens as the longest conversation leaves
            params = min((request.params for request in parsed), key=lambda p: p.max_tokens)
        request = dataclasses.replace(parsed[0], prompts=prompts, texts=texts)
        return self._run(request, with_answer_ends(params, encoder.answers))

    def score(self, texts: Prompts) -> list[TextScore]:
        """The log-probability of each token of each text, or list of token ids, in order."""
        if not (body := _body(texts))["prompt"] and texts != "":
            return []
        request = self._parser.completion({**body, "max_tokens": 0, "echo": True})
        outputs = _joined(self._run(request, request.params))
        return [
            TextScore(
                prompt, tuple(None if t is None else t.logprob for t in output.prompt_logprobs)
            )
            for prompt, output in zip(request.prompts, outputs, strict=True)
            if output.prompt_logprobs is not None
        ]

    def _run(
        self, request: CompletionRequest, params: SamplingParams
    ) -> Iterator[CompletionOutput]:
        if not isinstance(params, SamplingParams):
            kind = type(params).__name__
            problem = f"params is a {kind}; one grok.SamplingParams for all prompts would work."
            raise RequestError("params", problem)
        request = dataclasses.replace(request, params=params, seeded=True)
        leads = LeadStripper(request.lead)
        for output in self._outputs(request.requests(f"llm-{next(self._numbers)}", params.seed)):
            prompt = int(output.request_id.rpartition("/")[2])
            index = prompt * params.n + output.choice
            output = leads.strip(index, output)
            yield CompletionOutput(
                index,
                output.text,
                output.token_ids,
                output.finish_reason,
                output.logprobs,
                output.prompt_logprobs,
                output.experts,
            )

    def _outputs(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Runs requests to their ends, beside those of other streams."""
        if self._engine is None:
            self._engine = Engine(self.model, self.tokenizer, self.mesh, self._settings)
        engine, inbox = self._engine, collections.deque[Output]()
        remaining = sum(request.params.n for request in requests)
        submit_all(engine, requests)
        self._inboxes |= {request.id: inbox for request in requests}
        try:
            while remaining:
                while not inbox:
                    self._step(engine)
                output = inbox.popleft()
                if output.error is not None:
                    raise GrokError(f"{output.error}.")
                remaining -= output.finish_reason is not None
                yield output
        finally:
            for request in requests:
                engine.cancel(request.id)
                del self._inboxes[request.id]

    def _step(self, engine: Engine) -> None:
        """A step of the engine, whose outputs go to the streams that they are of. An engine that is
        interrupted within one has lost its cache: the next call makes another."""
        if engine is not self._engine:
            raise EngineError("the engine was interrupted meanwhile; the same call would work.")
        try:
            outputs = engine.step()
        except Exception as error:
            self._engine = None
            raise EngineError(f"the engine broke down: {error}") from error
        except BaseException:
            self._engine = None
            raise
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)


def _infer_config(weights: str, settings: Mapping[str, Any]) -> InferConfig:
    """The checked settings, on one device unless their mesh says otherwise."""
    mesh = settings.get("mesh", {})
    mesh = {**ONE_DEVICE, **mesh} if isinstance(mesh, Mapping) else mesh
    data = {**settings, "weights": weights, "mesh": mesh}
    return from_dict(data, "grok.LLM", config_type=InferConfig)


def _body(prompts: Prompts) -> dict[str, Any]:
    """A body with these prompts, as the parser of requests takes them: lists, where they are any
    sequences."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        return {"prompt": prompts}
    return {"prompt": [list(item) if isinstance(item, tuple) else item for item in prompts]}


def _joined(stream: Iterable[CompletionOutput]) -> list[CompletionOutput]:
    """The whole completions of a stream, by index."""
    by_index: dict[int, list[CompletionOutput]] = {}
    for output in stream:
        by_index.setdefault(output.index, []).append(output)
    return [_whole(by_index[index]) for index in sorted(by_index)]


def _whole(outputs: Sequence[CompletionOutput]) -> CompletionOutput:
    def all_of(name: str) -> tuple | None:
        values = [value for o in outputs if (value := getattr(o, name)) is not None]
        return tuple(itertools.chain.from_iterable(values)) if values else None

    return dataclasses.replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=all_of("token_ids") or (),
        logprobs=all_of("logprobs"),
        prompt_logprobs=all_of("prompt_logprobs"),
        experts=all_of("experts"),
    )
