"""Five families against the goldens that independent engines made, alone and on meshes, in the
engine, and with the mistakes that ports of them made.

Letters: B rows, T tokens.
"""

import functools

import jax
import numpy as np
import pytest

import grok.model.attention
import grok.model.norm
from grok.config.train import TrainConfig
from grok.model.build import from_arrays, to_arrays
from grok.train.loss import batch_loss
from grok.weights.huggingface.source import HuggingFaceSource
from tests.model import families

# `make prove` takes the other mesh as well.
MESHES = [None, (2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.prove)]
each_family = pytest.mark.parametrize("family", families.TOLERANCE)
each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=str)


@each_family
@each_mesh
def test_logits_and_streams_are_those_of_the_goldens(family, sizes):
    model, (tokens, segments) = families.model(family, sizes), families.batch(family)
    error = families.logit_error(family, model(tokens, segment_ids=segments))
    hidden_LBTD, routing = jax.tree.map(
        np.asarray, jax.jit(families.trace)(model, tokens, segments)
    )
    right, stream_error = families.outputs(family), 0.0
    for i, prompt in enumerate(families.prompts(family)):
        T, stream = len(prompt), right[f"hidden_{i}"]
        difference = np.abs(hidden_LBTD[:, i, :T] - stream[1:]).max() / np.abs(stream).max()
        stream_error = max(stream_error, difference)
        if routing is not None:
            ids, order = routing[0][:, i, :T], np.argsort(routing[0][:, i, :T], axis=-1)
            theirs = right[f"router_index_{i}"]
            np.testing.assert_array_equal(np.sort(ids, axis=-1), np.sort(theirs, axis=-1))
            weights = np.take_along_axis(routing[1][:, i, :T], order, axis=-1)
            if families.config(family).moe.normalize:
                weights /= weights.sum(axis=-1, keepdims=True)
            expected = right[f"router_weight_{i}"]
            expected = np.take_along_axis(expected, np.argsort(theirs, axis=-1), axis=-1)
            np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-4)
    print(f"\n{family} {sizes}: logits {error:.1e}, streams {stream_error:.1e}")
    assert error < families.TOLERANCE[family]
    assert stream_error < 2e-5


@each_family
@each_mesh
def test_loss_and_gradients_are_those_of_the_goldens(family, sizes):
    """The golden norms are of whole matrices by the release's names: a layer's, an expert's."""
    tokens, segments = families.batch(family)
    # Prompt 1 alone counts; its rows' neighbours are there for the mesh.
    mask = np.zeros(tokens.shape, np.float32)
    mask[1, : len(families.prompts(family)[1]) - 1] = 1
    targets = np.roll(tokens, -1, axis=1)
    batch = {
        "tokens_BT": tokens,
        "targets_BT": targets,
        "mask_BT": mask,
        "segment_ids_BT": segments,
    }
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch["positions_BT"] = positions.astype(np.int32)
    run = jax.jit(jax.value_and_grad(batch_loss, has_aux=True), static_argnums=2)
    model = families.model(family, sizes)
    mesh = model.embed.table_VD[...].sharding.mesh if sizes else None
    if mesh is not None:
        rows = jax.sharding.NamedSharding(mesh, grok.sharding.spec("batch", "length"))
        batch = jax.device_put(batch, rows)
    (loss, _), gradients = run(model, batch, TrainConfig())
    right = float(families.outputs(family)["loss_1"])
    assert abs(float(loss) - right) < 2e-5 * right
    by_name = {name: np.asarray(g, np.float64) for name, g in to_arrays(gradients).items()}
    source = HuggingFaceSource(families.FOLDER / family)
    worst = 0.0
    for tensor in source.adapter.tensors(source.adapter.export_layout, source.config):
        ours = np.linalg.norm(by_name[tensor.param.name][tensor.lead])
        theirs = families.grad_norms(family)[tensor.name]  # 0 of an expert without tokens
        worst = max(worst, abs(ours - theirs) / max(theirs, 1e-3))
    print(f"\n{family} {sizes}: loss {abs(float(loss) / right - 1):.1e}, norms {worst:.1e}")
    assert worst < 1e-3


