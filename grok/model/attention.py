"""The attention of a block: projections and rotary embedding around the attention of `attend`.

Letters: B batch, T length, D embed, N heads, K kv heads, H head_dim.
"""

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from grok import sharding
from grok.config import ModelConfig
from grok.model.attend import Attend
from grok.model.linear import few_rows_products, product
from grok.model.param_spec import ParamSpec, init_params
from grok.model.rope import apply_rope
from grok.model.scaled import Projection, projection, projection_of_quantized
from grok.ops.weights.weight import cast, materialize


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding."""

    w_query_DNH: nnx.Param
    w_key_DKH: nnx.Param
    w_value_DKH: nnx.Param
    w_out_NHD: nnx.Param

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """The projections of one layer."""
        c = config.attention
        D, N, K, H = config.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        kv_axes = ("embed", "kv_heads", "head_dim")
        return {
            "w_query_DNH": ParamSpec.matmul((D, N, H), ("embed", "heads", "head_dim"), 1, 2),
            "w_key_DKH": ParamSpec.matmul((D, K, H), kv_axes, 1, 2),
            "w_value_DKH": ParamSpec.matmul((D, K, H), kv_axes, 1, 2),
            "w_out_NHD": ParamSpec.matmul((N, H, D), ("heads", "head_dim", "embed"), 2, 1),
        }

    def __init__(self, key: jax.Array | None, config: ModelConfig):
        self.config = config
        init_params(self, key, self.param_specs(config), config, config.num_layers)

    def __call__[A: Attend](self, x_BTD: jax.Array, attend: A) -> tuple[jax.Array, A]:
        """Returns y_BTD, and `attend` with the keys and values of these tokens where it caches.

        x and y are split as the residual stream of `attend` is.
        """
        x_BTD = sharding.constrain(x_BTD, "batch", "length", None)
        kv = sharding.kv_axis(self.config.attention.num_kv_heads)
        rope, positions_BT = self.config.attention.rope, attend.positions_BT
        multiply = functools.partial(self._product, attend.is_serving)
        params = self.w_query_DNH, self.w_key_DKH, self.w_value_DKH
        axes = [("batch", "length", heads, None) for heads in ("heads", kv, kv)]
        q_BTNH, k_BTKH, v_BTKH = few_rows_products(x_BTD, params, axes, attend.is_serving) or (
            multiply("btd,dnh->btnh", x_BTD, "w_query_DNH", "heads", None),
            multiply("btd,dkh->btkh", x_BTD, "w_key_DKH", kv, None),
            multiply("btd,dkh->btkh", x_BTD, "w_value_DKH", kv, None),
        )
        q_BTNH, k_BTKH = (apply_rope(x, positions_BT, rope) for x in (q_BTNH, k_BTKH))
        q_BTNH, k_BTKH, v_BTKH = (
            checkpoint_name(x, "projections") for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        o_BTNH, attended = attend(q_BTNH, k_BTKH, v_BTKH, self.config.attention)
        y_BTD = multiply("btnh,nhd->btd", o_BTNH, "w_out_NHD", None)
        y_BTD = sharding.constrain(y_BTD, *attend.stream_axes(x_BTD.shape[1]))
        return checkpoint_name(y_BTD, "projections"), attended

    def _product(
        self, is_serving: bool, subscripts: str, x: jax.Array, name: str, *axes: str | None
    ) -> jax.Array:
        """The product with a projection, split as `axes` says behind batch and length."""
        spec = self.param_specs(self.config)[name]
        stored = spec.storage_axes(self.config.param_dtype)
        param = getattr(self, name)
        # In int4 so few rows share a scale that a product for each group of them would not pay.
        is_int4 = spec.quantized_dtype(self.config.param_dtype) == "int4"
        if self.config.matmul_dtype != "compute" and not is_int4:
            matrix = Projection(stored, spec.contract_dims, self.config.matmul_dtype)
            multiply = projection_of_quantized if self.config.is_quantized else projection
            return multiply(x, cast(materialize(param.get_value()), x.dtype), matrix)
        split = "batch", "length", *axes
        return product(subscripts, x, param, stored, split, is_serving)
