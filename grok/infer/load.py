"""From the folder of a run or an import to a model that can be asked."""

import math
from pathlib import Path

import jax
from jax.sharding import Mesh

from grok import sharding
from grok.config import RunConfig, resolve_mesh
from grok.data.tokenizers import Tokenizer, load_tokenizer
from grok.errors import CheckpointError
from grok.model.decoder import Grok
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.load import place

ONE_DEVICE = ("mesh.slice=1", "mesh.data=1", "mesh.expert=1", "mesh.tensor=1")


def config_file(folder: Path) -> Path:
    """The config that a run wrote into its folder; CheckpointError where there is none."""
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} is not the folder of a run (it has no config.yaml); "
            "`grok train`, `grok quickstart` and `grok import` make one."
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
    """Parameters of the newest checkpoint of a run or an import, on `mesh`, and its tokenizer.

    Matrices become what `config.model.param_dtype` says. Raises CheckpointError when there is no
    tokenizer or no checkpoint, or it is of another model.
    """
    source = open_source(folder, config.model)
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing; copy the tokenizer of these weights there. (`grok import` does it "
            "with --tokenizer.)"
        )
    tokenizer = load_tokenizer(file)
    return place(converted(source, config.model.param_dtype), mesh), tokenizer
