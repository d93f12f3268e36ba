"""The mixture of experts of a block: router, experts, and how both are spread over a mesh.

Letters: L layers, B batch, T length, R = B*T rows, D embed, F mlp, E experts, C chosen experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from grok import hardware, sharding
from grok.config import ModelConfig
from grok.hardware import LANES
from grok.model.linear import quantized_axes
from grok.model.param_spec import ParamSpec, init_params
from grok.ops.moe.experts_pallas import MLP_SPLITS, experts_pallas, experts_pallas_split_mlp
from grok.ops.moe.experts_xla import experts_xla
from grok.ops.moe.tiling import serving_tile_rows, training_tile_rows, xla_tile_rows
from grok.ops.varying import pvary
from grok.ops.weights.int8 import QuantizedArray
from grok.ops.weights.layer_slice import LayerSlice
from grok.ops.weights.lora import LoraArray

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
    """Experts with a GELU gate; each token goes to the C of highest router probability.

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
        keys = jax.random.split(key, 4)
        init_params(self, keys, self.param_specs(config), config, config.num_layers)

    def __call__(
        self, x_BTD: jax.Array, token_mask_BT: jax.Array | None, axes: sharding.Axes
    ) -> tuple[jax.Array, Routing]:
        """Returns y_BTD and the routing; x and y are split as `axes` says.

        Tokens outside of the mask go to no expert, so that none is read for them; None: all go.
        """
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

    def _experts(self, x_BTD, topk_weights_BTC, expert_ids_BTC, stream: sharding.Axes):
        """Tokens travel to the experts: each device collects those of its group, runs its slice of
        every expert on the rows that chose it, and hands the partial sums back."""
        C = self.config.moe.num_selected
        weights = [getattr(self, name).get_value() for name in EXPERTS]
        specs = self.param_specs(self.config)
        axes: list[sharding.Axes] = []
        for place, name in enumerate(EXPERTS):
            w_axes = specs[name].storage_axes(self.config.param_dtype)
            w = weights[place]
            if isinstance(w, LoraArray):
                weights[place] = w.scaled(x_BTD.dtype)
                axes += [w_axes, (*w_axes[:2], None), (w_axes[0], None, w_axes[2])]
                continue
            if sharding.axis_size("fsdp_embed") > 1 and isinstance(w, LayerSlice | QuantizedArray):
                # What is collected from other devices should be one layer.
                w = weights[place] = w.sliced()
            if isinstance(w, LayerSlice):
                axes += [(None, *w_axes), ()]  # and the number of the layer
                continue
            if not isinstance(w, QuantizedArray):
                weights[place] = w.astype(x_BTD.dtype)
                axes.append(w_axes)
                continue
            lead = () if w.layer is None else (None,)
            axes += [(*lead, *w_axes), (*lead, *quantized_axes(w, w_axes))]
            axes += [()] * len(lead)  # the number of the layer
        parts = jax.tree.leaves(weights)
        kinds = jax.tree.structure(weights)

        def local(x, gate, chosen, *parts):
            x, gate, chosen = (
                sharding.all_gather(a, "expert_group", dim=0) for a in (x, gate, chosen)
            )
            x = sharding.pin_row_major(x)
            rows = (x.reshape(-1, x.shape[-1]), gate.reshape(-1, C), chosen.reshape(-1, C))
            y_RD = self._routed(rows, parts, kinds, axes)
            y = sharding.pin_row_major(y_RD.reshape(x.shape))
            y = sharding.pin_row_major(sharding.psum_scatter(y, "expert_group", dim=0))
            if stream[1] == "sp_length":
                return sharding.psum_scatter(y, "sp_length", dim=1).astype(x.dtype)
            return sharding.psum(y, "mlp_within_group").astype(x.dtype)

        tokens = ("batch", "length", None)
        form = sharding.shard_map(local, (tokens, tokens, tokens, *axes), stream)
        return form(
            *(sharding.constrain(a, *tokens) for a in (x_BTD, topk_weights_BTC, expert_ids_BTC)),
            *parts,
        )

    def _routed(self, rows, parts, kinds, axes) -> jax.Array:
        """y_RD of rows (x_RD, topk_weights_RC, expert_ids_RC), by this device's part of the
        experts' width."""

        def collect(parts):
            whole = [sharding.unshard_local(*each) for each in zip(parts, axes, strict=True)]
            return jax.tree.unflatten(kinds, whole)

        rows = jax.tree.map(pvary, rows)
        tpu = hardware.platform() == "tpu"
        # Gathered along its columns, a matrix has them major in memory.
        down_is_column_major = sharding.axis_size("fsdp_embed") > 1
        plain = kinds == jax.tree.structure([*EXPERTS])
        # Else the blocks' remat computes the hidden layer again, and so would this: once too often.
        kept = self.config.saves_experts
        if tpu and kept and plain and parts[0].shape[-1] % (MLP_SPLITS * LANES) == 0:
            shards = tuple(map(pvary, parts))
            return experts_pallas_split_mlp(*rows, shards, collect, down_is_column_major)
        weights = jax.tree.map(pvary, collect(parts))
        if tpu:
            return experts_pallas(*rows, *weights, down_is_column_major)
        (R, C), E = rows[1].shape, self.config.moe.num_experts
        is_serving = isinstance(weights[0], LayerSlice | QuantizedArray)
        tile_rows = serving_tile_rows if is_serving else xla_tile_rows
        return experts_xla(*rows, *weights, tile_rows(R, C, E), training_tile_rows(R, C, E))


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
