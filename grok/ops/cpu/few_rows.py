"""Products of few rows with weights of any kind by the kernels, where these can be used.

Letters: R rows, D contracted, F columns, V vocabulary, C chosen experts, E experts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from grok import hardware
from grok.ops.cpu import calls, library
from grok.ops.cpu.calls import Stack
from grok.ops.weights.weight import Weight, is_stacked, kernel_operands

# Past so many rows a product is bound by arithmetic, for which XLA's own is better.
MAX_ROWS = 64


def is_usable() -> bool:
    """True where there are kernels for the devices that are traced for."""
    return hardware.platform() == "cpu" and library.load().is_usable


def describe() -> str | None:
    """A sentence on what decodes on this CPU, and why; None on other platforms."""
    if hardware.platform() != "cpu":
        return None
    kernels = library.load()
    if kernels.is_usable:
        return f"decoding by kernels in C, {kernels.reason}"
    return f"decoding by the portable forms, which are slower and use one core: {kernels.reason}"


def supports(rows: int, *weights: Weight) -> bool:
    """True where the kernels multiply so many rows by these layers of stacks."""
    return all(map(is_stacked, weights)) and supports_arrays(
        rows, *(kernel_operands(w)[1] for w in weights)
    )


def supports_arrays(rows: int, *arrays: jax.Array) -> bool:
    """True where the kernels multiply so many rows by matrices of these values."""
    return rows <= MAX_ROWS and is_usable() and all(map(_has_kernel, arrays))


def multiply(x_RD: jax.Array, *weights: Weight) -> list[jax.Array]:
    """x w for each weight, (rows..., columns...) with as many values in its rows as x has, y_RF in
    the type of x."""
    stacks = [_matrices(w, x_RD.shape[1]) for w in weights]
    layer = kernel_operands(weights[0])[0]
    return [y_RF.astype(x_RD.dtype) for y_RF in calls.multiply(x_RD, layer, stacks)]


def experts(
    x_RD, topk_weights_RC, expert_ids_RC, gate: Weight, up: Weight, down: Weight, activation: str
) -> jax.Array:
    """Sum over each row's experts of weight * down(act(gate) * up), y_RD float32; an id outside of
    [0, E) adds nothing."""
    layer = kernel_operands(gate)[0]
    gates, ups, downs = (Stack(*kernel_operands(w)[1:]) for w in (gate, up, down))
    rows = x_RD, topk_weights_RC, expert_ids_RC
    return calls.experts(*rows, layer, (gates, ups, downs), activation)


def score(x_BTD: jax.Array, table_VD: jax.Array, scale_V: jax.Array | None = None) -> jax.Array:
    """Products with the rows of a table, logits_BTV float32; of an int8 table times each one's
    scale."""
    x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return calls.score(x_RD, table_VD, scale_V).reshape(*x_BTD.shape[:2], -1)


def supports_attention(tokens: int, q: jax.Array, kv: jax.Array, kv_scale: Any) -> bool:
    """True where the kernel reads the pages for so many new tokens of each sequence."""
    return tokens == 1 and kv_scale is None and q.dtype == kv.dtype and supports_arrays(1, kv)


def attention(q_U1NH, kv, layer, table_UM, start_U, count_U, **terms: Any) -> jax.Array:
    """Attention of one new token of each sequence over its pages, as of `paged_attention`; zeros
    where `count_U` is 0."""
    rows = table_UM, start_U, count_U
    o_UNH = calls.attention(q_U1NH[:, 0], kv, layer, *rows, **terms)
    return o_UNH[:, None].astype(q_U1NH.dtype)


def _matrices(w: Weight, num_rows: int) -> Stack:
    """The stack of a weight as (L, rows, columns)."""
    _, values, scales = kernel_operands(w)
    num_layers, *shape = values.shape
    num_columns = math.prod(shape) // num_rows
    values = values.reshape(num_layers, num_rows, num_columns)
    return Stack(values, scales if scales is None else scales.reshape(num_layers, -1, num_columns))


def _has_kernel(values: jax.Array) -> bool:
    # A row of int4 values begins with a byte.
    is_int4 = values.dtype == "int4" and values.shape[-1] % 2 == 0
    return is_int4 or values.dtype in ("float32", "bfloat16", "int8")


def live_rows(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` (..., F) with zeros in rows outside of the mask (...), which the kernels then leave out;
    on other platforms `x` itself."""
    if not is_usable():
        return x
    return jnp.where(mask[..., None], x, jnp.zeros_like(x))
