"""Work on a block's tokens by the devices of an expert group, each of which has a slice of the
width of every expert, and of the dense MLP.

Letters: B batch, T length, R = B*T rows of the group, D embed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from grok import sharding
from grok.config import ModelConfig
from grok.model.param_spec import ParamSpec
from grok.model.scaled import quantized_matrix
from grok.ops.moe.experts_scaled import quantize_rows
from grok.ops.scaled import Scaled
from grok.ops.varying import pvary
from grok.ops.weights.weight import Weight, as_trained, cast, leaf_axes, materialize


class GroupWork(NamedTuple):
    """A module's work on the rows of a group: `run(rows, leaves, unshard)` returns y_RD of one
    device's slice of the width. `rows` are arrays (R, ...), first x_RD; `unshard(leaves)` makes the
    weights of `params`, in the type of x, from this device's shards of their arrays."""

    run: Callable
    params: dict[str, nnx.Param]
    specs: dict[str, ParamSpec]


def run_on_group(
    works: Sequence[GroupWork],
    tokens: tuple[jax.Array, ...],
    config: ModelConfig,
    axes: sharding.Axes,
) -> jax.Array:
    """y_BTD, split as `axes` says: the sum over `works` and over all slices of the width.

    `tokens` are arrays (B, T, ...), first x_BTD; they travel once for all works.
    """
    leaves: list[jax.Array] = []
    leaves_axes: list[sharding.Axes] = []
    runs = []
    for work in works:
        weights = [_weight(param, tokens[0].dtype) for param in work.params.values()]
        work_axes: list[sharding.Axes] = []
        for name, w in zip(work.params, weights, strict=True):
            work_axes += leaf_axes(w, work.specs[name].storage_axes(config.param_dtype))
        work_leaves, structure = jax.tree.flatten(weights)
        here = slice(len(leaves), len(leaves) + len(work_leaves))
        runs.append((work.run, here, Unshard(structure, tuple(work_axes))))
        leaves += work_leaves
        leaves_axes += work_axes

    def local(*arrays):
        shards, leaves = arrays[: len(tokens)], arrays[len(tokens) :]
        rows, y_RD = _dispatch(shards, config.matmul_dtype), None
        for run, here, unshard in runs:
            added = run(rows, leaves[here], unshard)
            y_RD = added if y_RD is None else y_RD + added
        return _combine(y_RD, shards[0], axes)

    token_axes = ("batch", "length", None)
    in_axes = (*(token_axes for _ in tokens), *leaves_axes)
    sharded = sharding.shard_map(local, in_axes, axes)
    return sharded(*(sharding.constrain(a, *token_axes) for a in tokens), *leaves)


def _weight(param: nnx.Param, dtype) -> Weight:
    w = param.get_value()
    if sharding.axis_size("fsdp_embed") > 1:
        w = materialize(w)  # of one layer alone, to be gathered from other devices
    return cast(w, dtype)


@dataclasses.dataclass(frozen=True)
class Unshard:
    """Makes the weights of a work from this device's shards of their arrays, stored in `axes`."""

    structure: Any
    axes: tuple[sharding.Axes, ...]

    def __call__(self, leaves) -> list[Weight]:
        """The weights, in the type of their arrays."""
        arrays = map(sharding.unshard_local, leaves, self.axes)
        return list(map(as_trained, jax.tree.unflatten(self.structure, list(arrays))))

    def quantized(self, leaves, dims: Sequence[int], dtype) -> list[Scaled]:
        """Matrices in 8 bits, with scales along dimension `dims` of each, without it in shape."""
        pairs = zip(leaves, self.axes, dims, strict=True)
        matrices = [quantized_matrix(leaf, axes, (dim,), dtype) for leaf, axes, dim in pairs]
        return jax.tree.map(pvary, matrices)


def _dispatch(tokens: tuple[jax.Array, ...], matmul_dtype: str) -> tuple[Any, ...]:
    """The rows of all devices of the expert group, of each array; x in 8 bits where products are,
    so that it travels as those."""
    with jax.named_scope("dispatch"):
        x, *others = tokens
        scaled = x if matmul_dtype == "compute" else quantize_rows(x, matmul_dtype)
        x = jax.tree.map(lambda a: sharding.all_gather(a, "expert_group", dim=0), scaled)
        others = [sharding.all_gather(a, "expert_group", dim=0) for a in others]
        x = jax.tree.map(sharding.pin_row_major, x)
        return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (x, *others))


def _combine(y_RD, x_BTD, axes: sharding.Axes) -> jax.Array:
    """Sums the slices of the width, each device receiving its own rows, like `x_BTD`."""
    with jax.named_scope("combine"):
        y = sharding.pin_row_major(y_RD.reshape(-1, *x_BTD.shape[1:]))
        y = sharding.pin_row_major(sharding.psum_scatter(y, "expert_group", dim=0))
        if axes[1] == "sp_length":
            return sharding.psum_scatter(y, "sp_length", dim=1).astype(x_BTD.dtype)
        return sharding.psum(y, "mlp_within_group").astype(x_BTD.dtype)
