"""Attention's terms in a whole model, against a float64 decoder written out here; and mistakes that
are easily made, each made here on purpose: that comparison must see it.

Letters: T tokens, D embed, N heads, K kv heads, H head_dim, V vocab, L layers.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok
import grok.model.rope
import grok.ops.attention.causal
import grok.ops.attention.paged
from grok.config import ModelConfig
from grok.errors import ConfigError
from grok.model import attend
from grok.model.attend import PagedBatch, init_cache
from grok.model.build import to_arrays
from grok.model.decoder import Decoder
from grok.ops.attention.causal import attention_reference
from grok.ops.attention.paged import paged_attention_reference
from grok.ops.softcap import apply_softcap
from tests.fixtures.models import model_config, replace_keys

BASE = model_config(
    {
        "vocab_size": 48,
        "num_layers": 2,
        "embed_dim": 16,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "attention.head_dim": 8,
        "attention.logit_scale": 3.0,  # logits of several units: which keys are seen matters
        "attention.logit_softcap": None,
        "norm.sandwich": False,
        "mlp.dim": 24,
        "moe": None,
        "compute_dtype": "float32",
    }
)
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 128}
MODELS = {
    "window": {"attention.window": 5},
    "temperature": {"attention.temperature_length": 6, "attention.logit_softcap": 4.0},
    "scaled rope": {"attention.rope.scaling": SCALING | {"factor": 8.0}},
}
MODELS["all"] = MODELS["window"] | MODELS["temperature"] | MODELS["scaled rope"]
LENGTHS = (17, 4, 9)  # of documents that are packed into a row, behind which is padding
ROW = 32
# Two layers of float32 sums of at most 48 products; logits are of some units.
TOLERANCE = 1e-5


@functools.cache
def documents() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, BASE.vocab_size, length) for length in LENGTHS]


@functools.cache
def model(name: str) -> Decoder:
    return grok.init(replace_keys(BASE, MODELS[name]), jax.random.key(1))


# ---- the decoder, in float64


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of each pair, by the released code's three cases."""
    rope, H = config.attention.rope, config.attention.head_dim
    result = rope.theta ** (-np.arange(0, H, 2) / H)
    if (scaling := rope.scaling) is None:
        return result
    for i, frequency in enumerate(result):
        turns = scaling.original_context_length * frequency / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if turns < low:
            result[i] = frequency / scaling.factor
        elif turns < high:
            smooth = (turns - low) / (high - low)
            result[i] = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    return result


