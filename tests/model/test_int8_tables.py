"""Token tables in int8 (`model.embedding_dtype`): as the floats that they stand for, on every mesh,
and refused where they cannot be.

Letters: V vocab, D embed.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import grok
from grok import sharding
from grok.config import LoraConfig, ModelConfig, RunConfig, TrainConfig, check_trainable
from grok.config.sampling import SamplingParams
from grok.errors import ConfigError
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model.build import abstract, to_arrays
from grok.model.decoder import Decoder
from grok.ops import cross_entropy
from grok.ops.cpu import few_rows
from grok.ops.weights.quantized import dequantize, quantize
from grok.train import loss
from grok.weights.cast import converted, quantized_groups
from grok.weights.load import put_on_mesh
from tests.fixtures.array_source import ArraySource
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.model.test_meshes import CONFIG

MODELS = {
    "one table": CONFIG,
    "two tables": replace_keys(CONFIG, {"tie_embeddings": False, "logit_softcap": 2.0}),
}
TABLES = "embed/table_VD", "lm_head/table_VD"
# Data, expert, tensor: the vocabulary is split by the last two, the width by data.
MESHES = [(1, 1, 1), (2, 2, 2), (8, 1, 1)]


def make(config: ModelConfig, sizes: tuple[int, ...], embedding_dtype: Any) -> Decoder:
    """The int8 model with its tables in int8, or with the floats that those stand for."""
    source = ArraySource.copy(converted(RandomSource(config, dtype="float32"), "int8"))
    for name in TABLES:
        if embedding_dtype == "float" and name in source.values:
            values = quantize(source.values[name], 1, 1, 0)
            source.values[name] = dequantize(*values, np.float32, 1, 0)
    types: Any = {"param_dtype": "int8", "embedding_dtype": embedding_dtype}
    source.config = dataclasses.replace(config, **types)
    devices = jax.devices()[: int(np.prod(sizes))]
    return put_on_mesh(source, grok.make_mesh(*sizes, devices=devices))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_floats(config, sizes):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 9))
    ints, floats = (make(config, sizes, dtype) for dtype in ("int8", "float"))
    expected = floats(tokens)
    largest = float(abs(expected).max())
    np.testing.assert_allclose(ints(tokens), expected, rtol=0, atol=2e-6 * largest)
    arrays = to_arrays(ints)
    for name in (name for name in TABLES if name in to_arrays(floats)):
        values, scales = arrays[f"{name}/values"], arrays[f"{name}/scales"]
        assert (values.dtype, scales.dtype, scales.shape) == ("int8", "bfloat16", (96, 1))
        assert values.sharding == to_arrays(floats)[name].sharding


@pytest.mark.parametrize("most_logits", [1, 2**26], ids=["in chunks", "at once"])
def test_losses_are_those_of_the_floats(monkeypatch, most_logits):
    monkeypatch.setattr(loss, "MAX_LOGITS", most_logits)
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", most_logits)
    x_BTD = np.random.default_rng(1).standard_normal((8, 9, 32)).astype(np.float32)
    targets_BT = np.random.default_rng(2).integers(0, 96, (8, 9))

    def losses(embedding_dtype: str) -> Any:
        model = make(MODELS["two tables"], (2, 2, 2), embedding_dtype)
        mesh = jax.tree.leaves(model)[0].sharding.mesh
        with jax.set_mesh(mesh):
            rows = [
                jax.device_put(
                    x, NamedSharding(mesh, sharding.spec("batch", *(None,) * (x.ndim - 1)))
                )
                for x in (x_BTD, targets_BT)
            ]
            return jax.jit(loss.token_losses)(model, *rows)

    for ints, floats in zip(losses("int8"), losses("float"), strict=True):
        np.testing.assert_allclose(ints, floats, rtol=2e-5)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_answers_are_those_of_the_floats(monkeypatch, kernels, sizes):
    if not kernels:
        monkeypatch.setattr(few_rows, "is_usable", lambda: False)

    def answers(embedding_dtype: str) -> dict[tuple, list]:
        model = make(MODELS["two tables"], sizes, embedding_dtype)
        mesh = jax.tree.leaves(model)[0].sharding.mesh
        params = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, logprobs=2)
        requests = [Request(f"{i}", (3 + i, 40, 7), params) for i in range(5)]
        found: dict[tuple, list] = {}
        for output in Engine(model, None, mesh).generate(requests):
            found.setdefault((output.request_id, "tokens"), []).extend(output.token_ids)
            for entry in (*(output.prompt_logprobs or ()), *(output.logprobs or ())):
                values = [] if entry is None else [entry.logprob, *(v for _, v in entry.top)]
                found.setdefault((output.request_id, "scores"), []).extend(values)
        return found

    ints, floats = answers("int8"), answers("float")
    assert ints.keys() == floats.keys() and len(ints) == 10
    for key, values in ints.items():
        np.testing.assert_allclose(values, floats[key], rtol=0, atol=1e-5)


def test_the_shapes_that_a_plan_compiles_are_those_that_are_loaded():
    config = dataclasses.replace(MODELS["two tables"], param_dtype="int8", embedding_dtype="int8")
    mesh = grok.make_mesh(2, 2, 2)
    planned = abstract(config, mesh, quantized_groups(config))
    loaded = make(MODELS["two tables"], (2, 2, 2), "int8")
    assert jax.tree.structure(planned) == jax.tree.structure(loaded)
    for shape, array in zip(jax.tree.leaves(planned), jax.tree.leaves(loaded), strict=True):
        assert (shape.dtype, shape.sharding) == (array.dtype, array.sharding)


def test_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"not param_dtype=float32; param_dtype=int8 beside it"):
        dataclasses.replace(CONFIG, embedding_dtype="int8")
    model = dataclasses.replace(CONFIG, param_dtype="int8", embedding_dtype="int8")
    base = TrainConfig(init_from="weights")
    with pytest.raises(ConfigError, match=r"has no gradient; model.embedding_dtype=float would"):
        check_trainable(RunConfig(model=model, lora=LoraConfig(rank=2), train=base))
