"""Experts in int4 as they are quantised, and with activation-aware scaling, of models trained here.

    python -m benchmarks.calibrated_int4 RUN [RUN ...] --calibration TEXT --data TEXT

AWQ (Lin et al. 2023, arXiv 2306.00978): a row of a matrix is multiplied by a power of the r.m.s. of
what it multiplies before it is quantised, and divided after. Of a few powers the one is taken that
makes the expected squared error of the outputs smallest, by second moments over 16 thousand tokens
of the calibration text. The rows of an input have one factor for all experts, as a norm could carry
it, those of the hidden layer one for each expert, as the up matrix could. Prints bits per byte of
the other text in float32, with experts in int4, and with these.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grok import sharding
from grok.data.tokenizers import load_tokenizer
from grok.evaluate.losses import evaluate_texts
from grok.hardware import configure_devices
from grok.infer.loader import config_of, find_tokenizer, make_mesh
from grok.model.attend import PackedRows
from grok.model.decoder import Decoder
from grok.model.moe import MoE
from grok.ops.mlp import activate
from grok.ops.weights.quantized import dequantize, quantize
from grok.weights.cast import scale_groups
from grok.weights.load import load

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS = 16_384
TYPES = ["model.param_dtype=float32", "model.compute_dtype=float32", "model.matmul_dtype=compute"]
EXPERTS = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")


def main() -> None:
    """Measures the runs and prints what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    configure_devices(0)
    results = [measure(run, options.calibration, options.data) for run in options.runs]
    print("| experts | bits per byte of each run | increase |\n|---|---|---|")
    for name in results[0]:
        bits = [result[name] for result in results]
        increase = np.mean(bits) / np.mean([result["float32"] for result in results]) - 1
        print(f"| {name} | {', '.join(f'{value:.5f}' for value in bits)} | {increase:+.3%} |")
    print(json.dumps(results))


def measure(run: str, calibration: str, data: str) -> dict[str, float]:
    """Bits per byte of a run's newest checkpoint, by the type of its experts."""
    config = config_of(run, None, TYPES)
    mesh = make_mesh(config.mesh, config.model)
    tokenizer = find_tokenizer(run, None, config, [data])
    text = Path(calibration).read_bytes()[: 8 * TOKENS].decode(errors="replace")
    length = config.data.sequence_length
    tokens = load_tokenizer(tokenizer).encode(text)[: TOKENS // length * length]
    model = load(run, config.model, mesh, "float32")

    def bits_per_byte() -> float:
        (loss,) = evaluate_texts(model, mesh, [data], tokenizer, config)
        return loss.bits_per_byte

    bits = {"float32": bits_per_byte()}
    tokens_BT = np.array(tokens, np.int32).reshape(-1, length)
    with jax.set_mesh(mesh):
        moments = jax.jit(sharding.without_trivial_mesh(second_moments))
        inputs, hidden = map(np.asarray, moments(model, tokens_BT))
    moe = model.layers.moe
    assert moe is not None
    weights = {name: np.asarray(getattr(moe, name)[...]) for name in EXPERTS}
    specs = MoE.param_specs(config.model)
    groups = {name: scale_groups(specs[name], "int4") for name in EXPERTS}
    shared = np.broadcast_to(inputs.mean(1, keepdims=True), inputs.shape)
    for name, powers in {"int4": (0.0,), "int4, activation-aware scaling": POWERS}.items():
        rounded = best(weights, EXPERTS[:2], groups, inputs, shared, powers)
        rounded |= best(weights, EXPERTS[2:], groups, hidden, hidden, powers)
        for key, w in rounded.items():
            param = getattr(moe, key)
            param.set_value(jax.device_put(w, param[...].sharding))
        bits[name] = bits_per_byte()
    return bits


def second_moments(model: Decoder, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean squares of the experts' inputs (L, E, D) and hidden layers (L, E, F), over the tokens
    that go to each."""
    moe_config = model.config.moe
    assert moe_config is not None
    ones_BT = jnp.ones_like(tokens_BT)
    attend = PackedRows(ones_BT, jnp.cumsum(ones_BT, 1) - 1)

    def layer(x_BTD, block):
        a_BTD, _ = block.attention(block.pre_attn_norm(x_BTD), attend)
        middle_BTD = x_BTD + (block.post_attn_norm(a_BTD) if block.post_attn_norm else a_BTD)
        h_BTD = block.pre_ffn_norm(middle_BTD)
        probs_BTE = block.moe.route(h_BTD, attend.stream_axes(h_BTD.shape[1]))
        _, ids_BTC = jax.lax.top_k(probs_BTE, moe_config.num_selected)
        chosen_EBT = (ids_BTC[None] == jnp.arange(moe_config.num_experts)[:, None, None, None]).any(
            -1
        )

        def expert(_, of):
            chosen_BT, gate_DF, up_DF = of
            hidden_BTF = activate(h_BTD @ gate_DF, moe_config.activation) * (h_BTD @ up_DF)
            share_BT = chosen_BT / jnp.maximum(chosen_BT.sum(), 1)
            squares = (jnp.einsum("bt,btd->d", share_BT, a * a) for a in (h_BTD, hidden_BTF))
            return None, tuple(squares)

        matrices = chosen_EBT, block.moe.w_gate_EDF[...], block.moe.w_up_EDF[...]
        _, squares = jax.lax.scan(expert, None, matrices)
        return block(x_BTD, attend, None)[0], squares

    x_BTD = model.embed.embed(tokens_BT, "float32") * model.config.embedding_multiplier
    return jax.lax.scan(layer, x_BTD, model.layers)[1]


def best(weights, names, groups, moments, scaled_by, powers) -> dict[str, np.ndarray]:
    """Matrices (L, E, rows, columns) as their int4 values are, the rows of each layer scaled by the
    power of their mean square `scaled_by` (L, E, rows) that makes the error smallest."""
    best_error, result = None, {}
    for power in powers:
        scale = np.maximum(scaled_by, 1e-12) ** (power / 2)
        scale = (scale / np.exp(np.log(scale).mean(-1, keepdims=True)))[..., None]
        rounded, error = {}, np.zeros(len(moments))
        for name in names:
            values, scales = quantize(weights[name] * scale, groups[name], dtype=jnp.int4)
            rounded[name] = dequantize(values, scales, np.float32) / scale
            squares = (rounded[name] - weights[name]) ** 2
            error += (moments[..., None] * squares).sum((1, 2, 3))
        if best_error is None:
            best_error, result = error, rounded
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        pick = is_better[:, None, None, None]
        result = {name: np.where(pick, rounded[name], result[name]) for name in names}
    return result


if __name__ == "__main__":
    main()