# ---- mistakes, each of keys or code, and by how much some logit must change


def swapped(family: str):
    """Gate and up taken for each other."""
    arrays = dict(families.arrays(family))
    for name in families.arrays(family):
        if "w_gate" in name:
            arrays[name] = families.arrays(family)[name.replace("gate", "up")]
            arrays[name.replace("gate", "up")] = families.arrays(family)[name]
    return from_arrays(families.config(family), arrays)


KEYS = [
    ("grok2", {"norm.eps": 1e-6}, 3),
    ("grok2", {"moe.normalize": True}, 5),
    ("grok2", {"moe.logit_softcap": None}, 3),
    ("grok2", {"attention.logit_softcap": None}, 5),
    ("grok2", {"logit_softcap": None}, 2),
    ("grok2", {"moe.activation": "gelu_tanh", "mlp.activation": "gelu_tanh"}, 0.015),
    ("grok2", {"moe.activation": "silu", "mlp.activation": "silu"}, 5),
    ("grok2", {"attention.temperature_length": None}, 5),
    ("grok2", {"attention.temperature_length": 25}, 0.1),
    ("grok2", {"mlp": None}, 20),
    ("grok2", {"logit_multiplier": 1.0}, 10),
    ("grok2", {"embedding_multiplier": 1.0}, 20),
    ("grok2", {"attention.rope.theta": 10000.0}, 20),
    ("mixtral", {"moe.normalize": False}, 5),
    ("mixtral", {"moe.activation": "gelu"}, 5),
    ("mixtral", {"norm.eps": 1e-3}, 5),
    ("mistral", {"attention.window": None}, 8),
    ("mistral", {"attention.window": 21}, 5),
    ("mistral", {"attention.window": 19}, 5),
    ("llama31", {"attention.rope.scaling": None}, 8),
    ("llama31", {"attention.rope.scaling.high_freq_factor": 1e9}, 5),
    ("llama31", {"attention.rope.theta": 10000.0}, 5),
    ("llama2", {"mlp.activation": "gelu_tanh"}, 2),
]


@pytest.mark.parametrize(("family", "keys", "least"), KEYS, ids=str)
def test_a_wrong_key_is_seen(family, keys, least):
    tokens, segments = families.batch(family)
    model = families.with_keys(family, keys)
    change = families.logit_error(family, model(tokens, segment_ids=segments))
    print(f"\n{family} {keys}: {change:.3f}")
    assert change > least > 5 * families.TOLERANCE[family]


@each_family
def test_gate_and_up_swapped_are_seen(family):
    tokens, segments = families.batch(family)
    assert families.logit_error(family, swapped(family)(tokens, segment_ids=segments)) > 5


def one_plus_scale(self, x_BTD, right=grok.model.norm.RMSNorm.__call__):
    """Norms with scale 1 + w."""
    return (right(self, x_BTD) + x_BTD * jax.lax.rsqrt((x_BTD**2).mean(-1, keepdims=True))) * 1.0


def summed(self, h_BTD, token_mask_BT, axes):
    """MLP and experts added without 1/sqrt(2)."""
    return self.moe(h_BTD, token_mask_BT, axes, [self.mlp.group_work()])


CODE = [
    ("llama2", grok.model.norm.RMSNorm, "__call__", one_plus_scale, 5),
    ("grok2", grok.model.block.Block, "_feed_forward", summed, 0.05),
]


@pytest.mark.parametrize(
    ("family", "owner", "name", "mistake", "least"), CODE, ids=[case[3].__name__ for case in CODE]
)
def test_wrong_code_is_seen(family, owner, name, mistake, least, monkeypatch):
    monkeypatch.setattr(owner, name, mistake)
    tokens, segments = families.batch(family)
    # A new function each time, for jax.jit not to reuse what it traced without the mistake.
    run = jax.jit(functools.partial(lambda model, t, s: model.unembed(model.hidden(t, s)[0])))
    change = families.logit_error(family, run(families.model(family), tokens, segments))
    print(f"\n{mistake.__name__}: {change:.3f}")
    assert change > least
