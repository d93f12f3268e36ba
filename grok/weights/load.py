"""`grok.load`: weights in any format -> a model on its mesh. All processes together read each byte
once (`read_plan.py`), in batches that go to the devices while the next are read."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from grok.config import ModelConfig
from grok.config.model import QUANTIZED_DTYPES
from grok.errors import ConfigError
from grok.model.build import abstract, int8_tables, to_arrays
from grok.model.decoder import Decoder
from grok.ops.weights.quantized import quantize
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.source import ByteCounter, OnProgress, Source, no_progress
from grok.weights.tensor_reads import Piece, Starts, nbytes_of, tensor_reads
from grok.weights.transfer import MeshDevices, Transfer

DTYPES = ("int4_all", "int4", "int8", "bfloat16", "float32")
READERS = 16  # threads
# Bytes of batches that are read or on their way to the devices: a bound of the host's memory, as
# long as one batch is smaller, but for a bucket's answers that are not copied yet.
HOST_BYTES = 1 << 30


def load(
    path: str | os.PathLike[str],
    config: ModelConfig | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    on_progress: OnProgress = no_progress,
) -> Decoder:
    """The model at `path` on `mesh` (default: one device), ready to be called.

    `path` is the folder of a run, an import, a `ckpt-0`, a Hugging Face folder, local or at gs://,
    or hf://ORG/NAME; `config` the expected model, where the files do not say. Matrices are
    converted to `dtype`, if given: "int8" (with scales, all else float32), "int4" (those of MLP and
    experts, others int8), "int4_all", "bfloat16" or "float32"; token tables become int8 beside
    quantised matrices where `config.embedding_dtype` says so.
    `on_progress` is called with bytes of the model that are on the devices, of all processes
    together. With several processes, all call this.

    Raises CheckpointError, with the file, for weights that are damaged, incomplete or of another
    model; ConfigError where the model cannot be split over the mesh.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    source = open_source(path, config)
    if dtype is None:
        dtype = source.dtype if source.dtype in DTYPES else "float32"
    if config is None and dtype in QUANTIZED_DTYPES:  # a run's products are those of its training
        source.config = dataclasses.replace(source.config, matmul_dtype="compute")
    return put_on_mesh(converted(source, dtype), mesh, on_progress)


def put_on_mesh(
    source: Source, mesh: Mesh | None = None, on_progress: OnProgress = no_progress
) -> Decoder:
    """The model of `source`, in the types that its tensors have, on `mesh` or one device."""
    dtype: Any = source.dtype
    config = dataclasses.replace(source.config, param_dtype=dtype)
    groups = {name: spec.groups for name, spec in source.tensors.items() if spec.groups}
    model = abstract(config, mesh, groups)
    leaves = to_arrays(abstract(dataclasses.replace(config, embedding_dtype="float"), mesh, groups))
    counter = ByteCounter(on_progress, sum(map(nbytes_of, leaves.values())))
    devices, arrays = MeshDevices(mesh), dict[str, Any]()
    reads = tensor_reads(source, leaves, devices.processes)
    transfers = (Transfer(tensor, leaves, devices) for tensor in reads)
    with ThreadPoolExecutor(READERS, thread_name_prefix="grok-load") as pool:
        for batch in _read_ahead(transfers, list(devices.local.values()), pool):
            pieces = [read.result() for read in batch.reads]
            placed = batch.transfer.place(batch.starts, pieces)
            counter.add(batch.transfer.reads.names[0], placed)
            arrays |= batch.transfer.arrays
    for name in int8_tables(config):
        arrays |= _quantized_table(name, arrays.pop(name))
    return jax.tree.unflatten(
        jax.tree.structure(model), [arrays[name] for name in to_arrays(model)]
    )


def _quantized_table(name: str, table_VD: jax.Array) -> dict[str, jax.Array]:
    """A token table in int8, on the devices that it is on."""
    quantized = jax.jit(functools.partial(quantize, num_scale_groups=1, output_dims=0))(table_VD)
    return dict(zip((f"{name}/values", f"{name}/scales"), quantized, strict=True))


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch that is being read."""

    transfer: Transfer
    starts: Starts
    reads: list[Future[tuple[Piece, ...]]]


def _read_ahead(
    transfers: Iterable[Transfer], devices: list[dict[str, int]], pool: ThreadPoolExecutor
) -> Iterator[_Batch]:
    """Yields all batches in order, while as many after them are read as HOST_BYTES allows."""
    waiting: collections.deque[tuple[int, _Batch]] = collections.deque()
    for transfer in transfers:
        reads = transfer.reads
        for starts in reads.batches():
            parts = reads.parts(starts, devices)
            batch = _Batch(transfer, starts, [pool.submit(reads.read, part) for part in parts])
            waiting.append((sum(map(reads.part_bytes, parts)), batch))
            while len(waiting) > 1 and sum(nbytes for nbytes, _ in waiting) > HOST_BYTES:
                yield waiting.popleft()[1]
    while waiting:
        yield waiting.popleft()[1]
