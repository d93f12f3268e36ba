"""The kernels that `grok calibrate` runs, each with inputs and the reference that it must equal.

Letters: R rows (tokens), C chosen experts of a row, E experts, P slots, K contracted axis and N
columns of a product; of attention B rows, T length, N heads, K kv heads, H head_dim; of a paged
cache U sequences, L layers, S tokens of a page, M pages of the longest sequence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok.ops.attention.causal import attention_reference
from grok.ops.attention.flash import flash_attention
from grok.ops.attention.int8_pages import scale_lanes
from grok.ops.attention.paged import paged_attention, paged_attention_reference, write_pages
from grok.ops.attention.ragged import ragged_attention
from grok.ops.mlp import gated_activation
from grok.ops.moe import experts_pallas, grouped_hidden, grouped_matmul
from grok.ops.moe.experts_xla import experts_reference, experts_xla
from grok.ops.moe.tiling import serving_tile_rows, xla_tile_rows
from grok.ops.weights.int8 import QuantizedArray, quantize
from grok.ops.weights.layer_slice import LayerSlice
from grok.ops.weights.lora import LoraArray


class Sizes(NamedTuple):
    """Sizes of a check's arrays."""

    dtype: str
    rows: int
    embed: int
    mlp: int
    experts: int
    tile: int  # rows of a tile of the grouped products
    length: int  # tokens of a row of attention
    page_size: int
    pages: int  # of the longest sequence
    prompt: int  # new tokens of a sequence, where they are a prompt's


SMALL = Sizes("float32", 48, 64, 96, 4, 16, 256, 32, 4, 40)  # seconds in an interpreter
FULL = Sizes("bfloat16", 4096, 2048, 4096, 8, 128, 4096, 64, 32, 512)
CHOSEN = 2  # experts of a row
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
SCALE, SOFTCAP = 0.3, 5.0  # logits of several units: the softcap matters


class Check(NamedTuple):
    """A kernel and its reference, both of the same inputs; results are compared by name."""

    name: str
    make_inputs: Callable[[Sizes], tuple]
    kernel: Callable[..., dict[str, jax.Array]]  # takes `interpret` too
    reference: Callable[..., dict[str, jax.Array]]
    is_pallas: bool = True  # False: plain XLA, which needs no interpreter
    can_interpret: bool = True


