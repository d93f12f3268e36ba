"""A model behind the interface of lm-eval, an extra: only `grok eval --tasks` imports this file."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from grok.config import EngineConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer, encode_prompt, start_ids
from grok.errors import DataError
from grok.evaluate.scores import Scorer
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model.decoder import Decoder

FEWSHOT_SEED = 1234  # lm-eval's own default
GENERATES = "generate_until"  # an output type
BOOTSTRAP_ITERS = 1000


class LmEvalModel(TemplateLM):
    """A model, its tokenizer and its mesh, answering lm-eval's three kinds of request."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, mesh: Mesh, rows: int):
        super().__init__()
        self.scorer = Scorer(model, mesh, rows)
        self._mesh, self._tokenizer = mesh, tokenizer

    @functools.cached_property
    def _engine(self) -> Engine:
        # Its pages take memory, and many tasks only score.
        rows = EngineConfig(max_num_seqs=self.scorer.rows)
        return Engine(self.scorer.model, self._tokenizer, self._mesh, rows)

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context: bos, for a model that expects it."""
        return next(iter(start_ids(self._tokenizer)), self._tokenizer.eos_id)

    def tok_encode(self, string: str, add_special_tokens=None, **others: Any) -> list[int]:
        """Ids of a text, with bos in front where the tokenizer adds it, unless told not to."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string)
        return encode_prompt(self._tokenizer, string)

    def _loglikelihood_tokens(self, requests, **others: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(score.log_probability, score.is_greedy) for score in self.scorer.score(pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once, in windows of the context."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.scorer.context_length,
                context_len=1,
            )
            scores = self.scorer.score([make_disjoint_window(window) for window in windows])
            totals.append(sum(score.log_probability for score in scores))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its `until` texts."""
        prompts = [self._request(str(i), *request.args) for i, request in enumerate(requests)]
        texts = [""] * len(prompts)
        for output in self._engine.generate(prompts):
            texts[int(output.request_id)] += output.text
        return texts

    def _request(self, name: str, context: str, options: dict[str, Any]) -> Request:
        limit, length = int(options.get("max_gen_toks", 256)), self.scorer.context_length
        # A task made for longer contexts leaves the prompt half of this one.
        limit = limit if limit < length else length // 2
        room = length - limit
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        until = options.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(filter(None, until))
        params = SamplingParams(max_tokens=limit, temperature=0, stop=stop)
        return Request(name, tuple(prompt), params)


class Tasks:
    """Tasks of lm-eval, its own or of YAML files in `folder`, ready to be run on models."""

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path | None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ):
        """Loads the data of the tasks; `limit` is the number of examples of each. Raises DataError
        for an unknown task, and for data that cannot be had."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = TaskManager(include_path=str(folder) if folder else None)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            where = f", nor has {folder}" if folder else "; a folder of tasks adds others"
            raise DataError(f"lm-eval has no task {unknown[0]}{where}.")
        try:
            self._loaded = manager.load(list(names))
        except Exception as error:  # whatever the code of a task or of its dataset raises
            problem = str(error).partition("\n")[0].rstrip(".")
            raise DataError(f"the tasks {', '.join(names)} cannot be loaded: {problem}.") from error
        self._limit = limit
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    @property
    def generating(self) -> list[str]:
        """Names of the tasks for which a model writes text, where others score texts."""
        tasks = self._loaded["tasks"].items()
        return [name for name, task in tasks if task.get_config("output_type") == GENERATES]

    def run(self, model: LmEvalModel) -> dict[str, dict[str, Any]]:
        """The results of a model, by task and group of tasks: metrics by name."""
        results = evaluate(
            lm=model,
            task_dict=self._loaded,
            limit=self._limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )
        return {name: dict(metrics) for name, metrics in results["results"].items()}