def turned(x_THd: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Heads rotated by their tokens' positions."""
    phase = np.arange(len(x_THd))[:, None, None] * frequencies(config)
    first, second = np.split(x_THd, 2, axis=-1)
    cos, sin = np.cos(phase), np.sin(phase)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def normed(x_TD: np.ndarray, scale_D: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + config.norm.eps) * scale_D


def attended(q_TNH, k_TKH, v_TKH, config: ModelConfig) -> np.ndarray:
    """One query of one head at a time."""
    c, o_TNH = config.attention, np.zeros_like(q_TNH)
    for t, n in np.ndindex(*q_TNH.shape[:2]):
        seen = slice(0 if c.window is None else max(0, t + 1 - c.window), t + 1)
        kv_head = n * c.num_kv_heads // c.num_heads
        logits = k_TKH[seen, kv_head] @ q_TNH[t, n] * c.logit_scale
        if c.logit_softcap is not None:
            logits = c.logit_softcap * np.tanh(logits / c.logit_softcap)
        if c.temperature_length is not None and t > c.temperature_length:
            logits = logits * np.log2(t) / np.log2(c.temperature_length)
        weights = np.exp(logits - logits.max())
        o_TNH[t, n] = weights @ v_TKH[seen, kv_head] / weights.sum()
    return o_TNH


@functools.cache
def expected(name: str, document: int) -> np.ndarray:
    """Logits (T, V) of a document alone."""
    config = model(name).config
    weights = {key: np.asarray(a, np.float64) for key, a in to_arrays(model(name)).items()}
    table_VD = weights["embed/table_VD"]
    x_TD = table_VD[documents()[document]] * config.embedding_multiplier
    for layer in range(config.num_layers):
        w = {
            key.removeprefix("layers/"): array[layer]
            for key, array in weights.items()
            if key.startswith("layers/")
        }
        h_TD = normed(x_TD, w["pre_attn_norm/scale_D"], config)
        q, k, v = (
            np.einsum("td,dnh->tnh", h_TD, w[f"attention/{name}"])
            for name in ("w_query_DNH", "w_key_DKH", "w_value_DKH")
        )
        o_TNH = attended(turned(q, config), turned(k, config), v, config)
        x_TD = x_TD + np.einsum("tnh,nhd->td", o_TNH, w["attention/w_out_NHD"])
        h_TD = normed(x_TD, w["pre_ffn_norm/scale_D"], config)
        gate = h_TD @ w["mlp/w_gate_DF"]
        gated = gate / (1 + np.exp(-gate)) * (h_TD @ w["mlp/w_up_DF"])
        x_TD = x_TD + gated @ w["mlp/w_down_FD"]
    x_TD = normed(x_TD, weights["final_norm/scale_D"], config)
    return x_TD @ table_VD.T * config.logit_multiplier


# ---- ours


def packed_logits(decoder: Decoder) -> list[np.ndarray]:
    """Logits of each document, all packed into one row, positions counted in each."""
    tokens, segments, positions = np.zeros((3, 1, ROW), np.int32)
    ends = np.cumsum(LENGTHS)
    for i, (document, end) in enumerate(zip(documents(), ends, strict=True)):
        place = slice(end - len(document), end)
        tokens[0, place], segments[0, place] = document, i + 1
        positions[0, place] = np.arange(len(document))
    # A new function each time, for jax.jit not to reuse what it traced with or without a mistake.
    run = jax.jit(lambda decoder, *inputs: decoder.unembed(decoder.hidden(*inputs)[0]))
    logits_TV = np.asarray(run(decoder, tokens, segments, positions))[0]
    return [logits_TV[end - n : end] for n, end in zip(LENGTHS, ends, strict=True)]


def paged_logits(decoder: Decoder) -> list[np.ndarray]:
    """Logits of each document from the cache: its first four tokens together, in pages of 4, then
    one by one."""
    cache = init_cache(decoder.config, 15, 4, "float32")
    table = np.arange(15, dtype=np.int32)[::-1].reshape(1, 3, 5)
    step = jax.jit(lambda decoder, *inputs: Decoder.step(decoder, *inputs))
    results: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    for start in [0, *range(4, max(LENGTHS))]:
        Q = 4 if start == 0 else 1
        counts = np.array([[min(Q, max(0, length - start)) for length in LENGTHS]], np.int32)
        tokens = np.zeros((1, len(LENGTHS), Q), np.int32)
        starts = np.where(counts > 0, start, 0).astype(np.int32)
        for u, document in enumerate(documents()):
            tokens[0, u, : counts[0, u]] = document[start : start + Q]
        batch = PagedBatch(table, starts, counts)
        x_BTD, cache, _ = step(decoder, tokens.reshape(1, -1), cache, batch)
        logits = np.asarray(decoder.unembed(x_BTD)).reshape(len(LENGTHS), Q, -1)
        for u, count in enumerate(counts[0]):
            results[u].append(logits[u, :count])
    return [np.concatenate(result) for result in results]


FORMS = {"packed": packed_logits, "paged": paged_logits}
FORM_PARAMS = ["packed", pytest.param("paged", marks=pytest.mark.prove)]


def error(name: str, form: str) -> float:
    """Largest error of a logit of any document."""
    ours = FORMS[form](model(name))
    return max(np.abs(ours[i] - expected(name, i)).max() for i in range(len(LENGTHS)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_decoder_written_out(name, form):
    found = error(name, form)
    print(f"\n{name}, {form}: {found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_tpus_get_every_term(name, form, monkeypatch):
    """With the references in place of the kernels, which tests of their own compare with these."""
    calls = []

    def flash(q, k, v, segment, *, positions_BT, **terms):
        calls.append(terms)
        index = jnp.broadcast_to(jnp.arange(q.shape[1])[None, :], segment.shape)
        return attention_reference(q, k, v, index, segment, segment, positions_BT, **terms)

    def ragged(*arrays, **terms):
        calls.append(terms)
        return paged_attention_reference(*arrays, **terms)

    monkeypatch.setattr(attend, "hardware", types.SimpleNamespace(platform=lambda: "tpu"))
    monkeypatch.setattr(attend, "supports", lambda length: True)
    monkeypatch.setattr(attend, "flash_attention", flash)
    fake = types.SimpleNamespace(ragged_attention=ragged, supports=lambda kv, head_dim: True)
    monkeypatch.setattr(attend, "ragged", fake)
    assert error(name, form) < TOLERANCE
    config = MODELS[name]
    for terms in calls:
        assert terms.get("window") == config.get("attention.window")
        assert terms.get("temperature_length") == config.get("attention.temperature_length")
    assert calls


# ---- mistakes

right_mask = grok.ops.attention.causal.causal_mask
right_temperature = grok.ops.attention.causal.temperature
right_frequencies = grok.model.rope.rope_frequencies


def one_key_more(key_index, index, window):
    """A window that does not count the query's own key."""
    return right_mask(key_index, index, window + 1)


def one_key_less(key_index, index, window):
    """A window that counts the query's own key twice."""
    return right_mask(key_index, index, window - 1)


def no_window(key_index, index, window):
    """All earlier keys."""
    return right_mask(key_index, index, None)


def window_of_keys_after(key_index, index, window):
    """A window on the keys that are still to come."""
    return (key_index >= index) & (key_index < index + window)


def position_from_one(positions, length):
    """The temperature of positions counted from 1."""
    factor = right_temperature(positions + 1, length)
    return jnp.where(positions > length, factor, 1)


def length_from_one(positions, length):
    """A temperature that counts its length from 1."""
    return right_temperature(positions, length + 1)


def no_temperature(positions, length):
    """Every query's logits as they are."""
    return jnp.ones(positions.shape, jnp.float32)


def temperature_below_one(positions, length):
    """The logarithm's ratio at every position, also at those before the length."""
    return jnp.log2(jnp.maximum(positions, 1)) / np.log2(length)


def temperature_before_the_cap(products, positions, *, scale, softcap, temperature_length=None):
    """Logits multiplied by the temperature, then capped, as if it could be folded into queries."""
    factor = right_temperature(positions, temperature_length)[:, None, None, :, None]
    return apply_softcap(products * scale * factor, softcap)


def unscaled(head_dim, config):
    """Rotary frequencies without the scaling."""
    return config.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def all_divided(head_dim, config):
    """Rotary frequencies that are all divided by the factor, as by position interpolation."""
    return unscaled(head_dim, config) / config.scaling.factor


def no_blend(head_dim, config):
    """Rotary frequencies that are either divided or kept."""
    frequency = right_frequencies(head_dim, config)
    divided = all_divided(head_dim, config)
    return jnp.where(frequency > divided, unscaled(head_dim, config), divided)


# The model that shows it, and the function that it replaces.
MISTAKES = {
    one_key_more: ("window", "causal_mask"),
    one_key_less: ("window", "causal_mask"),
    no_window: ("window", "causal_mask"),
    window_of_keys_after: ("window", "causal_mask"),
    position_from_one: ("temperature", "temperature"),
    length_from_one: ("temperature", "temperature"),
    no_temperature: ("temperature", "temperature"),
    temperature_below_one: ("temperature", "temperature"),
    temperature_before_the_cap: ("temperature", "scaled_logits"),
    unscaled: ("scaled rope", "rope_frequencies"),
    all_divided: ("scaled rope", "rope_frequencies"),
    no_blend: ("scaled rope", "rope_frequencies"),
}
MODULES = (grok.ops.attention.causal, grok.ops.attention.paged, grok.model.rope)


# In the paged form `make prove` takes them.
@pytest.mark.parametrize("form", FORM_PARAMS)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake, form, monkeypatch):
    name, function = MISTAKES[mistake]
    for module in MODULES:
        if hasattr(module, function):
            monkeypatch.setattr(module, function, mistake)
    found = error(name, form)
    print(f"\n{mistake.__name__}, {form}: {found:.2f}, {found / TOLERANCE:.0f} times the tolerance")
    assert found > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("page_size", "head_dim", "problem"),
    [
        (16, 128, "engine.page_size=32 would work"),
        (32, 64, "needs heads of 128 values, not 64; engine.cache_dtype=compute would work"),
    ],
)
def test_an_int8_cache_that_the_kernel_cannot_read_is_refused(
    page_size, head_dim, problem, monkeypatch
):
    monkeypatch.setattr("grok.hardware.platform", lambda: "tpu")
    config = grok.load_config("grok-10m", [f"model.attention.head_dim={head_dim}"]).model
    with pytest.raises(ConfigError, match=problem):
        init_cache(config, 4, page_size, "int8")