def _normal(sizes: Sizes, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, sizes.dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def _matrices(sizes: Sizes) -> list[jax.Array]:
    """Gate, up and down of all experts, with outputs of unit size."""
    E, D, F = sizes.experts, sizes.embed, sizes.mlp
    gate, up, down = _normal(sizes, (E, D, F), (E, D, F), (E, F, D))
    return [gate * D**-0.5, up * D**-0.5, down * F**-0.5]


# Grouped products. An expert has no tile, another several.


def _tiles(sizes: Sizes) -> jax.Array:
    return jnp.asarray([2, 0, 1, *[1] * (sizes.experts - 3)], jnp.int32)


def _grouped_inputs(sizes: Sizes) -> tuple:
    """x_PK, dy_PN, w_EKN, the tiles of the experts, and a tile of rows without values."""
    E, K, N, P = sizes.experts, sizes.embed, sizes.mlp, sizes.tile * (sizes.experts + 2)
    x_PK, dy_PN, w_EKN = _normal(sizes, (P, K), (P, N), (E, K, N))
    return x_PK, dy_PN, w_EKN, _tiles(sizes), jnp.zeros(sizes.tile)


def _used(y_PN, tiles_E, tile_M) -> jax.Array:
    """Rows of the tiles that there are, and zeros: what lies behind them is not written."""
    is_used_P = jnp.arange(len(y_PN)) < jnp.sum(tiles_E) * len(tile_M)
    return jnp.where(is_used_P[:, None], y_PN, 0)


def _int8(w) -> QuantizedArray:
    """The matrices as layer 1 of two, as serving has them, two groups of rows each."""
    values, scales = quantize(w, 2)
    stack = jnp.stack([jnp.zeros_like(values), values]), jnp.stack([scales, scales])
    return QuantizedArray(*stack, layer=jnp.int32(1))


def _matmul(x_PK, dy_PN, w_EKN, tiles_E, tile_M, interpret, *, transposed=False, store=None):
    xs = dy_PN if transposed else x_PK
    w = store(w_EKN) if store else w_EKN
    y_PN = grouped_matmul.grouped_matmul(
        (xs,), (w,), tiles_E, len(tile_M), dtype=x_PK.dtype, transposed=transposed,
        interpret=interpret,
    )  # fmt: skip
    return {"y": _used(y_PN, tiles_E, tile_M)}


def _matmul_reference(x_PK, dy_PN, w_EKN, tiles_E, tile_M, *, transposed=False, store=None):
    xs = dy_PN if transposed else x_PK
    w = jnp.swapaxes(w_EKN, 1, 2) if transposed else w_EKN
    w = store(w) if store else w
    return {"y": grouped_matmul.grouped_matmul_reference(xs, w, tiles_E, len(tile_M))}


def _hidden(x_PK, dy_PN, w_EKN, tiles_E, tile_M, interpret):
    results = grouped_hidden.grouped_hidden(
        x_PK, w_EKN, w_EKN[:, ::-1], tiles_E, len(tile_M), activation=gated_activation,
        keep_products=True, interpret=interpret,
    )  # fmt: skip
    names = "hidden", "gate", "up"
    return {n: _used(y, tiles_E, tile_M) for n, y in zip(names, results, strict=True)}


def _hidden_reference(x_PK, dy_PN, w_EKN, tiles_E, tile_M):
    results = grouped_hidden.grouped_hidden_reference(
        x_PK, w_EKN, w_EKN[:, ::-1], tiles_E, len(tile_M), activation=gated_activation
    )
    return dict(zip(("hidden", "gate", "up"), results, strict=True))


def _weight_gradient(x_PK, dy_PN, w_EKN, tiles_E, tile_M, interpret):
    return {
        "dw": grouped_matmul.grouped_weight_gradient(
            x_PK, dy_PN, tiles_E, len(tile_M), dtype=jnp.float32, interpret=interpret
        )
    }


def _weight_gradient_reference(x_PK, dy_PN, w_EKN, tiles_E, tile_M):
    reference = grouped_matmul.weight_gradient_reference
    return {"dw": reference(x_PK, dy_PN, tiles_E, len(tile_M))}


# The routed experts.


def _experts_inputs(sizes: Sizes) -> tuple:
    """x_RD, weights and ids of the chosen experts, the matrices, and factors of an adapter."""
    R, D, E, F = sizes.rows, sizes.embed, sizes.experts, sizes.mlp
    x_RD, logits_RE = _normal(sizes, (R, D), (R, E))
    weights_RC, ids_RC = jax.lax.top_k(logits_RE.astype(jnp.float32), CHOSEN)
    shapes = [shape for m, n in ((D, F), (D, F), (F, D)) for shape in ((E, m, 8), (E, 8, n))]
    factors = [0.3 * factor for factor in _normal(sizes, *shapes)]
    rows = x_RD, jax.nn.sigmoid(weights_RC), ids_RC.astype(jnp.int32)
    return *rows, _matrices(sizes), factors


def _value_and_gradients(experts, x_RD, weights_RC, ids_RC, trained) -> dict[str, jax.Array]:
    """The result y, and gradients of a sum of it with factors between -1 and 1."""

    def loss(x_RD, weights_RC, trained):
        y_RD = experts(x_RD, weights_RC, ids_RC, trained)
        factors = jnp.cos(jnp.arange(y_RD.size, dtype=jnp.float32)).reshape(y_RD.shape)
        return jnp.sum(y_RD.astype(jnp.float32) * factors), y_RD

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    (dx, dweights, dtrained), y_RD = gradient(x_RD, weights_RC, trained)
    named = {f"dw{i}": dw for i, dw in enumerate(dtrained)}
    return {"y": y_RD, "dx": dx, "dweights": dweights} | named


def _experts(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    def run(x, weights, ids, matrices):
        return experts_pallas.experts_pallas(x, weights, ids, *matrices, False, interpret)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_split(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    def run(x, weights, ids, matrices):
        split = experts_pallas.experts_pallas_split_mlp
        return split(x, weights, ids, tuple(matrices), list, False, interpret)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_plain(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    """The portable form, in tiles as training has them."""
    R, C = ids_RC.shape
    tile = xla_tile_rows(R, C, len(matrices[0]))

    def run(x, weights, ids, matrices):
        return experts_xla(x, weights, ids, *matrices, tile)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_reference(x_RD, weights_RC, ids_RC, matrices, factors):
    def run(x, weights, ids, matrices):
        return experts_reference(x, weights, ids, *matrices)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, matrices)


def _experts_int8(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    run: Callable = experts_pallas.experts_pallas
    return {"y": run(x_RD, weights_RC, ids_RC, *map(_int8, matrices), False, interpret)}


def _experts_int8_reference(x_RD, weights_RC, ids_RC, matrices, factors):
    dense = [_int8(w).dequantize(x_RD.dtype) for w in matrices]
    return {"y": experts_reference(x_RD, weights_RC, ids_RC, *dense)}


def _pairs(matrices, factors):
    return zip(matrices, factors[::2], factors[1::2], strict=True)


def _experts_lora(x_RD, weights_RC, ids_RC, matrices, factors, interpret):
    def run(x, weights, ids, factors):
        adapted = [LoraArray(w, a, b) for w, a, b in _pairs(matrices, factors)]
        return experts_pallas.experts_pallas(x, weights, ids, *adapted, False, interpret)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, factors)


def _experts_lora_reference(x_RD, weights_RC, ids_RC, matrices, factors):
    def run(x, weights, ids, factors):
        dense = [w + a @ b for w, a, b in _pairs(matrices, factors)]
        return experts_reference(x, weights, ids, *dense)

    return _value_and_gradients(run, x_RD, weights_RC, ids_RC, factors)


def _few_rows(sizes: Sizes) -> tuple:
    """Three rows, and the matrices as layer 1 of two."""
    x_RD, weights_RC, ids_RC, matrices, _ = _experts_inputs(sizes)
    stacks = [jnp.stack([jnp.zeros_like(w), w]) for w in matrices]
    return x_RD[:3], weights_RC[:3], ids_RC[:3], stacks


def _experts_in_place(x_RD, weights_RC, ids_RC, stacks, interpret):
    """As a decode step has them on CPU: matrices read where they lie."""
    R, C = ids_RC.shape
    tile = serving_tile_rows(R, C, stacks[0].shape[1])
    layers = [LayerSlice(stack, jnp.int32(1)) for stack in stacks]
    return {"y": experts_xla(x_RD, weights_RC, ids_RC, *layers, tile)}


def _experts_in_place_reference(x_RD, weights_RC, ids_RC, stacks):
    return {"y": experts_reference(x_RD, weights_RC, ids_RC, *(stack[1] for stack in stacks))}


# Attention of rows over themselves: three documents, then padding.


def _flash_inputs(sizes: Sizes) -> tuple:
    """q, k, v, segments and positions."""
    T = sizes.length
    heads = HEADS, KV_HEADS, KV_HEADS
    q, k, v = _normal(sizes, *((1, T, n, HEAD_DIM) for n in heads))
    starts = jnp.asarray([0, T // 2 - 2, T // 2 + T // 10, T - T // 9])
    document_T = jnp.searchsorted(starts, jnp.arange(T), side="right") - 1
    return q, k, v, ((document_T + 1) % 4)[None], (jnp.arange(T) - starts[document_T])[None]


def _attention_gradients(attend, q, k, v) -> dict[str, jax.Array]:
    """The result o, and gradients of a sum of it with factors between -1 and 1."""

    def loss(q, k, v):
        o = attend(q, k, v)
        factors = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        return jnp.sum(o.astype(jnp.float32) * factors), o

    (dq, dk, dv), o = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def _flash(q, k, v, segment, positions, interpret, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, "positions_BT": positions, **terms}

    def attend(q, k, v):
        return flash_attention(q, k, v, segment, interpret=interpret, **options)

    return _attention_gradients(attend, q, k, v)


def _flash_reference(q, k, v, segment, positions, **terms):
    index_BT = jnp.arange(q.shape[1])[None]
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}

    def attend(q, k, v):
        return attention_reference(q, k, v, index_BT, segment, segment, positions, **options)

    return _attention_gradients(attend, q, k, v)


# Attention over pages: new tokens of four sequences, some at the begin or the end of a page.


def _paged_inputs(sizes: Sizes, queries: int, dtype: str = "") -> tuple:
    """q_UQNH, pages and their scales, the layer, the table and the positions of the first
    tokens."""
    S, M, U, L = sizes.page_size, sizes.pages, 4, 2
    new = _normal(sizes, (U, queries, HEADS, HEAD_DIM), (U, M * S, KV_HEADS, 2, HEAD_DIM))
    last = M * S - queries
    start_U = jnp.asarray([0, S - 1, S, last], jnp.int32)
    table_UM = jnp.arange(U * M, dtype=jnp.int32)[::-1].reshape(U, M)
    page, scale = (S, KV_HEADS, 2, HEAD_DIM), None
    if dtype == "int8":
        page = (KV_HEADS, 2, S, HEAD_DIM)
        scale = jnp.zeros((L, U * M, KV_HEADS, scale_lanes(S)), jnp.float32)
    kv = jnp.zeros((L, U * M, *page), dtype or sizes.dtype)
    zeros_U, all_U = jnp.zeros(U, jnp.int32), jnp.full(U, M * S, jnp.int32)
    layer = jnp.int32(1)
    kv, scale = write_pages(kv, scale, layer, new[1], table_UM, zeros_U, all_U)
    return new[0], kv, scale, layer, table_UM, start_U


def _decode_inputs(sizes: Sizes, dtype: str = "") -> tuple:
    return _paged_inputs(sizes, 1, dtype)


def _prompt_inputs(sizes: Sizes, dtype: str = "") -> tuple:
    return _paged_inputs(sizes, sizes.prompt, dtype)


def _ragged(q, kv, scale, layer, table, start, interpret, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}
    attend: Callable = functools.partial(ragged_attention, interpret=interpret, **options)
    return {"o": attend(q, kv, scale, layer, table, start)}


def _paged(q, kv, scale, layer, table, start, interpret, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}
    count = jnp.full_like(start, q.shape[1])
    return {"o": paged_attention(q, kv, scale, layer, table, start, count, **options)}


def _paged_reference(q, kv, scale, layer, table, start, **terms):
    options = {"scale": SCALE, "softcap": SOFTCAP, **terms}
    return {"o": paged_attention_reference(q, kv, scale, layer, table, start, **options)}


def _with_terms(name: str, inputs, kernel, reference, **terms: Any) -> Check:
    run, expected = (functools.partial(f, **terms) for f in (kernel, reference))
    return Check(name, inputs, run, expected)


_GROUPED: tuple[Check, ...] = (
    Check("grouped_matmul", _grouped_inputs, _matmul, _matmul_reference),
    _with_terms(
        "grouped_matmul, transposed",
        _grouped_inputs,
        _matmul,
        _matmul_reference,
        transposed=True,
    ),
    _with_terms("grouped_matmul, int8", _grouped_inputs, _matmul, _matmul_reference, store=_int8),
    Check("grouped_hidden", _grouped_inputs, _hidden, _hidden_reference),
    Check("grouped_weight_gradient", _grouped_inputs, _weight_gradient, _weight_gradient_reference),
)
_EXPERTS: tuple[Check, ...] = (
    Check("experts_pallas, with gradients", _experts_inputs, _experts, _experts_reference),
    Check("experts_pallas, int8", _experts_inputs, _experts_int8, _experts_int8_reference),
    Check(
        "experts_pallas, LoRA, with gradients",
        _experts_inputs,
        _experts_lora,
        _experts_lora_reference,
    ),
    Check(
        "experts_pallas in halves, with gradients",
        _experts_inputs,
        _experts_split,
        _experts_reference,
    ),
    Check(
        "experts_xla, with gradients",
        _experts_inputs,
        _experts_plain,
        _experts_reference,
        is_pallas=False,
    ),
    Check(
        "experts_xla, few rows",
        _few_rows,
        _experts_in_place,
        _experts_in_place_reference,
        is_pallas=False,
    ),
)
WINDOWED, WARM = {"window": 17}, {"temperature_length": 12}
_FLASH = tuple(
    _with_terms(
        f"flash_attention{label}, with gradients", _flash_inputs, _flash, _flash_reference, **terms
    )
    for label, terms in (
        ("", {}),
        (", window", WINDOWED),
        (", temperature", WARM),
        (", window and temperature", WINDOWED | WARM),
    )
)
_INT8_DECODE, _INT8_PROMPT = (
    functools.partial(inputs, dtype="int8") for inputs in (_decode_inputs, _prompt_inputs)
)
_RAGGED = tuple(
    _with_terms(f"ragged_attention, {label}", inputs, _ragged, _paged_reference, **terms)
    for label, inputs, terms in (
        ("decode", _decode_inputs, {}),
        ("prompt", _prompt_inputs, {}),
        ("decode, window", _decode_inputs, WINDOWED),
        ("prompt, window", _prompt_inputs, WINDOWED),
        ("decode, temperature", _decode_inputs, WARM),
        ("prompt, temperature", _prompt_inputs, WARM),
        ("decode, int8 pages", _INT8_DECODE, {}),
        ("prompt, int8 pages, window and temperature", _INT8_PROMPT, WINDOWED | WARM),
    )
)
_PAGED = tuple(
    _with_terms(f"paged_attention, {label}", inputs, _paged, _paged_reference, **terms)
    for label, inputs, terms in (
        ("decode", _decode_inputs, {}),
        ("prompt, window and temperature", _prompt_inputs, WINDOWED | WARM),
        ("decode, int8 pages", _INT8_DECODE, {}),
    )
)
# JAX's kernel copies to views of memory that its interpreters do not know.
_JAX_RAGGED = {"ragged_attention, decode", "ragged_attention, prompt"}

CHECKS: tuple[Check, ...] = (
    *_GROUPED,
    *_EXPERTS,
    *_FLASH,
    *(check._replace(can_interpret=check.name not in _JAX_RAGGED) for check in _RAGGED),
    *(check._replace(is_pallas=False) for check in _PAGED),
)
