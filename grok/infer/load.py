"""From a run's folder to a model that can be asked."""

import math
from pathlib import Path

import jax
from jax.sharding import Mesh

from grok import sharding
from grok.checkpoint.manager import MODEL, Checkpoints
from grok.config import RunConfig, check_model_fits, resolve_mesh
from grok.data.tokenizer import Tokenizer
from grok.errors import CheckpointError
from grok.model.grok import Grok

ONE_DEVICE = ("mesh.slice=1", "mesh.data=1", "mesh.expert=1", "mesh.tensor=1")


def config_file(folder: Path) -> Path:
    """The config that a run wrote into its folder; CheckpointError where there is none."""
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} is not the folder of a run (it has no config.yaml); "
            "`grok train` and `grok quickstart` make one."
        )
    return folder / "config.yaml"


def make_run_mesh(config: RunConfig) -> Mesh:
    """The mesh that `config` asks for, on as many devices as it needs of those there are."""
    mesh = config.mesh
    sizes = {"slice": mesh.slice, "data": mesh.data, "expert": mesh.expert, "tensor": mesh.tensor}
    devices = jax.devices()
    if -1 not in sizes.values():
        devices = devices[: math.prod(sizes.values())]
    resolve_mesh(mesh, len(devices), config.model)
    return sharding.make_mesh(mesh.data, mesh.expert, mesh.tensor, mesh.slice, devices)


def load_run(folder: Path, config: RunConfig, mesh: Mesh) -> tuple[Grok, Tokenizer]:
    """Parameters of the run's newest checkpoint, placed on `mesh`, and its tokenizer.

    Raises CheckpointError when there is no checkpoint or it is of another model.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    newest = checkpoints.latest()
    if newest is None:
        raise CheckpointError(
            f"{folder} has no finished checkpoint yet; one is saved every "
            f"{config.checkpoint.every} steps (checkpoint.every)."
        )
    check_model_fits(config.model, dict(mesh.shape))
    wanted = sharding.abstract(lambda: Grok(config.model, jax.random.key(0)), mesh)
    model = checkpoints.restore(newest, {MODEL: wanted})[MODEL]
    checkpoints.close()
    return model, Tokenizer.load(folder / "tokenizer.model")
