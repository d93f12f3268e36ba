"""A tensor of a Hugging Face folder as its files have it: whole in one, or in parts, one a rank."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from grok.weights.huggingface.safetensors import TensorInfo
from grok.weights.source import Part, part_shape, read_part


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of one type, whose `parts` follow each other along `axis`; most have one part."""

    parts: tuple[TensorInfo, ...]
    axis: int = 0

    @property
    def path(self) -> str:
        """The file of its first part."""
        return self.parts[0].path

    @property
    def dtype(self) -> np.dtype:
        """Its type."""
        return self.parts[0].dtype

    @property
    def groups(self) -> None:
        """None: floats have no scales."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all parts together."""
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def read(self, sizes: tuple[int, ...], part: Part) -> Iterator[tuple[np.ndarray, Part]]:
        """Yields what each stored part has of `part`, and its place in that. `sizes` is the shape
        with more axes than the file says, such as heads; a tensor in several parts has none."""
        if len(self.parts) == 1:
            yield (
                self._read(self.parts[0], sizes, part),
                tuple(slice(0, n) for n in part_shape(part)),
            )
            return
        begin = 0
        for stored in self.parts:
            end = begin + stored.shape[self.axis]
            cut = part[self.axis]
            first, last = max(cut.start, begin), min(cut.stop, end)
            if first < last:
                inner, place = list(part), [slice(0, n) for n in part_shape(part)]
                inner[self.axis] = slice(first - begin, last - begin)
                place[self.axis] = slice(first - cut.start, last - cut.start)
                yield self._read(stored, stored.shape, tuple(inner)), tuple(place)
            begin = end

    def _read(self, stored: TensorInfo, sizes: tuple[int, ...], part: Part) -> np.ndarray:
        out = np.empty(part_shape(part), self.dtype)
        return read_part(stored.path, stored.offset, sizes, part, out)
