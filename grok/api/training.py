"""The parts of a training run that a loop of one's own is made of. B rows, T tokens of a batch."""

from collections.abc import Iterator
from contextlib import nullcontext

import jax
import optax
from jax.sharding import Mesh

from grok import distributed, sharding
from grok.api.devices import prepare_devices
from grok.config import RunConfig, check_trainable
from grok.data.device_feed import global_batches
from grok.data.tokenizers import load_tokenizer
from grok.errors import ConfigError
from grok.model.mesh_fit import check_fits, check_matmul_dtype
from grok.model.params import tensor_specs
from grok.train import state as states
from grok.train.checkpointing import open_checkpoints, run_meta, state_trees, write_run_files
from grok.train.init_from import open_initial
from grok.train.run_data import chat_template, dataset_hashes, open_datasets, read_data
from grok.train.state import TrainState


def mesh_for(config: RunConfig) -> Mesh:
    """The mesh that `grok train` makes for this config, over all devices, simulated ones where the
    config says so. Raises ConfigError, with a value that would work, where it cannot be."""
    check_trainable(config)
    prepare_devices(config.mesh.simulated_devices)
    check_matmul_dtype(config.model, jax.devices()[0].device_kind)
    sizes = check_fits(config, jax.device_count())
    return sharding.make_mesh(sizes["data"], sizes["expert"], sizes["tensor"], sizes["slice"])


def init_state(
    config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step, on the mesh: with the weights at `train.init_from`, or else
    drawn from `train.seed`. Raises CheckpointError for weights that are not of `config.model`."""
    path = config.train.init_from
    model = open_initial(path, config.model).load(mesh) if path else None
    return states.init_state(config, optimizer, mesh, model)


def batches(config: RunConfig, mesh: Mesh, first_step: int = 0) -> Iterator[dict[str, jax.Array]]:
    """The batches of a run's steps after `first_step`, in order, up to `train.steps`: (B, T) arrays
    `tokens_BT`, `targets_BT`, `mask_BT` and, of packed rows, `segment_ids_BT` and `positions_BT`.
    They are made ahead, and depend on data, seed and step alone. Raises DataError."""
    steps = range(first_step, config.train.steps)
    return global_batches(read_data(config).train, mesh, steps, config.data.prefetch)


def save_checkpoint(config: RunConfig, state: TrainState) -> None:
    """Saves a run in `config.folder` as `grok train` does: a checkpoint of the step that `state` is
    at, the config, the tokenizer and the chat template of the data. The folder can be sampled from,
    served, exported, and gone on with by `grok train`. Raises ConfigError where the config names no
    folder, SaveError and CheckpointError."""
    if not config.folder:
        raise ConfigError("folder names none to save in; folder=runs/mine would work.")
    datasets = open_datasets(config, load_tokenizer(config.data.tokenizer))
    path = config.train.init_from
    initial = open_initial(path, config.model).identity if path else None
    meta = run_meta(config, dataset_hashes(datasets), initial)
    lock = distributed.hold_folder(config.folder) if distributed.is_primary() else nullcontext()
    with lock:
        write_run_files(config, chat_template(datasets.values()))
        checkpoints = open_checkpoints(config)
        specs = tensor_specs(config.model, config.lora)
        checkpoints.save(int(state.step), state_trees(state), meta, specs=specs)
        checkpoints.close()
