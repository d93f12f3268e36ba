"""Chips that lie: one device of a mesh whose results, or whose copy of a tensor, are wrong.

Faults are data, so that a program is compiled once for all of them: `marked` puts device and place
into the upper bits of a batch's segment numbers, where `Decoder.hidden`, as `install` changes it,
finds them."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok.config import MESH_AXES
from grok.model.block import Block
from grok.model.decoder import Decoder
from grok.train.state import TrainState

FORWARD, BACKWARD = 1, 2
SEGMENT_BITS = 8


class Fault(NamedTuple):
    """Position of a device in the flattened mesh, and the pass in which it flips a bit."""

    device: int
    place: int


def marked(batch: dict, fault: Fault | None) -> dict:
    """The batch, with which this device lies."""
    tokens_BT = batch["tokens_BT"]
    segments = batch.get("segment_ids_BT", jnp.ones_like(tokens_BT))
    code = 0 if fault is None else (fault.device + 1) * 4 + fault.place
    return batch | {"segment_ids_BT": segments + np.int32(code << SEGMENT_BITS)}


@contextlib.contextmanager
def install() -> Iterator[None]:
    """Makes every model obey the marks of its batches."""
    hidden, call = Decoder.hidden, Block.__call__
    codes = []

    def marked_hidden(self, tokens_BT, segments, *rest):
        codes.append(jnp.max(segments) >> SEGMENT_BITS)
        try:
            return hidden(self, tokens_BT, segments & (2**SEGMENT_BITS - 1), *rest)
        finally:
            codes.pop()

    def lying_call(self, x_BTD, *rest):
        y_BTD, *others = call(self, x_BTD, *rest)
        return lie(y_BTD, codes[-1]), *others

    Decoder.hidden, Block.__call__ = marked_hidden, lying_call
    try:
        yield
    finally:
        Decoder.hidden, Block.__call__ = hidden, call


@jax.custom_vjp
def lie(x_BTD, code):
    """The identity, but on the device of the code, where one bit of one element is flipped."""
    return flip(x_BTD, code, FORWARD)


def flip(x_BTD, code, place: int):
    spec = jax.typeof(x_BTD).sharding.spec

    def local(shard, code):
        device, at = code // 4 - 1, code % 4
        is_here = (jax.lax.axis_index(MESH_AXES) == device) & (at == place)
        bits = jax.lax.bitcast_convert_type(shard, jnp.int32).reshape(-1)
        first = jnp.where(is_here, bits[:1] ^ jnp.int32(1 << 20), bits[:1])
        bits = jax.lax.dynamic_update_slice(bits, first, (0,))
        return jax.lax.bitcast_convert_type(bits.reshape(shard.shape), shard.dtype)

    P = jax.sharding.PartitionSpec
    return jax.shard_map(local, in_specs=(spec, P()), out_specs=spec, check_vma=False)(x_BTD, code)


def _forward(x_BTD, code):
    return lie(x_BTD, code), code


def _backward(code, g_BTD):
    return flip(g_BTD, code, BACKWARD), np.zeros((), jax.dtypes.float0)


lie.defvjp(_forward, _backward)


def with_wrong_copy(state: TrainState, tensor: str, device: jax.Device) -> TrainState:
    """The state, with one bit flipped in the copy of a tensor that a device has."""

    def change(path, leaf):
        if jax.tree_util.keystr(path) != tensor:
            return leaf
        shards = []
        for shard in leaf.addressable_shards:
            data = np.array(shard.data)
            if shard.device == device:
                # Rounding soon loses the lowest bits of a moment, and with them the fault.
                data.reshape(-1).view(np.uint8)[2] ^= 1 << 4
            shards.append(jax.device_put(data, shard.device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return jax.tree_util.tree_map_with_path(change, state)


def copied_tensors(state: TrainState) -> list[str]:
    """Names of the tensors of which every device has a whole copy."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.is_fully_replicated]
