"""What a checkpoint of a run holds, and how a run goes on from one."""

from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.config import RunConfig
from grok.config_files import flatten, to_dict
from grok.errors import CheckpointError
from grok.train.data import RunData, check_unchanged
from grok.train.initial import InitialWeights
from grok.train.state import TrainState, abstract_state


def save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    config: RunConfig,
    data: RunData,
    initial: InitialWeights | None,
) -> None:
    """Starts saving everything a resumed run needs; batches are numbered by step."""
    trees = {MODEL: state.model, OPTIMIZER: (state.step, state.opt_state)}
    meta = {"config": to_dict(config), "data": data.hashes}
    if initial is not None:
        meta["init_from"] = initial.identity
    checkpoints.save(step, trees, meta)


def restore(
    checkpoints: Checkpoints, step: int, config: RunConfig, data: RunData, optimizer, mesh
) -> tuple[TrainState, list[str]]:
    """The state saved at `step`, placed on `mesh`, and what the config says differently now.

    Raises CheckpointError when the model is another one, naming what differs, or when prepared
    datasets are others than before and data.allow_changed does not say that they may be.
    """
    meta = checkpoints.meta(step)
    if not config.data.allow_changed:
        check_unchanged(meta.get("data", []), data.hashes, str(checkpoints.folder / str(step)))
    stored = dict(flatten(meta["config"]))
    changes = []
    for key, value in flatten(to_dict(config)):
        before = stored.get(key)
        if before == value:
            continue
        if key.startswith("model.") and key not in ("model.compute_dtype", "model.remat"):
            raise CheckpointError(
                f"{checkpoints.folder / str(step)} was trained with {key}={before} and the config "
                f"says {value}; set it back, or name another folder."
            )
        changes.append(f"{key} from {before} to {value}")
    wanted = abstract_state(config, optimizer, mesh)
    trees = {MODEL: wanted.model, OPTIMIZER: (wanted.step, wanted.opt_state)}
    read = checkpoints.restore(step, trees)
    steps_done, opt_state = read[OPTIMIZER]
    return TrainState(steps_done, read[MODEL], opt_state), changes
