"""Parameters, RMSNorm, rotary embedding and the token table.

Letters: B batch, T length, D embed, N heads, H head_dim, V vocab, L layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from grok import sharding
from grok.config import GrokConfig
from grok.ops.cross_entropy import cross_entropy
from grok.ops.varying import pvary
from grok.ops.weights.int8 import QuantizedArray
from grok.ops.weights.lora import LoraArray
from grok.sharding import Axes

RMS_EPSILON = 1e-5


def normal(key: jax.Array, shape: tuple[int, ...], axes: Axes, dtype: str, fan_in: int):
    """A parameter drawn from a normal cut at two sigma, standard deviation 1/sqrt(fan_in)."""
    # Without a placement of its own, every device would draw the whole tensor and keep a part.
    parts = None if sharding.ambient_mesh() is None else sharding.spec(*axes)
    values = jax.random.truncated_normal(key, -2, 2, shape, out_sharding=parts)
    # 0.8796 is the standard deviation of a unit normal cut at two sigma.
    return nnx.Param((values / (0.87962566 * math.sqrt(fan_in))).astype(dtype))


def matrix(param: nnx.Param, axes: Axes, dtype) -> jax.Array:
    """A matrix in the type of computation, collected from the devices that share it.

    `axes` are the logical axes it is kept in. An int8 matrix travels as int8 and is multiplied by
    its scales where it arrives; only a float one has a gradient.
    """
    w = param.get_value()
    if not isinstance(w, QuantizedArray):
        return sharding.unshard(w.astype(dtype), *axes)
    w = w.sliced()
    scale_axes = quantized_axes(w, axes)
    whole, whole_scales = sharding.unsharded_axes(axes), sharding.unsharded_axes(scale_axes)
    values, scales = (
        sharding.constrain(w.values, *whole),
        sharding.constrain(w.scales, *whole_scales),
    )

    def local(values, scales):
        return dataclasses.replace(w, values=values, scales=scales).dequantize(dtype)

    return sharding.shard_map(local, (whole, whole_scales), whole)(values, scales)


def product(subscripts: str, x: jax.Array, param: nnx.Param, w_axes: Axes, axes: Axes) -> jax.Array:
    """`einsum(subscripts, x, w)` of a matrix that is kept in `w_axes`, split as `axes` says.

    What an adapter adds is computed beside it: x goes through the rank, and never a whole matrix.
    """
    w = param.get_value()
    if not isinstance(w, LoraArray):
        return sharding.einsum(subscripts, x, matrix(param, w_axes, x.dtype), axes=axes)
    w = w.scaled(x.dtype)
    inputs, out = subscripts.split("->")
    x_letters, w_letters = inputs.split(",")
    rows = "".join(letter for letter in w_letters if letter not in out)
    columns = w_letters.removeprefix(rows)
    kept = out.removesuffix(columns)
    base, a, b = (
        sharding.unshard(w.base, *w_axes),
        sharding.unshard(w.a, *w_axes[: len(rows)], None),
        sharding.unshard(w.b, None, *w_axes[len(rows) :]),
    )
    low = sharding.einsum(f"{x_letters},{rows}r->{kept}r", x, a, axes=(*axes[: len(kept)], None))
    added = sharding.einsum(f"{kept}r,r{columns}->{out}", low, b, axes=axes)
    return sharding.einsum(subscripts, x, base, axes=axes) + added


def quantized_axes(w: QuantizedArray, axes: Axes) -> Axes:
    """Logical axes of the scales of a matrix with these axes.

    Several groups of rows are split like the rows; a single one is on every device.
    """
    columns = len(axes) - w.output_dims
    rows = columns - w.contract_dims
    return (*axes[:rows], None if w.num_scale_groups == 1 else axes[rows], *axes[columns:])


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), in float32; the scale is used as it is."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.scale_D = nnx.Param(sharding.constrain(jnp.ones(shape, dtype), *(None,) * len(shape)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x / sqrt(mean(x^2) + 1e-5) * scale, in the type of `x_BTD`."""
        x = x_BTD.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + RMS_EPSILON)
        scale_D = self.scale_D[...].astype(jnp.float32)
        return (x * scale_D[None, None, :]).astype(x_BTD.dtype)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) over the whole head, half-split form.

    Element i of the first half and of the second turn together by position / theta^(2i/H);
    phases are float32.
    """
    H = x_BTNH.shape[-1]
    frequency = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    phase = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


class TokenTable(nnx.Module):
    """The one table that embeds tokens and, transposed, scores them."""

    def __init__(self, key: jax.Array, config: GrokConfig):
        c = config
        self.config, shape = c, (c.vocab_size, c.embed_dim)
        axes = sharding.embedding_axes(c.vocab_size, c.param_dtype)
        self.table_VD = normal(key, shape, axes, c.float_dtype, fan_in=c.embed_dim)

    def embed(self, tokens_BT: jax.Array, dtype: str) -> jax.Array:
        """Rows of the table, x_BTD. Each device looks up the part of the vocabulary it has."""
        table_VD = self.table_VD[...].astype(dtype)
        table_axes = sharding.embedding_axes(len(table_VD), self.config.param_dtype)

        def local(tokens_BT, table_VD):
            table_VD = pvary(sharding.unshard_local(table_VD, table_axes))
            here_BT = tokens_BT - sharding.axis_index("vocab") * table_VD.shape[0]
            # Out of range on either side reads zeros; negative indices would count from the end.
            here_BT = jnp.where(here_BT < 0, table_VD.shape[0], here_BT)
            x_BTD = table_VD.at[here_BT].get(mode="fill", fill_value=0)
            return sharding.psum(x_BTD, "vocab")

        axes = ("batch", "length"), table_axes
        form = sharding.shard_map(local, axes, ("batch", "length", None))
        return form(tokens_BT, table_VD)

    def cross_entropy(self, x_BTD, targets_BT, scale: float):
        """Cross-entropy and log-partition of every token, (B, T) float32 each, of the scores times
        `scale`; those of all tokens never exist at once."""
        table_VD = self.table_VD[...].astype(x_BTD.dtype)
        table_axes = sharding.embedding_axes(len(table_VD), self.config.param_dtype)

        def local(x_BTD, targets_BT, table_VD):
            table_VD = sharding.unshard_local(table_VD, table_axes)
            x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
            arrays = jax.tree.map(pvary, (x_RD, table_VD, targets_BT.reshape(-1)))
            losses = cross_entropy(*arrays, scale, sharding.axis_names("vocab"))
            return tuple(loss_R.reshape(targets_BT.shape) for loss_R in losses)

        tokens = ("batch", "length")
        axes = (*tokens, None), tokens, table_axes
        return sharding.shard_map(local, axes, (tokens, tokens))(x_BTD, targets_BT, table_VD)

    def unembed(self, x_BTD: jax.Array, dtype: str) -> jax.Array:
        """Scores of all tokens, logits_BTV in float32."""
        table_VD = self.table_VD[...].astype(dtype)
        table_VD = sharding.unshard(
            table_VD, *sharding.embedding_axes(len(table_VD), self.config.param_dtype)
        )
        return sharding.einsum(
            "btd,vd->btv",
            x_BTD,
            table_VD,
            axes=("batch", "length", "vocab"),
            preferred_element_type=jnp.float32,
        )
