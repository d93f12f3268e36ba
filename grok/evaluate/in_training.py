"""Tasks of lm-eval that a training run is scored on as it goes: `train.eval_tasks`."""

from collections.abc import Callable

from jax.sharding import Mesh

from grok.config import RunConfig
from grok.data.tokenizers import load_tokenizer
from grok.errors import ConfigError, require_package
from grok.model.decoder import Decoder


def open_tasks(config: RunConfig, mesh: Mesh) -> Callable[[Decoder], dict[str, float]]:
    """Loads the tasks that the config names, and returns what scores a model on them: the metrics,
    by names such as `tasks/arc_easy/acc`. Raises ConfigError and DataError where they cannot be
    had, or would need generation, for which a model in training has no room."""
    train = config.train
    require_package("lm_eval", f"train.eval_tasks={list(train.eval_tasks)}", "eval")
    from grok.evaluate.harness import LmEvalModel, Tasks

    limit = train.eval_tasks_limit or None
    tasks = Tasks(train.eval_tasks, train.eval_tasks_folder, limit=limit)
    if tasks.generating:
        problem = f"train.eval_tasks has {tasks.generating[0]}, which needs generated text"
        right = "`grok eval --tasks` on checkpoints, or a task that scores texts, would work"
        raise ConfigError(f"{problem}; {right}.")
    tokenizer = load_tokenizer(config.data.tokenizer)
    harness: LmEvalModel | None = None

    def score(model: Decoder) -> dict[str, float]:
        nonlocal harness
        harness = harness or LmEvalModel(model, tokenizer, mesh, config.data.batch_size)
        harness.scorer.model = model
        return {
            f"tasks/{task}/{name.removesuffix(',none')}": float(value)
            for task, metrics in tasks.run(harness).items()
            for name, value in metrics.items()
            if isinstance(value, float) and "_stderr" not in name
        }

    return score
