"""Tiny models of five families in their releases' layouts, and what independent engines compute of
them; tests/golden/families/README.md says which.

Letters: L layers, B rows, T tokens, D embed, C chosen experts, V vocab.
"""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import grok
from grok import sharding
from grok.config import ModelConfig
from grok.model.attend import PackedRows
from grok.model.build import from_arrays, to_arrays
from grok.model.decoder import Decoder
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.load import put_on_mesh
from tests.fixtures.models import replace_keys

FOLDER = Path(__file__).parents[1] / "golden" / "families"
# Largest error of a logit in float32. The goldens are rounded themselves: by 2.5e-4 where
# logits go to 30 under a soft-cap, by 5e-5 elsewhere.
TOLERANCE = {"grok2": 2e-3, "mixtral": 2e-4, "mistral": 2e-4, "llama2": 2e-4, "llama31": 2e-4}


@functools.cache
def outputs(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / family / "outputs.npz") as stored:
        return dict(stored)


@functools.cache
def prompts(family: str) -> list[np.ndarray]:
    with np.load(FOLDER / family / "inputs.npz") as stored:
        return [stored[f"prompt_{i}"] for i in range(len(stored))]


@functools.cache
def config(family: str) -> ModelConfig:
    return replace_keys(open_source(FOLDER / family).config, {"compute_dtype": "float32"})


@functools.cache
def model(family: str, sizes: tuple[int, ...] | None = None) -> Decoder:
    """The model in float32, on a mesh of these sizes, or of one device."""
    source = open_source(FOLDER / family, config(family))
    return put_on_mesh(converted(source, "float32"), sizes and mesh(sizes))


def mesh(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    """The mesh of these sizes."""
    return grok.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


@functools.cache
def arrays(family: str) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, to_arrays(model(family)))


def with_keys(family: str, keys: dict) -> Decoder:
    """The same weights, or those of them that it has, in a model of other keys."""
    changed = replace_keys(config(family), keys)
    if changed.mlp is None:
        return from_arrays(changed, {k: v for k, v in arrays(family).items() if "/mlp/" not in k})
    return from_arrays(changed, arrays(family))


def batch(family: str) -> tuple[np.ndarray, np.ndarray]:
    """All prompts as rows of equal length, eight of them, and their segments; 0 is padding."""
    tokens = prompts(family)
    length = -(-max(map(len, tokens)) // 4) * 4
    tokens_BT, segments_BT = np.zeros((2, 8, length), np.int32)
    for row, prompt in enumerate(tokens):
        tokens_BT[row, : len(prompt)] = prompt
        segments_BT[row, : len(prompt)] = 1
    return tokens_BT, segments_BT


def logit_error(family: str, logits_BTV) -> float:
    """Largest difference of the logits of `batch` from the golden ones."""
    expected = [outputs(family)[f"logits_{i}"] for i in range(len(prompts(family)))]
    pairs = zip(np.asarray(logits_BTV), expected, strict=False)
    return max(float(np.abs(ours[: len(right)] - right).max()) for ours, right in pairs)


def trace(model: Decoder, tokens_BT, segment_BT) -> tuple[jax.Array, tuple | None]:
    """The stream after each layer, hidden_LBTD, and of routers the chosen experts and their weights
    before the choice is renormalised, (L, B, T, C) each."""
    with sharding.use_mesh_of(model.embed.table_VD[...]):
        tokens_BT = sharding.constrain(jnp.asarray(tokens_BT), "batch", "length")
        segment_BT = sharding.constrain(jnp.asarray(segment_BT), "batch", "length")
        positions_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1])[None, :]
        attend = PackedRows(segment_BT, positions_BT)

        def block(x_BTD, layer):
            x_BTD, _, routing = layer(x_BTD, attend, None)
            if routing is None:
                return x_BTD, (x_BTD, None)
            ids_BTC = routing.expert_ids_BTC
            weights_BTC = jnp.take_along_axis(routing.probs_BTE, ids_BTC, axis=-1)
            return x_BTD, (x_BTD, (ids_BTC, weights_BTC))

        axes = sharding.sequence_parallel_axes(tokens_BT.shape[1])
        x_BTD = sharding.constrain(model._embed(tokens_BT), *axes)
        return jax.lax.scan(block, x_BTD, model.layers)[1]


def grad_norms(family: str) -> dict[str, float]:
    """Norms of the gradient of prompt 1's loss, by the release's names."""
    return json.loads((FOLDER / family / "grad_norms.json").read_text())
