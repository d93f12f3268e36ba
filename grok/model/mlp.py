"""The dense MLP of a block, spread over a mesh as the experts are.

Letters: B batch, T length, R = B*T rows, D embed, F mlp.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from grok import hardware, sharding
from grok.config import ModelConfig
from grok.model.expert_group import GroupWork, run_on_group
from grok.model.param_spec import ParamSpec, init_params
from grok.model.scaled import mlp_in_8_bits
from grok.ops.mlp import gated_mlp
from grok.ops.moe.experts_pallas import experts_pallas
from grok.ops.moe.experts_xla import experts_xla
from grok.ops.moe.tiling import serving_tile_rows
from grok.ops.varying import pvary
from grok.ops.weights.weight import adapter, as_one_expert, is_plain


class MLP(nnx.Module):
    """Gated MLP (Shazeer 2020): down(act(gate(x)) * up(x))."""

    w_gate_DF: nnx.Param
    w_up_DF: nnx.Param
    w_down_FD: nnx.Param

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """The matrices of one layer."""
        assert config.mlp is not None
        D, F = config.embed_dim, config.mlp.dim
        return {
            "w_gate_DF": ParamSpec.matmul((D, F), ("embed", "mlp"), 1, 1),
            "w_up_DF": ParamSpec.matmul((D, F), ("embed", "mlp"), 1, 1),
            "w_down_FD": ParamSpec.matmul((F, D), ("mlp", "embed"), 1, 1),
        }

    def __init__(self, key: jax.Array | None, config: ModelConfig):
        self.config = config
        init_params(self, key, self.param_specs(config), config, config.num_layers)

    def __call__(self, x_BTD: jax.Array, axes: sharding.Axes) -> jax.Array:
        """Returns y_BTD; x and y are split as `axes` says."""
        return run_on_group([self.group_work()], (x_BTD,), self.config, axes)

    def group_work(self) -> GroupWork:
        """The work of the devices of a group."""
        specs = self.param_specs(self.config)
        return GroupWork(self._run, {name: getattr(self, name) for name in specs}, specs)

    def _run(self, rows, leaves, unshard) -> jax.Array:
        """y_RD of this device's slice of the width."""
        assert self.config.mlp is not None
        if self.config.matmul_dtype != "compute":
            x = jax.tree.map(pvary, rows[0])
            with jax.named_scope("mlp"):
                return mlp_in_8_bits(x, leaves, unshard, self.config, self.config.mlp.activation)
        x_RD = pvary(rows[0])
        weights = jax.tree.map(pvary, unshard(leaves))
        with jax.named_scope("mlp"):
            if all(is_plain(w) or adapter(w) for w in weights):
                gate, up, down = weights
                return gated_mlp(x_RD, gate, up, down, self.config.mlp.activation)
            return _one_expert(x_RD, weights, self.config.mlp.activation)


def _one_expert(x_RD, weights, activation: str) -> jax.Array:
    """y_RD of int8 or stacked matrices, by the kernels that read those where they lie: the MLP is
    one expert, to which every row goes."""
    R = len(x_RD)
    weights = [as_one_expert(w) for w in weights]
    assignment = pvary(jnp.ones((R, 1), jnp.float32)), pvary(jnp.zeros((R, 1), jnp.int32))
    if hardware.platform() == "tpu":
        down_is_column_major = sharding.axis_size("fsdp_embed") > 1
        return experts_pallas(x_RD, *assignment, *weights, down_is_column_major, False, activation)
    tile = serving_tile_rows(R, 1, 1)
    return experts_xla(x_RD, *assignment, *weights, tile, (), activation)
