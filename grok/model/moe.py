"""The mixture of experts of a block: the router, and the experts on the devices of a group.

Letters: L layers, B batch, T length, R = B*T rows, D embed, F mlp, E experts, C chosen experts.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from grok import hardware, sharding
from grok.config import ModelConfig
from grok.hardware import LANES
from grok.model.expert_group import GroupWork, run_on_group
from grok.model.param_spec import ParamSpec, init_params
from grok.model.scaled import experts_in_8_bits
from grok.ops.moe.experts_pallas import experts_pallas, experts_pallas_split_mlp
from grok.ops.moe.experts_xla import experts_xla
from grok.ops.moe.tiling import mlp_splits, serving_tile_rows, training_tile_rows, xla_tile_rows
from grok.ops.softcap import apply_softcap
from grok.ops.varying import pvary
from grok.ops.weights.weight import adapter, is_plain

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

    The weights of the chosen are the softmax over all E; by choice they are normalised, which
    makes them the softmax over the chosen ones.
    """

    router_DE: nnx.Param
    w_gate_EDF: nnx.Param
    w_up_EDF: nnx.Param
    w_down_EFD: nnx.Param

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """The router and the experts of one layer."""
        assert config.moe is not None
        D, F, E = config.embed_dim, config.moe.dim, config.moe.num_experts
        in_axes = ("experts", "embed", "mlp")
        return {
            "router_DE": ParamSpec.router((D, E), ("embed", "experts")),
            "w_gate_EDF": ParamSpec.matmul((E, D, F), in_axes, 1, 1),
            "w_up_EDF": ParamSpec.matmul((E, D, F), in_axes, 1, 1),
            "w_down_EFD": ParamSpec.matmul((E, F, D), ("experts", "mlp", "embed"), 1, 1),
        }

    def __init__(self, key: jax.Array | None, config: ModelConfig):
        assert config.moe is not None
        self.config, self.moe_config = config, config.moe
        init_params(self, key, self.param_specs(config), config, config.num_layers)

    def __call__(
        self,
        x_BTD: jax.Array,
        token_mask_BT: jax.Array | None,
        axes: sharding.Axes,
        beside: Sequence[GroupWork] = (),
    ) -> tuple[jax.Array, Routing]:
        """Returns y_BTD, with what works `beside` the experts add, and the routing; x and y are
        split as `axes` says.

        Tokens outside of the mask go to no expert, so that none is read for them; None: all go.
        """
        with jax.named_scope("router"):
            probs_BTE = self.route(x_BTD, axes)
        topk_weights_BTC, expert_ids_BTC = jax.lax.top_k(probs_BTE, self.moe_config.num_selected)
        if self.moe_config.normalize:
            topk_weights_BTC /= jnp.sum(topk_weights_BTC, axis=-1, keepdims=True)
        # The kernels of TPUs know no mask, nor do products in 8 bits.
        if token_mask_BT is not None and hardware.platform() != "tpu" and not self._is_in_8_bits:
            expert_ids_BTC = jnp.where(
                token_mask_BT[:, :, None], expert_ids_BTC, self.moe_config.num_experts
            )
        params = {name: getattr(self, name) for name in EXPERTS}
        work = GroupWork(self._run, params, self.param_specs(self.config))
        tokens = x_BTD, topk_weights_BTC, expert_ids_BTC
        y_BTD = run_on_group([work, *beside], tokens, self.config, axes)
        return y_BTD, Routing(probs_BTE, expert_ids_BTC, axes)

    @property
    def _is_in_8_bits(self) -> bool:
        return self.config.matmul_dtype != "compute"

    def route(self, x_BTD: jax.Array, axes: sharding.Axes) -> jax.Array:
        """Router probabilities of all experts, probs_BTE, in float32 whatever the type of x."""
        logits_BTE = sharding.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            self.router_DE[...].astype(jnp.float32),
            axes=axes,
            precision=jax.lax.Precision.HIGHEST,
        )
        return jax.nn.softmax(apply_softcap(logits_BTE, self.moe_config.logit_softcap), axis=-1)

    def _run(self, rows, leaves, unshard: Callable) -> jax.Array:
        with jax.named_scope("experts"):
            return self._run_experts(rows, leaves, unshard)

    def _run_experts(self, rows, leaves, unshard: Callable) -> jax.Array:
        """y_RD of rows (x_RD, topk_weights_RC, expert_ids_RC), by this device's slice of the
        experts' width; `unshard` makes the matrices of their `leaves`."""
        rows = jax.tree.map(pvary, rows)
        if self._is_in_8_bits:
            return experts_in_8_bits(rows, leaves, unshard, self.config, self.moe_config.activation)
        if hardware.platform() != "tpu":
            weights = jax.tree.map(pvary, unshard(leaves))
            (R, C), E = rows[1].shape, self.moe_config.num_experts
            is_serving = not is_plain(weights[0]) and adapter(weights[0]) is None
            tile_rows = serving_tile_rows if is_serving else xla_tile_rows
            tiles = tile_rows(R, C, E), training_tile_rows(R, C, E)
            return experts_xla(*rows, *weights, *tiles, self.moe_config.activation)
        # Gathered along its columns, a matrix has them major in memory.
        down_is_column_major = sharding.axis_size("fsdp_embed") > 1
        options = down_is_column_major, False, self.moe_config.activation
        splits = mlp_splits(leaves[0].shape[-1], LANES)
        # Where the backward pass wants the output and it is not saved, remat computes the hidden
        # layer again, and so would this: once too often.
        output_is_at_hand = self.config.saves_experts or not self.config.norm.sandwich
        if output_is_at_hand and len(leaves) == len(EXPERTS) and splits.backward > 1:
            shards = tuple(map(pvary, leaves))
            return experts_pallas_split_mlp(*rows, shards, unshard, splits, *options)
        weights = jax.tree.map(pvary, unshard(leaves))
        return experts_pallas(*rows, *weights, *options)


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
