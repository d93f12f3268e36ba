"""The kernels as functions of arrays. They serve the forward pass only.

A row's bits do not depend on other rows, their number, or the number of threads. A row of zeros is
not multiplied: its products are zeros. Weights of floats are rounded to the type of x; ints are
multiplied as they are, and a group's sum by its scale. All is summed in float32.

Letters: L layers, R rows, D contracted, F columns, V vocabulary, C chosen experts, E experts,
G groups of scales.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok.ops.cpu import library
from grok.ops.varying import pvary

TABLE_ROWS = 64  # rows of a table likewise
ACTIVATIONS = ("gelu_tanh", "gelu", "silu")


class Stack(NamedTuple):
    """Matrices of all layers: values (L, ..., D, F) and, of ints, scales (L, ..., G, F)."""

    values: jax.Array
    scales: jax.Array | None = None

    @property
    def operands(self) -> tuple[jax.Array, ...]:
        """The arrays that there are."""
        return (self.values,) if self.scales is None else (self.values, self.scales)


def multiply(x_RD: jax.Array, layer: jax.Array, stacks: list[Stack]) -> list[jax.Array]:
    """x w for the matrices of one layer of each stack (L, D, F), y_RF float32."""
    shapes = [_floats(x_RD, stack.values.shape[-1]) for stack in stacks]
    operands = [array for stack in stacks for array in stack.operands]
    return _call("grok_multiply", shapes, _index(layer), x_RD, *operands)


def score(x_RD: jax.Array, table_VD: jax.Array, scale_V: jax.Array | None = None) -> jax.Array:
    """x table^T, y_RV float32; of an int8 table times the scale of each token."""
    shapes = [_floats(x_RD, len(table_VD))]
    operands = (table_VD,) if scale_V is None else (table_VD, scale_V)
    return _call("grok_score", shapes, x_RD, *operands, rows=np.int64(TABLE_ROWS))[0]


def experts(
    x_RD: jax.Array,
    topk_weights_RC: jax.Array,
    expert_ids_RC: jax.Array,
    layer: jax.Array,
    stacks: tuple[Stack, Stack, Stack],
    activation: str,
) -> jax.Array:
    """Sum over each row's experts of weight * down(act(gate) * up), y_RD float32.

    The stacks are those of gate and up, (L, E, D, F), and down, (L, E, F, D). An id outside of
    [0, E) adds nothing.
    """
    matrices = [array for stack in stacks for array in stack.operands]
    operands = (_index(layer), x_RD, topk_weights_RC, expert_ids_RC, *matrices)
    kind = np.int64(ACTIVATIONS.index(activation))
    shapes = [_floats(x_RD, x_RD.shape[1])]
    return _call("grok_experts", shapes, *operands, activation=kind)[0]


def attention(
    q_UNH: jax.Array,
    kv_LPSK2H: jax.Array,
    layer: jax.Array,
    table_UM: jax.Array,
    start_U: jax.Array,
    count_U: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None = None,
    temperature_length: int | None = None,
) -> jax.Array:
    """Attention of one new token of each sequence over its pages, o_UNH float32, as of
    `grok.ops.attention.paged.paged_attention`; zeros where `count_U` is 0."""
    shapes = [jax.ShapeDtypeStruct(q_UNH.shape, jnp.float32)]
    operands = (_index(layer), q_UNH, kv_LPSK2H, table_UM, start_U, count_U)
    return _call(
        "grok_attention",
        shapes,
        *operands,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(window or 0),
        temperature_length=np.int64(temperature_length or 0),
    )[0]


def argmax(scores_RV: jax.Array, banned_RW: jax.Array) -> jax.Array:
    """The first of each row's largest scores, tokens_R int32, among those of which the bit is not
    set; 0 where none is above -inf. `banned_RW` are uint8 with the lowest bit first."""
    shapes = [jax.ShapeDtypeStruct(scores_RV.shape[:1], jnp.int32)]
    return _call("grok_argmax", shapes, scores_RV, banned_RW)[0]


def logsumexp(scores_RV: jax.Array) -> jax.Array:
    """Logarithm of the sum of each row's exponentials, (R,) float32; inf where a score is no
    number."""
    shapes = [jax.ShapeDtypeStruct(scores_RV.shape[:1], jnp.float32)]
    return _call("grok_logsumexp", shapes, scores_RV)[0]


def _floats(x_RD: jax.Array, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(x_RD), columns), jnp.float32)


def _index(layer) -> jax.Array:
    return jnp.asarray(layer, jnp.int32)


def _call(kernel: str, shapes: list, *operands: jax.Array, **attributes: Any) -> list[jax.Array]:
    call = jax.ffi.ffi_call(library.load().targets[kernel], shapes)
    return [pvary(y) for y in call(*map(pvary, operands), **attributes)]
