"""Batches of rows cut from a token stream, and the way of all batches onto the mesh.

A training batch is a pure function of (data, seed, step), so the position in the data is the step
number and nothing else has to be saved to resume; `grok.data.packed_batches` has those of
documents.

B rows of a batch, T tokens of a row, S tokens of the stream.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

from grok import sharding
from grok.data.batch_schedule import Batch, BatchSchedule
from grok.data.text_stream import TokenStream
from grok.errors import DataError


class StreamBatches:
    """Training batches by step number, without end.

    The stream is a ring, cut into S // T windows of T + 1 tokens that overlap by one: the last
    target of a window is the first input of the next. Every epoch cuts at a new random offset and
    visits every window once in a new random order; fewer than T tokens are left out of an epoch.
    A batch may hold the end of one epoch and the beginning of the next.
    """

    def __init__(self, stream: TokenStream, shapes: BatchSchedule, *, seed: int) -> None:
        """Cut `stream` into rows; DataError when it is shorter than one (T + 1 tokens)."""
        num_tokens, sequence_length = len(stream.tokens_S), shapes.sequence_length
        if num_tokens < sequence_length + 1:
            raise DataError(
                f"the training text has {num_tokens} tokens, and one row of data.sequence_length="
                f"{sequence_length} needs {sequence_length + 1}; data.sequence_length="
                f"{num_tokens - 1}, or more text, would work."
            )
        self._tokens_S = stream.tokens_S
        self._shapes = shapes
        self.shape = shapes.shape
        self._seed = seed
        self.rows_per_epoch = num_tokens // sequence_length
        self._rows = (
            grain.MapDataset.range(self.rows_per_epoch)
            .seed(seed)
            .shuffle()
            .repeat(reseed_each_epoch=True)
            .map_with_index(self._row)
        )

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of the batch of `step`: tokens_BT and targets_BT (int32; targets are the next
        tokens), mask_BT (float32 ones)."""
        whole = [self._rows[row] for row in self._shapes.rows(step, rows)]
        return self._shapes.cut(step, rows, _batch(np.stack(whole)))

    def tokens_seen(self, step: int) -> dict[str, int]:
        """Tokens in all batches before `step`, as those of one dataset named text."""
        return {"text": self._shapes.first_row(step) * self._shapes.sequence_length}

    def _row(self, index: int, window: int) -> np.ndarray:
        """Row `index` of the endless sequence, which is window `window` of its epoch: T + 1 ids."""
        epoch = index // self.rows_per_epoch
        offset = np.random.default_rng((self._seed, epoch)).integers(len(self._tokens_S))
        start = offset + window * self._shapes.sequence_length
        places = np.arange(start, start + self._shapes.sequence_length + 1)
        return self._tokens_S.take(places, mode="wrap")


class StreamValidation:
    """The whole held-out stream, every token predicted exactly once, in order.

    The stream is led by one eos, as documents are in training, so that its first token has
    something to be predicted from. Rows do not overlap: a row's first token is predicted from the
    one before it alone. The last batch is filled with rows that mask_BT leaves out of the loss.

    num_tokens: tokens predicted (the eos of each document among them), the sum of all masks.
    num_bytes: UTF-8 bytes of the text, for `grok.data.text_stream.bits_per_byte`.
    """

    def __init__(self, stream: TokenStream, *, sequence_length: int, batch_size: int) -> None:
        """Lay out `stream` in batches of B rows of T tokens; no stream is too short."""
        self.num_tokens = len(stream.tokens_S)
        self.num_bytes = stream.num_bytes
        self._stream = stream
        self._sequence_length = sequence_length
        self._batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.num_tokens // (self._batch_size * self._sequence_length))

    def __iter__(self) -> Iterator[Batch]:
        """Batches like those of `Batches.batch`, with mask_BT 0 on what is only filling."""
        shape = (self._batch_size, self._sequence_length)
        size = self._batch_size * self._sequence_length
        eos_id = self._stream.eos_id
        padded_S = np.full(len(self) * size + 1, eos_id, np.int32)
        padded_S[1 : self.num_tokens + 1] = self._stream.tokens_S
        for start in range(0, len(self) * size, size):
            places = np.arange(start, start + size)
            yield {
                "tokens_BT": padded_S[places].reshape(shape),
                "targets_BT": padded_S[places + 1].reshape(shape),
                "mask_BT": (places < self.num_tokens).astype(np.float32).reshape(shape),
            }


class TrainBatches(Protocol):
    """Training batches by step; `Batches` and `grok.data.packed_batches.PackedBatches` are some."""

    @property
    def shape(self) -> Callable[[int], tuple[int, int]]:
        """Of a step: B and T of its batch."""

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of the batch of `step`."""
        ...

    def tokens_seen(self, step: int) -> dict[str, int]:
        """Tokens of each dataset in all batches before `step`."""
        ...


def global_batches(
    batches: TrainBatches,
    mesh: jax.sharding.Mesh,
    steps: range,
    prefetch: int,
) -> Iterator[dict[str, jax.Array]]:
    """The batches of `steps` as global arrays, rows split over the mesh.

    Every process makes the rows of its own devices alone, up to `prefetch` steps ahead, in as many
    threads.
    """
    split = _split_rows(mesh)

    def load(step: int) -> dict[tuple[int, int], Batch]:
        shape = batches.shape(step)
        indices = split.addressable_devices_indices_map(shape).values()
        ours = {_rows_of(index, shape) for index in indices}
        return {rows: batches.batch(step, slice(*rows)) for rows in ours}

    def place(shape: tuple[int, int], parts: dict[tuple[int, int], Batch], name: str) -> jax.Array:
        return jax.make_array_from_callback(
            shape, split, lambda index: parts[_rows_of(index, shape)][name]
        )

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    numbers = grain.MapDataset.range(steps.start, steps.stop)
    for step, parts in zip(steps, numbers.map(load).to_iter_dataset(options), strict=True):
        shape = batches.shape(step)
        yield {name: place(shape, parts, name) for name in next(iter(parts.values()))}


def shard_batch(batch: Batch, mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
    """Arrays of a [B, T] batch as global arrays, rows split over the mesh; plain without a mesh.

    Every process holds the whole batch and hands its own devices their rows.
    """
    if mesh is None:
        return {name: jnp.asarray(array_BT) for name, array_BT in batch.items()}
    split = _split_rows(mesh)
    return {
        name: jax.make_array_from_callback(array_BT.shape, split, array_BT.__getitem__)
        for name, array_BT in batch.items()
    }


def _split_rows(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """[B, T] arrays with their rows split over the mesh."""
    return jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length"))


def _rows_of(index: tuple[slice, ...] | None, shape: tuple[int, int]) -> tuple[int, int]:
    """First row of a device's part of a [B, T] array, and the first after it."""
    assert index is not None  # JAX has None for a device without a part alone
    start, stop, _ = index[0].indices(shape[0])
    return start, stop


def _batch(rows_BS: np.ndarray) -> Batch:
    """Rows of T + 1 tokens as inputs, targets shifted by one, and a mask of ones."""
    tokens_BT = np.ascontiguousarray(rows_BS[:, :-1])
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": np.ascontiguousarray(rows_BS[:, 1:]),
        "mask_BT": np.ones(tokens_BT.shape, np.float32),
    }
