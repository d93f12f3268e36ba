"""`grok.load`: weights in any format -> a model on its mesh. Each process reads the parts that its
devices hold, in blocks, sent while the next are read."""

import collections
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from grok.config import ModelConfig
from grok.errors import ConfigError
from grok.model.build import abstract, to_arrays
from grok.model.decoder import Decoder
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.source import Part, Source, part_shape, relative_to

DTYPES = ("int8", "bfloat16", "float32")
# Blocks read while earlier ones go to the devices, and the size of one: together they bound the
# memory of the host.
READ_AHEAD = 8
BLOCK_BYTES = 1 << 28


def load(
    path: str | os.PathLike[str],
    config: ModelConfig | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Decoder:
    """The model at `path` on `mesh` (default: one device), ready to be called.

    `path` and `config`, the expected model, are as for `open_source`. Matrices are converted to
    `dtype`, if given: "int8" (with scales, all else float32), "bfloat16" or "float32". `on_bytes`
    gets each number of bytes sent to devices. With several processes, all call this.

    Raises CheckpointError, with the file, for weights that are damaged, incomplete or of another
    model; ConfigError where the model cannot be split over the mesh.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    source = open_source(path, config)
    if dtype is None:
        dtype = source.dtype if source.dtype in DTYPES else "float32"
    return put_on_mesh(converted(source, dtype), mesh, on_bytes)


def put_on_mesh(
    source: Source, mesh: Mesh | None = None, on_bytes: Callable[[int], None] | None = None
) -> Decoder:
    """The model of `source`, in the types that its tensors have, on `mesh` or one device."""
    config = dataclasses.replace(source.config, param_dtype=cast(Any, source.dtype))
    groups = {name: spec.groups for name, spec in source.tensors.items() if spec.groups}
    model = abstract(config, mesh, groups)
    leaves = [_Leaf(source, name, leaf) for name, leaf in to_arrays(model).items()]
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="grok-load") as pool:
        reads = ((leaf, block, pool.submit(leaf.read, block)) for leaf in leaves for block in leaf)
        waiting = collections.deque(itertools.islice(reads, READ_AHEAD))
        while waiting:
            leaf, block, values = waiting.popleft()
            count = leaf.put(block, values.result())
            if on_bytes is not None:
                on_bytes(count)
            waiting.extend(itertools.islice(reads, 1))
    return jax.tree.unflatten(jax.tree.structure(model), [leaf.array() for leaf in leaves])


class _Leaf:
    """An array on its way to this process's devices, block by block."""

    def __init__(self, source: Source, name: str, leaf):
        self.read = _reader(source, name, leaf.shape)
        self.shape, self.dtype = leaf.shape, np.dtype(leaf.dtype)
        self.sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
        indices: Any = self.sharding.addressable_devices_indices_map(leaf.shape)
        self.parts = {  # with start and stop filled in
            device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
            for device, index in indices.items()
        }
        self.shards: dict[jax.Device, jax.Array] = {}

    def __iter__(self) -> Iterator[Part]:
        """Yields blocks that cover exactly the parts of the devices, each once. Devices with
        neighbouring columns share a block, so that rows are read contiguously."""
        distinct = list(dict.fromkeys(self.parts.values()))
        axes = zip(*distinct, strict=True)
        box = tuple(slice(min(s.start for s in a), max(s.stop for s in a)) for a in axes)
        filled = sum(math.prod(part_shape(part)) for part in distinct)
        for part in [box] if filled == math.prod(part_shape(box)) else distinct:
            yield from _cut(part, self.dtype.itemsize)

    def put(self, block: Part, values: np.ndarray) -> int:
        """Sends a block to all devices that hold some of it; returns the bytes sent."""
        count = 0
        for device, part in self.parts.items():
            axes = zip(part, block, strict=True)
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in axes]
            if any(s.start >= s.stop for s in common):
                continue
            on_host = np.ascontiguousarray(values[relative_to(block, common)])
            on_device = jax.device_put(on_host, device)
            if tuple(common) == part:
                self.shards[device] = on_device
            else:
                if device not in self.shards:
                    self.shards[device] = jnp.zeros(part_shape(part), self.dtype, device=device)
                start = tuple(s.start for s in relative_to(part, common))
                self.shards[device] = _write(self.shards[device], on_device, start)
            count += on_host.nbytes
        # Bounds the host's memory to the blocks that are read ahead.
        jax.block_until_ready(list(self.shards.values()))
        return count

    def array(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, list(self.shards.values())
        )


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, block: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, block, start)


def _reader(source: Source, name: str, shape: tuple[int, ...]) -> Callable[[Part], np.ndarray]:
    """A function that reads parts of a leaf: a float tensor, or the values or scales of int8."""
    tensor, _, kind = name.rpartition("/")
    if kind != "scales":
        return functools.partial(source.read, tensor if kind == "values" else name)
    stored = source.tensors[tensor].scales_shape
    axis = next((i for i, n in enumerate(stored) if n != shape[i]), None)
    if axis is None:
        return functools.partial(source.read_scales, tensor)
    repeats = shape[axis] // stored[axis]

    def read(part: Part) -> np.ndarray:
        # The model on this mesh has each group as `repeats` groups of the same scale.
        numbers = np.arange(part[axis].start, part[axis].stop) // repeats
        groups = slice(int(numbers[0]), int(numbers[-1]) + 1)
        scales = source.read_scales(tensor, (*part[:axis], groups, *part[axis + 1 :]))
        return np.take(scales, numbers - groups.start, axis=axis)

    return read


def _cut(part: Part, itemsize: int) -> Iterator[Part]:
    """`part` in C order as blocks of at most about BLOCK_BYTES, cut along the first axes."""
    axis, lengths = 0, part_shape(part)
    size = itemsize * math.prod(lengths)
    if size <= BLOCK_BYTES:
        yield part
        return
    while size // lengths[axis] > BLOCK_BYTES:
        size //= lengths[axis]
        axis += 1
    step = max(1, BLOCK_BYTES * lengths[axis] // size)
    for index in itertools.product(*(range(s.start, s.stop) for s in part[:axis])):
        for start in range(part[axis].start, part[axis].stop, step):
            stop = min(start + step, part[axis].stop)
            yield (*(slice(i, i + 1) for i in index), slice(start, stop), *part[axis + 1 :])
