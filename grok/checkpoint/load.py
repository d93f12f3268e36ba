"""`grok.load`: weights in any format -> a model on its mesh.

Every device's part of every tensor is read on its own, several at a time, and converted on the
way, so a process reads no byte that its devices do not need and never holds a whole tensor.
"""

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

from grok.checkpoint.convert import converted
from grok.checkpoint.open import open_source
from grok.checkpoint.source import Part, Source, part_shape
from grok.config import GrokConfig
from grok.errors import ConfigError
from grok.model.grok import Grok
from grok.model.weights import abstract, to_arrays

DTYPES = ("int8", "bfloat16", "float32")
READERS = 8
# Largest piece of a part that is on the host at a time, for each reader.
BLOCK_BYTES = 1 << 28


def load(
    path: str | os.PathLike[str],
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Grok:
    """The model at `path`, placed on `mesh` (default: on one device), ready to be called.

    `path`, local or gs://, is a ckpt-0 folder, a Hugging Face folder, or a checkpoint of ours (a
    run's folder, its `checkpoints`, or one step). `config` is the model that should be there, by
    default what the files say. `dtype` is what matrices become: "int8" (with scales, all else
    float32), "bfloat16" or "float32"; by default what they are. `on_bytes` is told, from several
    threads, how many bytes arrived on devices. With several processes, each calls this and reads
    what its own devices need.

    Raises CheckpointError, with the file and what would be right, for what is damaged, incomplete
    or of another model; ConfigError when the model cannot be split over the mesh.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    source = open_source(path, config)
    if dtype is None:
        dtype = source.dtype if source.dtype in DTYPES else "float32"
    return place(converted(source, dtype), mesh, on_bytes)


def place(
    source: Source, mesh: Mesh | None = None, on_bytes: Callable[[int], None] | None = None
) -> Grok:
    """The model of `source`, in the types that its tensors have, on `mesh` or one device."""
    config = dataclasses.replace(source.config, param_dtype=cast(Any, source.dtype))
    groups = {name: spec.groups for name, spec in source.tensors.items() if spec.groups}
    wanted = abstract(config, mesh, groups)
    leaves = list(to_arrays(wanted).items())
    with ThreadPoolExecutor(READERS, thread_name_prefix="grok-load") as pool:
        # One tensor after the other, so that those on the way are few.
        parts = [_start(pool, source, name, leaf, on_bytes) for name, leaf in leaves]
        arrays = [
            jax.make_array_from_single_device_arrays(
                leaf.shape, placing, [shard for job in jobs for shard in job.result()]
            )
            for (_, leaf), (placing, jobs) in zip(leaves, parts, strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(wanted), arrays)


def _start(pool, source: Source, name: str, leaf, on_bytes):
    """Begins to read a leaf: its placement, and one job for each distinct part of it here."""
    placing = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    devices: dict[tuple, list[jax.Device]] = {}
    for device, index in placing.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None  # addressable
        bounds = (s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(tuple(bounds), []).append(device)
    read = _reader(source, name, leaf.shape)
    return placing, [
        pool.submit(
            _place_part, read, tuple(slice(*b) for b in bounds), leaf.dtype, where, on_bytes
        )
        for bounds, where in devices.items()
    ]


def _reader(source: Source, name: str, shape: tuple[int, ...]) -> Callable[[Part], np.ndarray]:
    """Reads parts of a leaf: of a float tensor, or of the values or the scales of an int8 one."""
    tensor, _, kind = name.rpartition("/")
    if kind != "scales":
        return functools.partial(source.read, tensor if kind == "values" else name)
    spec = source.tensors[tensor]
    axis = next((i for i, n in enumerate(spec.scales_shape) if n != shape[i]), None)
    if axis is None:
        return functools.partial(source.read_scales, tensor)
    repeats = shape[axis] // spec.scales_shape[axis]

    def read(part: Part) -> np.ndarray:
        # The model on this mesh has each group in `repeats` parts of the same scale.
        first, last = part[axis].start // repeats, (part[axis].stop - 1) // repeats
        coarse = source.read_scales(
            tensor, (*part[:axis], slice(first, last + 1), *part[axis + 1 :])
        )
        own = np.arange(part[axis].start, part[axis].stop) // repeats - first
        return np.take(coarse, own, axis=axis)

    return read


def _place_part(read, part: Part, dtype, devices, on_bytes) -> list[jax.Array]:
    """One part on each of `devices`, through blocks of at most BLOCK_BYTES on the host."""
    shape = part_shape(part)
    pieces = list(_cut(part, np.dtype(dtype).itemsize))
    if len(pieces) == 1:
        data = np.ascontiguousarray(read(part))
        shards = [jax.device_put(data, device) for device in devices]
        _tell(on_bytes, data.nbytes * len(devices), shards)
        return shards
    shards = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for piece in pieces:
        data = np.ascontiguousarray(read(piece))
        start = tuple(s.start - whole.start for s, whole in zip(piece, part, strict=True))
        shards = [
            _write(shard, jax.device_put(data, device), start)
            for shard, device in zip(shards, devices, strict=True)
        ]
        _tell(on_bytes, data.nbytes * len(devices), shards)
    return shards


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, block: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, block, start)


def _tell(on_bytes, count: int, shards: list[jax.Array]) -> None:
    # Waiting keeps the host from reading ahead of what devices have taken.
    jax.block_until_ready(shards)
    if on_bytes is not None:
        on_bytes(count)


def _cut(part: Part, itemsize: int) -> Iterator[Part]:
    """`part` in C order as blocks of at most BLOCK_BYTES, cut along the first axes."""
    axis, size = 0, itemsize * math.prod(part_shape(part))
    if size <= BLOCK_BYTES:
        yield part
        return
    while size // (part[axis].stop - part[axis].start) > BLOCK_BYTES:
        size //= part[axis].stop - part[axis].start
        axis += 1
    length = part[axis].stop - part[axis].start
    step = max(1, BLOCK_BYTES * length // size)
    for index in itertools.product(*(range(s.start, s.stop) for s in part[:axis])):
        for start in range(part[axis].start, part[axis].stop, step):
            stop = min(start + step, part[axis].stop)
            yield (*(slice(i, i + 1) for i in index), slice(start, stop), *part[axis + 1 :])
