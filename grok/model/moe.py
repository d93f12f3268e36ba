"""The mixture of experts of a block: router, experts, and how both are spread over a mesh.

Letters: L layers, B batch, T length, R = B*T rows, D embed, F mlp, E experts, C chosen experts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from grok import hardware, sharding
from grok.config import ModelConfig
from grok.hardware import LANES
from grok.model.param_spec import ParamSpec, init_params
from grok.ops.moe.experts_pallas import MLP_SPLITS, experts_pallas, experts_pallas_split_mlp
from grok.ops.moe.experts_xla import experts_xla
from grok.ops.moe.tiling import serving_tile_rows, training_tile_rows, xla_tile_rows
from grok.ops.varying import pvary
from grok.ops.weights.weight import Weight, adapter, cast, is_plain, leaf_axes, materialize

# The matrices of which a token needs those of its experts alone.
EXPERTS = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RouterStats:
    """Means over the real tokens of a batch, float32; the first two sum to one over the experts.
    All are 0 where no token is real."""

    load_E: jax.Array  # share of assignments that went to each expert
    probability_E: jax.Array  # router probability of each expert
    entropy: jax.Array  # of the router's probabilities, nats; no gradient flows through it

    def balance_loss(self) -> jax.Array:
        """E * sum(load * probability): 1 when balanced (Fedus et al. 2021, equation 4)."""
        return self.load_E.shape[-1] * jnp.sum(self.load_E * self.probability_E, axis=-1)


@dataclasses.dataclass
class Routing:
    """Experts that a block's router chose for its tokens, sharded like the residual stream."""

    probs_BTE: jax.Array  # of all experts, float32
    expert_ids_BTC: jax.Array  # the chosen ones, the likeliest first; E where a token needs none
    axes: sharding.Axes

    def stats(self, token_mask_BT: jax.Array) -> RouterStats:
        """Statistics over the tokens of the mask."""
        return _stats(
            self.probs_BTE, self.expert_ids_BTC, sharding.constrain(token_mask_BT, *self.axes[:2])
        )


