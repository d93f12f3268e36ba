"""Token tables: they embed tokens or, transposed, score them.

A table in int8 is a QuantizedArray of V vectors: values (V, D), and a scale (V, 1) for each token.
Letters: B batch, T length, R rows (tokens), D embed, V vocab.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from grok import sharding
from grok.config import ModelConfig
from grok.model.linear import has_one_device
from grok.model.param_spec import ParamSpec, init_params
from grok.ops.cpu import few_rows
from grok.ops.cross_entropy import cross_entropy
from grok.ops.varying import pvary
from grok.ops.weights.quantized import QuantizedArray
from grok.ops.weights.weight import Weight, leaf_axes
from grok.sharding import Axes


class Embedding(nnx.Module):
    """A table that embeds tokens and, transposed, scores them; a model whose embeddings are not
    tied has one for each."""

    table_VD: nnx.Param

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """The token table."""
        shape = (config.vocab_size, config.embed_dim)
        return {"table_VD": ParamSpec.embed(shape, ("vocab", "embed"))}

    def __init__(self, key: jax.Array | None, config: ModelConfig):
        self.config = config
        init_params(self, key, self.param_specs(config), config)

    def _axes(self) -> Axes:
        """The axes that the table is stored in."""
        spec = self.param_specs(self.config)["table_VD"]
        return spec.storage_axes(self.config.param_dtype)

    def embed(self, tokens_BT: jax.Array, dtype: str) -> jax.Array:
        """Rows of the table, x_BTD. Each device looks up the part of the vocabulary it has."""
        table_VD: Weight = self.table_VD.get_value()
        if not self.config.is_quantized:  # whose table does not travel: rows alone are cast
            table_VD = table_VD.astype(dtype)
        leaves, structure = jax.tree.flatten(table_VD)
        axes = leaf_axes(table_VD, self._axes())

        def local(tokens_BT, *shards):
            pairs = zip(shards, axes, strict=True)
            arrays = [pvary(sharding.unshard_local(*pair)) for pair in pairs]
            here_BT = tokens_BT - sharding.axis_index("vocab") * len(arrays[0])
            # Out of range on either side reads zeros; negative indices would count from the end.
            here_BT = jnp.where(here_BT < 0, len(arrays[0]), here_BT)
            rows = [array.at[here_BT].get(mode="fill", fill_value=0) for array in arrays]
            x_BTD = _floats(jax.tree.unflatten(structure, rows), dtype)
            return sharding.psum(x_BTD, "vocab")

        sharded = sharding.shard_map(local, (("batch", "length"), *axes), ("batch", "length", None))
        return sharded(tokens_BT, *leaves)

    def cross_entropy(self, x_BTD, targets_BT, scale: float, softcap: float | None):
        """Cross-entropy and log-partition of every token, (B, T) float32 each, of the scores times
        `scale` and then capped; those of all tokens never exist at once."""
        table_VD = _floats(self.table_VD.get_value(), x_BTD.dtype)
        table_axes = self._axes()

        def local(x_BTD, targets_BT, table_VD):
            table_VD = sharding.unshard_local(table_VD, table_axes)
            x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
            arrays = jax.tree.map(pvary, (x_RD, table_VD, targets_BT.reshape(-1)))
            losses = cross_entropy(*arrays, scale, softcap, sharding.axis_names("vocab"))
            return tuple(loss_R.reshape(targets_BT.shape) for loss_R in losses)

        tokens = ("batch", "length")
        axes = (*tokens, None), tokens, table_axes
        return sharding.shard_map(local, axes, (tokens, tokens))(x_BTD, targets_BT, table_VD)

    def unembed(self, x_BTD: jax.Array, dtype: str, is_serving: bool) -> jax.Array:
        """Scores of all tokens, logits_BTV in float32; without gradients if `is_serving`."""
        values_VD, scale_V = _values_and_scale(self.table_VD.get_value())
        if is_serving and has_one_device():
            rows = math.prod(x_BTD.shape[:2])
            if few_rows.supports_arrays(rows, values_VD):
                score = sharding.without_trivial_mesh(few_rows.score)
                logits_BTV = score(x_BTD, values_VD, scale_V)
                return sharding.constrain(logits_BTV, "batch", "length", "vocab")
        values_VD = sharding.unshard(values_VD.astype(dtype), *self._axes())
        logits_BTV = sharding.einsum(
            "btd,vd->btv",
            x_BTD,
            values_VD,
            axes=("batch", "length", "vocab"),
            preferred_element_type=jnp.float32,
        )
        if scale_V is None:
            return logits_BTV
        return logits_BTV * scale_V.astype(jnp.float32)[None, None, :]


def _floats(table_VD: Weight, dtype) -> jax.Array:
    """The table, or rows of it, as floats."""
    if isinstance(table_VD, QuantizedArray):
        return table_VD.dequantize(dtype)
    return table_VD.astype(dtype)


def _values_and_scale(table_VD: Weight) -> tuple[jax.Array, jax.Array | None]:
    """The table's values, and of ints each token's scale."""
    if isinstance(table_VD, QuantizedArray):
        return table_VD.values, table_VD.scales[:, 0]
    return table_VD, None
