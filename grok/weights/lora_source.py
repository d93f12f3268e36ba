"""Checkpoints of LoRA runs as a source: the adapters merged into the run's initial weights.

Such a checkpoint holds only the adapters' factors (`lora/layers.attention.w_query_DNH.a`); its meta
has the path and checksum of the other weights.
"""

import numpy as np

from grok import storage
from grok.config import RunConfig
from grok.errors import CheckpointError
from grok.model.params import lora_targets, tensor_specs
from grok.ops.weights.lora import LoraArray, merge_adapter
from grok.weights.cast import converted
from grok.weights.checksums import sample_checksum
from grok.weights.orbax.metadata import LORA, read_tree
from grok.weights.orbax.source import ArrayTree
from grok.weights.source import Part, Source, TensorSpec


class LoraSource(Source):
    """`base` with the adapters of the checkpoint in the folder `step` added, all in float32.

    `run` is the run's config. Raises CheckpointError where `base` is other weights than those that
    the adapters were trained on, and as OrbaxSource does.
    """

    format = "orbax"

    def __init__(self, step: str, run: RunConfig, base: Source, checksum: str):
        if sample_checksum(base) != checksum:
            raise CheckpointError(
                f"{step}: has adapters of the weights that were at {base.path}, and others are "
                "there now; the same weights would work."
            )
        self.path, self.config = step, base.config
        self._base = converted(base, run.model.param_dtype)
        self._rank, self._scale = run.lora.rank, run.lora.scale
        folder = storage.join(step, LORA)
        self._arrays = ArrayTree(folder, read_tree(folder))
        self.tensors = {
            name: TensorSpec(spec.param, np.dtype(np.float32))
            for name, spec in base.tensors.items()
        }
        self._adapted = set(lora_targets(base.config, run.lora))
        specs = tensor_specs(base.config, run.lora).values()
        adapters = [spec for spec in specs if spec.use == "adapter"]
        for spec in adapters:
            self._arrays.spec(spec)
        self._arrays.check_no_others([spec.name for spec in adapters])

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part, with its adapter added."""
        base = self._base.read(name, part).astype(np.float32, copy=False)
        if name not in self._adapted:
            return base
        spec = self.tensors[name].param
        lead, rows, columns = spec.split(part)
        rank = slice(0, self._rank)
        a = self._arrays.read(f"{name}/a", (*lead, *rows, rank))
        b = self._arrays.read(f"{name}/b", (*lead, rank, *columns))
        adapted = LoraArray(base, a, b, self._scale)
        return merge_adapter(adapted, spec.contract_dims, spec.output_dims)