class MoE(nnx.Module):
    """Gated experts; each token goes to the C of highest router probability.

    The weights of the chosen are the softmax over all E, not renormalised over the chosen ones.
    """

    router_DE: nnx.Param
    w_gate_EDF: nnx.Param
    w_up_EDF: nnx.Param
    w_down_EFD: nnx.Param

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """The router and the experts of one layer."""
        D, F, E = config.embed_dim, config.moe.dim, config.moe.num_experts
        in_axes = ("experts", "embed", "mlp")
        return {
            "router_DE": ParamSpec.router((D, E), ("embed", "experts")),
            "w_gate_EDF": ParamSpec.matmul((E, D, F), in_axes, 1, 1),
            "w_up_EDF": ParamSpec.matmul((E, D, F), in_axes, 1, 1),
            "w_down_EFD": ParamSpec.matmul((E, F, D), ("experts", "mlp", "embed"), 1, 1),
        }

    def __init__(self, key: jax.Array, config: ModelConfig):
        self.config = config
        init_params(self, key, self.param_specs(config), config, config.num_layers)

    def __call__(
        self, x_BTD: jax.Array, token_mask_BT: jax.Array | None, axes: sharding.Axes
    ) -> tuple[jax.Array, Routing]:
        """Returns y_BTD and the routing; x and y are split as `axes` says.

        Tokens outside of the mask go to no expert, so that none is read for them; None: all go.
        """
        with jax.named_scope("router"):
            probs_BTE = self.route(x_BTD, axes)
        topk_weights_BTC, expert_ids_BTC = jax.lax.top_k(probs_BTE, self.config.moe.num_selected)
        if token_mask_BT is not None and hardware.platform() != "tpu":  # whose kernels know no mask
            expert_ids_BTC = jnp.where(
                token_mask_BT[:, :, None], expert_ids_BTC, self.config.moe.num_experts
            )
        y_BTD = self._experts(x_BTD, topk_weights_BTC, expert_ids_BTC, axes)
        return y_BTD, Routing(probs_BTE, expert_ids_BTC, axes)

    def route(self, x_BTD: jax.Array, axes: sharding.Axes) -> jax.Array:
        """Router probabilities of all experts, probs_BTE, in float32 whatever the type of x."""
        logits_BTE = sharding.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            self.router_DE[...].astype(jnp.float32),
            axes=axes,
            precision=jax.lax.Precision.HIGHEST,
        )
        return jax.nn.softmax(logits_BTE, axis=-1)

    def _experts(self, x_BTD, topk_weights_BTC, expert_ids_BTC, axes: sharding.Axes):
        """Dispatches tokens to the devices of their group, each of which has a slice of every
        expert, and combines the partial sums; y_BTD is split as `axes` says."""
        specs, param_dtype = self.param_specs(self.config), self.config.param_dtype
        weights: list[Weight] = []
        weight_axes: list[sharding.Axes] = []
        for name in EXPERTS:
            w = getattr(self, name).get_value()
            if sharding.axis_size("fsdp_embed") > 1:
                w = materialize(w)  # of one layer alone, to be gathered from other devices
            weights.append(cast(w, x_BTD.dtype))
            weight_axes += leaf_axes(weights[-1], specs[name].storage_axes(param_dtype))
        leaves, structure = jax.tree.flatten(weights)

        def unshard(leaves):
            whole = map(sharding.unshard_local, leaves, weight_axes)
            return jax.tree.unflatten(structure, list(whole))

        def local(x_BTD, topk_weights_BTC, expert_ids_BTC, *leaves):
            rows = _dispatch(x_BTD, topk_weights_BTC, expert_ids_BTC)
            with jax.named_scope("experts"):
                y_RD = self._run_experts(rows, leaves, unshard)
            return _combine(y_RD, x_BTD, axes)

        tokens = ("batch", "length", None)
        sharded = sharding.shard_map(local, (tokens, tokens, tokens, *weight_axes), axes)
        arrays = x_BTD, topk_weights_BTC, expert_ids_BTC
        return sharded(*(sharding.constrain(a, *tokens) for a in arrays), *leaves)

    def _run_experts(self, rows, leaves, unshard: Callable) -> jax.Array:
        """y_RD of rows (x_RD, topk_weights_RC, expert_ids_RC), by this device's slice of the
        experts' width; `unshard` makes the matrices of their `leaves`."""
        rows = jax.tree.map(pvary, rows)
        if hardware.platform() != "tpu":
            weights = jax.tree.map(pvary, unshard(leaves))
            (R, C), E = rows[1].shape, self.config.moe.num_experts
            is_serving = not is_plain(weights[0]) and adapter(weights[0]) is None
            tile_rows = serving_tile_rows if is_serving else xla_tile_rows
            tiles = tile_rows(R, C, E), training_tile_rows(R, C, E)
            return experts_xla(*rows, *weights, *tiles, self.config.moe.activation)
        # Gathered along its columns, a matrix has them major in memory.
        down_is_column_major = sharding.axis_size("fsdp_embed") > 1
        options = down_is_column_major, False, self.config.moe.activation
        splits_evenly = leaves[0].shape[-1] % (MLP_SPLITS * LANES) == 0
        # Where the output is not saved, remat computes the hidden layer again, and so would this:
        # once too often.
        if self.config.saves_experts and len(leaves) == len(EXPERTS) and splits_evenly:
            shards = tuple(map(pvary, leaves))
            return experts_pallas_split_mlp(*rows, shards, unshard, *options)
        weights = jax.tree.map(pvary, unshard(leaves))
        return experts_pallas(*rows, *weights, *options)


def _dispatch(x_BTD, topk_weights_BTC, expert_ids_BTC) -> tuple[jax.Array, ...]:
    """The rows of all devices of the expert group: x_RD, topk_weights_RC, expert_ids_RC."""
    with jax.named_scope("dispatch"):
        x, weights, ids = (
            sharding.all_gather(a, "expert_group", dim=0)
            for a in (x_BTD, topk_weights_BTC, expert_ids_BTC)
        )
        x = sharding.pin_row_major(x)
        return tuple(a.reshape(-1, a.shape[-1]) for a in (x, weights, ids))


def _combine(y_RD, x_BTD, axes: sharding.Axes) -> jax.Array:
    """Sums the slices of the experts' width, each device receiving its own rows, like `x_BTD`."""
    with jax.named_scope("combine"):
        y = sharding.pin_row_major(y_RD.reshape(-1, *x_BTD.shape[1:]))
        y = sharding.pin_row_major(sharding.psum_scatter(y, "expert_group", dim=0))
        if axes[1] == "sp_length":
            return sharding.psum_scatter(y, "sp_length", dim=1).astype(x_BTD.dtype)
        return sharding.psum(y, "mlp_within_group").astype(x_BTD.dtype)


def _stats(probs_BTE, expert_ids_BTC, real_BT) -> RouterStats:
    real_BT = real_BT.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(real_BT), 1)
    experts = jnp.arange(probs_BTE.shape[-1])[None, None, None, :]
    picks_BTE = jnp.sum(expert_ids_BTC[..., None] == experts, axis=2, dtype=jnp.float32)
    load_E = jnp.sum(picks_BTE * real_BT[:, :, None], axis=(0, 1)) / expert_ids_BTC.shape[-1]
    probability_E = jnp.sum(probs_BTE * real_BT[:, :, None], axis=(0, 1))
    entropy_BT = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(probs_BTE)), axis=-1)
    entropy = jnp.sum(entropy_BT * real_BT)
    return RouterStats(load_E / total, probability_E / total, entropy / total)
