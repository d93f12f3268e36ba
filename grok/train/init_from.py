"""The weights that a run starts from, where its config names some with train.init_from.

They are read at step 0 of a fresh run alone; a run that resumes goes on from its own checkpoint.
(With adapters they are read again: its checkpoints hold the adapters alone.) What they were stays
in the meta of every checkpoint.
"""

import dataclasses
import os
from collections.abc import Callable

from jax.sharding import Mesh

from grok import storage
from grok.checkpoint.manager import Checkpoints
from grok.config import GrokConfig, RunConfig
from grok.errors import CheckpointError
from grok.model.decoder import Grok
from grok.weights.cast import converted
from grok.weights.checksums import sample_checksum
from grok.weights.detect import open_source, stated_config
from grok.weights.load import place
from grok.weights.source import Source
from grok.weights.tools.verify import differing_field


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Weights that a run started from, or is about to: `identity` (path, format, checksum) is what
    checkpoints keep of them, and `source` None where the run goes on from its own."""

    identity: dict[str, str]
    source: Source | None = None

    def load(self, mesh: Mesh, on_bytes: Callable[[int], None] | None = None) -> Grok:
        """The model with these weights in its `param_dtype`, each process reading what its own
        devices hold; int8 matrices are multiplied by their scales on the way."""
        assert self.source is not None
        return place(converted(self.source, self.source.config.param_dtype), mesh, on_bytes)


def initial_weights(config: RunConfig, checkpoints: Checkpoints) -> InitialWeights | None:
    """What the run in this folder starts from or has started from; None: from its seed.

    Raises CheckpointError as `open_initial` does, and where the folder is an import's, whose
    weights would not be used.
    """
    newest = checkpoints.latest()
    if newest:
        kept = checkpoints.meta(newest).get("init_from")
        if kept and config.lora.rank:
            return _reopen(kept, config, f"{checkpoints.folder}/{newest}")
        return InitialWeights(kept) if kept else None
    if newest == 0:
        raise CheckpointError(
            f"{config.folder} holds imported weights, and a run starts in a folder of its own; "
            f"train.init_from={config.folder} with another folder would work."
        )
    return open_initial(config.train.init_from, config.model) if config.train.init_from else None


def _reopen(kept: dict[str, str], config: RunConfig, checkpoint: str) -> InitialWeights:
    """The weights that adapters in a checkpoint belong to, which may have moved meanwhile."""
    found = open_initial(config.train.init_from, config.model)
    if found.identity["checksum"] != kept["checksum"]:
        raise CheckpointError(
            f"{checkpoint} has adapters of the weights that were at {kept['path']}, and "
            f"train.init_from={config.train.init_from} holds others; the same weights would work."
        )
    return found


def open_initial(path: str, model: GrokConfig) -> InitialWeights:
    """The weights at `path`, in any format that `open_source` knows, local or at gs://.

    Opening reads a small sample. Raises CheckpointError where they are of another model than
    `model`, naming what differs, and as `open_source` does.
    """
    stated = stated_config(path)
    field = stated and differing_field(stated, model)
    if field:
        theirs, ours = getattr(stated, field), getattr(model, field)
        raise CheckpointError(
            f"train.init_from={path} holds a model with {field}={theirs}, and the config says "
            f"model.{field}={ours}; model.{field}={theirs} would work."
        )
    source = open_source(path, model)
    where = path if storage.is_remote(path) else os.path.abspath(path)
    identity = {"path": where, "format": source.format, "checksum": sample_checksum(source)}
    return InitialWeights(identity, source)
