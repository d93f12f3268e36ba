"""The golden sets: what xAI's code and a float64 oracle compute from the same small weights.

`tests/golden/NAME` holds a release (`ckpt-0`) and arrays: `exact.npz` from the oracle, in which
nothing is rounded, and two runs of the released code, `golden.npz` compiled and
`golden_eager.npz` op by op. `golden.json` says what each array is.

Letters: L layers, B rows, T tokens, D embed, E experts, V vocab.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grok import sharding
from grok.config import ModelConfig
from grok.model.attend import PackedRows
from grok.model.decoder import Decoder
from grok.weights.cast import converted
from grok.weights.load import put_on_mesh
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.models import model_config

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = ("pub_a", "pub_b")
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_layers",
    "embed_dim": "emb_size",
    "moe.dim": "ffn_size",
    "attention.num_heads": "num_q_heads",
    "attention.num_kv_heads": "num_kv_heads",
    "attention.head_dim": "key_size",
    "moe.num_experts": "num_experts",
    "moe.num_selected": "num_selected_experts",
    "context_length": "sequence_len",
    "embedding_multiplier": "embedding_multiplier_scale",
    "logit_multiplier": "output_multiplier_scale",
    "attention.logit_scale": "attn_output_multiplier",
    "attention.logit_softcap": "max_attn_value",
    "attention.rope.theta": "rope_base",
}

# Largest error over largest value, for float32 against exact. A sum of n products rounds by about
# sqrt(n) * 2^-24, and n is at most 512 here: 1.4e-6. Each next layer adds its own and passes the
# earlier ones through a norm, which leaves their relative size as it is.
TOLERANCE = {
    "attention_exact": 1e-5,
    "moe_exact": 1e-5,
    "hidden_exact": 1e-5,
    "router_probs_exact": 1e-5,
    "logits_exact": 1e-5,
    "quirk_logits_exact": 1e-5,
}


@functools.cache
def arrays(name: str, file: str = "golden") -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / f"{file}.npz") as stored:
        return dict(stored)


def config(name: str, compute_dtype: str) -> ModelConfig:
    theirs = json.loads((FOLDER / name / "golden.json").read_text())["config"]
    keys = {ours: theirs[key] for ours, key in CONFIG_KEYS.items()}
    return model_config(keys | {"compute_dtype": compute_dtype})


@functools.cache
def model(name: str, compute_dtype: str, on_mesh: bool) -> Decoder:
    """The set's model, on one device or on data=2 x expert=2 x tensor=2."""
    c = config(name, compute_dtype)
    mesh = sharding.make_mesh(data=2, expert=2, tensor=2) if on_mesh else None
    return put_on_mesh(converted(ReleaseSource(FOLDER / name / "ckpt-0", c), "float32"), mesh)


def trace(model: Decoder, tokens_BT, segment_BT) -> dict[str, jax.Array]:
    """What each layer computes, stacked over layers, under the names of `exact.npz`.

    `hidden_exact` comes out of the block itself; the others are its parts, called on its input.
    """
    with sharding.use_mesh_of(model.embed.table_VD[...]):
        tokens_BT = sharding.constrain(jnp.asarray(tokens_BT), "batch", "length")
        segment_BT = sharding.constrain(jnp.asarray(segment_BT), "batch", "length")
        positions_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1])[None, :]

        stream = sharding.sequence_parallel_axes(tokens_BT.shape[1])
        attend = PackedRows(segment_BT, positions_BT)

        def block(x_BTD, layer):
            a_BTD = layer.attention(layer.pre_attn_norm(x_BTD), attend)[0]
            h_BTD = layer.pre_ffn_norm(x_BTD + layer.post_attn_norm(a_BTD))
            x_BTD, _, _ = layer(x_BTD, attend, None)
            return x_BTD, {
                "attention_exact": a_BTD,
                "moe_exact": layer.moe(h_BTD, None, stream)[0],
                "router_probs_exact": layer.moe.route(h_BTD, stream),
                "hidden_exact": x_BTD,
            }

        x_BTD = sharding.constrain(model._embed(tokens_BT), *stream)
        x_BTD, parts = jax.lax.scan(block, x_BTD, model.layers)
        x_BTD = sharding.constrain(model.final_norm(x_BTD), "batch", "length", None)
        return parts | {"logits_exact": model.unembed(x_BTD)}


def relative_error(name: str, array: str, ours) -> float:
    """Largest difference from an array of `exact.npz` over its largest value, at real tokens."""
    exact = arrays(name, "exact")[array].astype(np.float64)
    tokens = "quirk_tokens" if array.startswith("quirk") else "tokens"
    real = np.broadcast_to(arrays(name)[tokens] > 0, exact.shape[:-1])
    difference = np.asarray(ours, np.float64)[real] - exact[real]
    return float(np.abs(difference).max() / np.abs(exact[real]).max())


def rms(ours, theirs) -> float:
    """Root mean square of the difference."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(np.sqrt(np.mean(difference**2)))
