"""Work on a block's tokens by the devices of an expert group, each of which has a slice of the
width of every expert, and of the dense MLP.

Letters: B batch, T length, R = B*T rows of the group, D embed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from grok import sharding
from grok.config import ModelConfig
from grok.model.param_spec import ParamSpec
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
        runs.append((work.run, here, _unshard_of(structure, work_axes)))
        leaves += work_leaves
        leaves_axes += work_axes

    def local(*arrays):
        shards, leaves = arrays[: len(tokens)], arrays[len(tokens) :]
        rows, y_RD = _dispatch(shards), None
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


def _unshard_of(structure, axes: list[sharding.Axes]) -> Callable:
    def unshard(leaves) -> list[Weight]:
        whole = map(sharding.unshard_local, leaves, axes)
        return list(map(as_trained, jax.tree.unflatten(structure, list(whole))))

    return unshard


def _dispatch(tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The rows of all devices of the expert group, of each array."""
    with jax.named_scope("dispatch"):
        x, *others = (sharding.all_gather(a, "expert_group", dim=0) for a in tokens)
        x = sharding.pin_row_major(x)
        return tuple(a.reshape(-1, a.shape[-1]) for a in (x, *others))


def _combine(y_RD, x_BTD, axes: sharding.Axes) -> jax.Array:
    """Sums the slices of the width, each device receiving its own rows, like `x_BTD`."""
    with jax.named_scope("combine"):
        y = sharding.pin_row_major(y_RD.reshape(-1, *x_BTD.shape[1:]))
        y = sharding.pin_row_major(sharding.psum_scatter(y, "expert_group", dim=0))
        if axes[1] == "sp_length":
            return sharding.psum_scatter(y, "sp_length", dim=1).astype(x_BTD.dtype)
        return sharding.psum(y, "mlp_within_group").astype(x_BTD.dtype)
