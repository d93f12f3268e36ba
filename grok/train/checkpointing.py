"""Checkpoints of a run: the trees they hold, the files beside them, and how a run resumes."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax

from grok import distributed, storage
from grok.checkpoint.manager import EMA, LORA, MODEL, OPTIMIZER, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import RunConfig
from grok.config.load import flatten, to_dict
from grok.config.paths import is_same_path, with_absolute_paths
from grok.config.text import to_yaml
from grok.data.tokenizers.files import TEMPLATE_FILE, read_tokenizer_files
from grok.errors import CheckpointError
from grok.model.params import is_adapter, tensor_specs
from grok.optim.param_groups import combine, partition
from grok.train.bad_steps import Skipped
from grok.train.run_data import check_unchanged
from grok.train.state import TrainState, abstract_state, init_state, start_state

# Keys whose values name files: a run may be started from another folder.
PATHS = (
    *("folder", "compile_cache", "train.init_from", "data.train", "data.validation"),
    *("data.validation_dataset", "data.domains", "data.tokenizer", "data.datasets"),
    "train.eval_tasks_folder",
)

if TYPE_CHECKING:
    from grok.train.loop import Run


def open_checkpoints(config: RunConfig) -> Checkpoints:
    """The checkpoints of a run, to save as its config says."""
    c = config.checkpoint
    policy = RetentionPolicy(c.keep, c.keep_every, c.keep_best, c.best_metric)
    return Checkpoints(storage.join(config.folder, "checkpoints"), policy)


def write_run_files(config: RunConfig, template: bytes | None, is_new: bool = True) -> None:
    """Writes into a run's folder its config, and in a new run the tokenizer and the chat template,
    so that the folder alone can be sampled from. Process 0 does, for all."""
    if not distributed.is_primary():
        return
    files = {"config.yaml": to_yaml(with_absolute_paths(config)).encode()}
    if is_new:
        files |= read_tokenizer_files(config.data.tokenizer).contents()
        if template is not None:
            files[TEMPLATE_FILE] = template
    for name, data in files.items():
        with storage.errors(config.folder, CheckpointError, f"{name} cannot be written"):
            storage.write_bytes(storage.join(config.folder, name), data)


def save(run: "Run", step: int, state: TrainState, losses: dict, skipped: Skipped = ()) -> None:
    """Starts saving all that a resumed run needs; `losses`: of a validation pass, or {}."""
    config, initial = run.config, run.initial
    meta = run_meta(config, run.data.hashes, initial.identity if initial else None, skipped)
    specs = tensor_specs(config.model, config.lora)
    run.checkpoints.save(step, state_trees(state), meta, losses, specs)


def run_meta(
    config: RunConfig,
    hashes: list[dict[str, str]],
    initial: dict[str, str] | None,
    skipped: Skipped = (),
) -> dict[str, Any]:
    """The plain data of a checkpoint: the config, the prepared datasets, the identity of the
    weights that the run started from, if any, and the batches that were skipped."""
    meta = {"config": to_dict(config), "data": hashes, "skipped_batches": skipped}
    return meta if initial is None else meta | {"init_from": initial}


def state_trees(state: TrainState) -> dict:
    """The state as the trees of a checkpoint; of a model with adapters, only the adapters."""
    adapters, _ = partition(state.model, functools.partial(is_adapter, state.model.config))
    trees = {LORA: adapters} if jax.tree.leaves(adapters) else {MODEL: state.model}
    trees |= {OPTIMIZER: (state.step, state.opt_state, state.guard)}
    return trees if state.ema is None else trees | {EMA: state.ema}


def restore(run: "Run", step: int) -> tuple[TrainState, Skipped, list[str]]:
    """Returns the state saved at `step`, on the run's mesh, the batches skipped until then, and the
    config keys that have changed since. Raises CheckpointError when other tensors are trained,
    naming the key, or when prepared datasets have changed without data.allow_data_change."""
    checkpoints, config = run.checkpoints, run.config
    meta = checkpoints.meta(step)
    if not config.data.allow_data_change:
        check_unchanged(meta.get("data", []), run.data.hashes, checkpoints.path(step))
    saved_config = dict(flatten(meta["config"]))
    changes = config_changes(saved_config, config, checkpoints.path(step))
    abstract = abstract_state(config, run.optimizer, run.mesh)
    is_ema_new = abstract.ema is not None and not saved_config.get("optimizer.ema_decay")
    if is_ema_new:
        abstract = dataclasses.replace(abstract, ema=None)
    trees = checkpoints.restore(step, state_trees(abstract))
    if LORA in trees:
        assert run.initial is not None
        base = init_state(config, run.optimizer, run.mesh, run.initial.load(run.mesh)).model
        trees[MODEL] = combine(trees[LORA], base)
    if is_ema_new:
        trees[EMA] = start_state(config, run.optimizer, trees[MODEL]).ema
    steps_done, opt_state, guard = trees[OPTIMIZER]
    state = TrainState(steps_done, trees[MODEL], opt_state, guard, trees.get(EMA))
    skipped = tuple((first, last) for first, last in meta.get("skipped_batches", []))
    return state, skipped, changes


def config_changes(saved: dict[str, Any], config: RunConfig, checkpoint: str) -> list[str]:
    """Lists changed keys, `KEY from OLD to NEW`; CheckpointError for one that may not change."""
    changes = []
    for key, value in flatten(to_dict(config)):
        if saved.get(key) == value or (key in PATHS and is_same_path(saved.get(key), value)):
            continue
        if not is_compatible_change(key, saved.get(key), value):
            raise CheckpointError(
                f"{checkpoint} was trained with {key}={saved.get(key)} and the config says "
                f"{value}; set it back, or name another folder."
            )
        changes.append(f"{key} from {saved.get(key)} to {value}")
    return changes


def check_optimizer_unchanged(checkpoints: Checkpoints, step: int, config: RunConfig) -> None:
    """Raises CheckpointError where keys of the optimizer are others than when the checkpoint of
    `step` was saved: the rest of the run would be one with another learning rate."""
    saved = dict(flatten(checkpoints.meta(step)["config"]))
    for key, value in flatten(to_dict(config)):
        if not key.startswith("optimizer.") or key == "optimizer.offload":  # moves, and no more
            continue
        before = saved.get(key, value)
        if before != value and is_compatible_change(key, before, value):
            raise CheckpointError(
                f"{checkpoints.path(step)} was saved with {key}={before}, and the config says "
                f"{value}; --resume goes on with that, folder=NEW begins another run, and "
                f"{key}={before} goes on as before."
            )


def is_compatible_change(key: str, before: Any, now: Any) -> bool:
    """True if a run with the new value saves the same tensors, so that it can resume."""
    if key == "optimizer.param_groups":
        frozen, frozen_now = (
            [group["match"] for group in groups or () if group["frozen"]]
            for groups in (before, now)
        )
        return frozen == frozen_now
    if key == "optimizer.beta1":
        return bool(before) == bool(now)
    if key == "optimizer.name" or key.startswith("lora."):
        return False
    if key.startswith("model."):
        return key in ("model.compute_dtype", "model.matmul_dtype", "model.remat")
    return True
