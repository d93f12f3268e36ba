"""A source of arrays in memory, for tests that change single numbers."""

import numpy as np

from grok.config import GrokConfig
from grok.model import params
from grok.weights.source import Part, Source, TensorSpec


class ArraySource(Source):
    """`values` by name, and `scales` of those that are int8."""

    format = "random"

    def __init__(self, config: GrokConfig, values: dict, scales: dict, path: str = "arrays"):
        self.config, self.path, self.values, self.scales = config, path, values, scales

    @classmethod
    def copy(cls, source: Source, path: str = "arrays") -> "ArraySource":
        """What another source has."""
        values, scales = {}, {}
        for name, spec in source.tensors.items():
            values[name] = np.array(source.read(name, spec.whole))
            if spec.groups is not None:
                whole = tuple(slice(0, size) for size in spec.scales_shape)
                scales[name] = np.array(source.read_scales(name, whole))
        return cls(source.config, values, scales, path)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec(name, array.shape, array.dtype, self._groups(name))
            for name, array in self.values.items()
        }

    def _groups(self, name: str) -> int | None:
        if name not in self.scales:
            return None
        axis = len(params.rows_and_columns(name, self.values[name].shape)[0])
        return self.scales[name].shape[axis]

    def read(self, name: str, part: Part) -> np.ndarray:
        return self.values[name][part]

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        return self.scales[name][part]
