"""The weights that a run starts from: train.init_from. A resumed run reads them again only if it
trains adapters, since its checkpoints hold no more."""

import dataclasses
import os

from jax.sharding import Mesh

from grok import distributed, storage
from grok.checkpoint.manager import Checkpoints
from grok.config import ModelConfig, RunConfig
from grok.errors import CheckpointError
from grok.model.decoder import Decoder
from grok.progress import byte_progress
from grok.weights.cast import converted
from grok.weights.checksums import sample_checksum
from grok.weights.detect import open_source, stated_config
from grok.weights.load import put_on_mesh
from grok.weights.source import Source
from grok.weights.tools.verify import config_values, differing_key


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from: their `identity` (path, format, checksum) for the meta of
    checkpoints, and their `source`, None in a resumed run that does not read them."""

    identity: dict[str, str]
    source: Source | None = None

    def load(self, mesh: Mesh) -> Decoder:
        """The model with these weights in its `param_dtype`, read by all processes together; shows
        progress."""
        assert self.source is not None
        weights = converted(self.source, self.source.config.param_dtype)
        with byte_progress(quiet=not distributed.is_primary()) as on_progress:
            return put_on_mesh(weights, mesh, on_progress)


def initial_weights(config: RunConfig, checkpoints: Checkpoints) -> InitialWeights | None:
    """Returns the weights that the run starts or has started from; None: initialised from its seed.
    Raises CheckpointError as `open_initial` does, when adapters belong to other weights, and when
    the folder is an import's, whose weights would not be used."""
    newest, path = checkpoints.latest(), config.train.init_from
    if newest == 0:
        raise CheckpointError(
            f"{config.folder} holds imported weights, and a run starts in a folder of its own; "
            f"train.init_from={config.folder} with another folder would work."
        )
    if newest is None:
        return open_initial(path, config.model) if path else None
    identity = checkpoints.meta(newest).get("init_from")
    if not identity or not config.lora.rank:
        return InitialWeights(identity) if identity else None
    # The base of the adapters, which may have moved meanwhile.
    base = open_initial(path, config.model)
    if base.identity["checksum"] != identity["checksum"]:
        raise CheckpointError(
            f"{checkpoints.folder}/{newest} has adapters of the weights that were at "
            f"{identity['path']}, and train.init_from={path} holds others; the same would work."
        )
    return base


def open_initial(path: str, model: ModelConfig) -> InitialWeights:
    """Opens the weights at `path`, in any format, local, at gs:// or by name on the hub, where all
    processes take the same commit, and reads a small sample. Raises CheckpointError as
    `open_source` does, and naming the field in which `model` differs."""
    path = distributed.broadcast_from_primary(lambda: storage.pinned(path, CheckpointError))
    stated = stated_config(path)
    key = differing_key(stated, model) if stated else None
    if stated and key:
        theirs, ours = config_values(stated).get(key), config_values(model).get(key)
        raise CheckpointError(
            f"train.init_from={path} holds a model with {key}={theirs}, and the config says "
            f"model.{key}={ours}; model.{key}={theirs} would work."
        )
    source = open_source(path, model)
    location = path if storage.is_remote(path) else os.path.abspath(path)
    identity = {"path": location, "format": source.format, "checksum": sample_checksum(source)}
    return InitialWeights(identity, source)
