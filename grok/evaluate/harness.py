"""A model behind the interface of lm-eval, an extra: only `grok eval --tasks` imports this file."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
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


class LmEvalModel(TemplateLM):
    """A model, its tokenizer and its mesh, answering lm-eval's three kinds of request."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, mesh: Mesh, rows: int):
        super().__init__()
        self._scorer = Scorer(model, mesh, rows)
        self._engine = Engine(model, tokenizer, mesh, EngineConfig(max_num_seqs=rows))
        self._tokenizer = tokenizer

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
        return [(score.log_probability, score.is_greedy) for score in self._scorer.score(pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once, in windows of the context."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.context_length,
                context_len=1,
            )
            scores = self._scorer.score([make_disjoint_window(window) for window in windows])
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
        limit = int(options.get("max_gen_toks", 256))
        room = self._scorer.context_length - limit
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        until = options.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(filter(None, until))
        params = SamplingParams(max_tokens=limit, temperature=0, stop=stop)
        return Request(name, tuple(prompt), params)


def run_tasks(
    model: LmEvalModel,
    tasks: Sequence[str],
    folder: Path | None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """lm-eval's results on tasks of its own or of YAML files in `folder`, by task: metrics by name.
    `limit` is the number of examples of each task. Raises DataError for an unknown task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = f", nor has {folder}" if folder else "; --tasks-folder adds others"
        raise DataError(f"lm-eval has no task {unknown[0]}{where}.")
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
    )
    return {task: dict(metrics) for task, metrics in results["results"].items()}
