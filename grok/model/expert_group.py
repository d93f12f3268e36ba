"""Work on a block's tokens by the devices of an expert group, each of which has a slice of the
width of every expert, and of the dense MLP.

Letters: B batch, T length, R = B*T rows of the group, D embed.
"""

from collections.abc import Callable

import jax
from flax import nnx

from grok import sharding
from grok.config import ModelConfig
from grok.model.param_spec import ParamSpec
from grok.ops.weights.weight import Weight, cast, leaf_axes, materialize


def run_on_group(
    run: Callable,
    tokens: tuple[jax.Array, ...],
    params: dict[str, nnx.Param],
    specs: dict[str, ParamSpec],
    config: ModelConfig,
    axes: sharding.Axes,
) -> jax.Array:
    """y_BTD, split as `axes` says, of `run(rows, leaves, unshard)`, which returns y_RD of one
    device's slice of the width; the slices are summed.

    `tokens` are arrays (B, T, ...) of which the first is x_BTD; `rows` are those of all devices of
    the group, (R, ...). `unshard(leaves)` makes the weights of `params`, in the type of x, from
    this device's shards of their arrays.
    """
    weights: list[Weight] = []
    weight_axes: list[sharding.Axes] = []
    for name, param in params.items():
        w = param.get_value()
        if sharding.axis_size("fsdp_embed") > 1:
            w = materialize(w)  # of one layer alone, to be gathered from other devices
        weights.append(cast(w, tokens[0].dtype))
        weight_axes += leaf_axes(weights[-1], specs[name].storage_axes(config.param_dtype))
    leaves, structure = jax.tree.flatten(weights)

    def unshard(leaves):
        whole = map(sharding.unshard_local, leaves, weight_axes)
        return jax.tree.unflatten(structure, list(whole))

    def local(*arrays):
        shards, leaves = arrays[: len(tokens)], arrays[len(tokens) :]
        return _combine(run(_dispatch(shards), leaves, unshard), shards[0], axes)

    token_axes = ("batch", "length", None)
    in_axes = (*(token_axes for _ in tokens), *weight_axes)
    sharded = sharding.shard_map(local, in_axes, axes)
    return sharded(*(sharding.constrain(a, *token_axes) for a in tokens), *leaves)


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
