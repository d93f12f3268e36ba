"""What a checkpoint of a run holds, and how a run goes on from one."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from grok.checkpoint.manager import EMA, LORA, MODEL, OPTIMIZER, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import RunConfig
from grok.config.load import flatten, to_dict
from grok.errors import CheckpointError
from grok.model.lora import is_adapter
from grok.optim.param_groups import combine, partition
from grok.train.init_from import InitialWeights
from grok.train.rollback import Skipped
from grok.train.run_data import RunData, check_unchanged
from grok.train.state import TrainState, abstract_state, init_state, start_state


def save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    config: RunConfig,
    data: RunData,
    initial: InitialWeights | None,
    validated: dict[str, float],
    skipped: Skipped = (),
) -> None:
    """Starts saving everything a resumed run needs; batches are numbered by step, those `skipped`
    left out. `validated` is what a validation pass of this step measured, if there was one."""
    meta = {"config": to_dict(config), "data": data.hashes, "skipped_batches": skipped}
    if initial is not None:
        meta["init_from"] = initial.identity
    checkpoints.save(step, state_trees(state), meta, validated)


def retention_policy(config: RunConfig) -> RetentionPolicy:
    """Which checkpoints of the run stay."""
    asked = config.checkpoint
    return RetentionPolicy(asked.keep, asked.keep_every, asked.keep_best, asked.best_metric)


def skipped_batches(checkpoints: Checkpoints, step: int) -> Skipped:
    """What the run that saved `step` had left out until then."""
    stored = checkpoints.meta(step).get("skipped_batches", [])
    return tuple((first, last) for first, last in stored)


def state_trees(state: TrainState) -> dict:
    """The state as the trees of a checkpoint: of a model with adapters, those without the rest."""
    adapters, _ = partition(state.model, is_adapter)
    trees = {LORA: adapters} if jax.tree.leaves(adapters) else {MODEL: state.model}
    trees |= {OPTIMIZER: (state.step, state.opt_state, state.guard)}
    return trees if state.ema is None else trees | {EMA: state.ema}


def restore(
    checkpoints: Checkpoints,
    step: int,
    config: RunConfig,
    data: RunData,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    initial: InitialWeights | None,
) -> tuple[TrainState, list[str]]:
    """The state saved at `step`, placed on `mesh`, and what the config says differently now.

    Raises CheckpointError when other tensors are trained, naming what differs, or when prepared
    datasets are others than before and data.allow_data_change does not say that they may be.
    """
    meta = checkpoints.meta(step)
    if not config.data.allow_data_change:
        check_unchanged(meta.get("data", []), data.hashes, checkpoints.path(step))
    stored = dict(flatten(meta["config"]))
    changes = []
    for key, value in flatten(to_dict(config)):
        before = stored.get(key)
        if before == value:
            continue
        if not is_compatible_change(key, before, value):
            raise CheckpointError(
                f"{checkpoints.path(step)} was trained with {key}={before} and the config "
                f"says {value}; set it back, or name another folder."
            )
        changes.append(f"{key} from {before} to {value}")
    wanted = abstract_state(config, optimizer, mesh)
    new_ema = wanted.ema is not None and not stored.get("optimizer.ema_decay")
    if new_ema:
        wanted = dataclasses.replace(wanted, ema=None)
    read = checkpoints.restore(step, state_trees(wanted))
    if LORA in read:
        assert initial is not None
        base = init_state(config, optimizer, mesh, initial.load(mesh)).model
        read[MODEL] = combine(read[LORA], base)
    if new_ema:
        read[EMA] = start_state(config, optimizer, read[MODEL]).ema
    steps_done, opt_state, guard = read[OPTIMIZER]
    return TrainState(steps_done, read[MODEL], opt_state, guard, read.get(EMA)), changes


def is_compatible_change(key: str, before: Any, now: Any) -> bool:
    """Whether a run can go on with another value: one that saves the same tensors."""
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
        return key in ("model.compute_dtype", "model.remat")
    return True
