"""Writes weights as a `ckpt-0` folder, byte for byte as the released code would have."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from grok.config import GrokConfig
from grok.errors import CheckpointError
from grok.model import params
from grok.weights.cast import RELEASE_GROUPS, converted
from grok.weights.source import Part, Source, TensorSpec, blocks, pieces, scales_part
from grok.weights.xai.layout import Layout, plain_layout, quantized_layout
from grok.weights.xai.source import ReleaseTensor, tensor_names


def write_release(source: Source, folder: str | os.PathLike[str]) -> None:
    """Write `source` as a new `ckpt-0` folder: int8 matrices as they are, floats quantised.

    Memory holds one matrix (of one layer and expert) at a time. Raises CheckpointError where
    `folder` has files already, or cannot be written.
    """
    source, path = converted(source, "int8"), Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise CheckpointError(
                f"{path}: has files already; a release goes to a folder of its own."
            )
        for tensor in tensor_names(source.config.num_layers):
            _write_file(path / tensor.file, source, tensor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}.") from error


def file_sizes(config: GrokConfig, groups: Mapping[str, int] = RELEASE_GROUPS) -> list[int]:
    """Bytes of each file of a release of this model, in the order of `tensor_names`.

    `groups` says how many groups of rows a matrix has, by name; one where it says nothing.
    """
    sizes = {}
    for name, shape in params.shapes(config).items():
        quantized = name in params.MATRICES
        dtype = np.dtype(np.int8 if quantized else np.float32)
        spec = TensorSpec(name, shape, dtype, groups.get(name, 1) if quantized else None)
        sizes[name] = sum(item if isinstance(item, int) else len(item) for item in _layout(spec))
    return [sizes[tensor.name] for tensor in tensor_names(config.num_layers)]


def _write_file(path: Path, source: Source, tensor: ReleaseTensor) -> None:
    spec = source.tensors[tensor.name]
    part = dict(pieces(spec))[tensor.layer]
    arrays = iter((_values(source, spec, part), _scales(source, spec, part)))
    with open(path, "wb") as file:
        for item in _layout(spec):
            if isinstance(item, bytes):
                file.write(item)
            else:
                for block in next(arrays):
                    file.write(block.reshape(-1).view(np.uint8).data)


def _values(source: Source, spec: TensorSpec, part: Part) -> Iterator[np.ndarray]:
    for block in blocks(spec, part):
        yield source.read(spec.name, block)


def _scales(source: Source, spec: TensorSpec, part: Part) -> Iterator[np.ndarray]:
    yield source.read_scales(spec.name, scales_part(spec, part))


def _layout(spec: TensorSpec) -> Layout:
    """The file of a tensor, or of one layer of it."""
    shape = spec.shape[1:] if spec.name.startswith("layers/") else spec.shape
    if spec.groups is None:
        return plain_layout(shape)
    lead, rows, columns = params.rows_and_columns(spec.name, shape)
    width = math.prod(columns)
    return quantized_layout((*lead, math.prod(rows), width), (*lead, spec.groups, width))
