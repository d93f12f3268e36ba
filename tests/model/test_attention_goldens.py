"""Attention's terms against the golden sets of releases that have them, and mistakes in these
terms, each made here on purpose: the comparison must see it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import grok
from grok.model.build import from_arrays
from grok.model.decoder import Decoder
from grok.weights.huggingface.source import HuggingFaceSource
from tests.fixtures.families import FOLDER, tree
from tests.model import test_attention_terms as terms

# Largest error of a logit in float32. The goldens' own rounding is 2.5e-4 in the first, whose
# logits are of some tens, and 5e-5 in the others.
TOLERANCE = {"grok2": 2e-3, "mistral": 2e-4, "llama31": 2e-4}
# The golden set that shows a mistake, and the largest change of a logit by its README.
MISTAKES = {
    terms.one_key_more: ("mistral", 8.9869),
    terms.one_key_less: ("mistral", 8.3332),
    terms.no_window: ("mistral", 12.5653),
    terms.no_temperature: ("grok2", 7.8865),
    terms.temperature_before_the_cap: ("grok2", 4.0431),
    terms.position_from_one: ("grok2", 0.3145),
    terms.length_from_one: ("grok2", 1.4479),
    terms.unscaled: ("llama31", 11.9222),
    terms.all_divided: ("llama31", 11.8935),
}


@functools.cache
def model(family: str, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    source = HuggingFaceSource(FOLDER / family)
    config = dataclasses.replace(source.config, param_dtype="float32", compute_dtype="float32")
    arrays = {name: array.astype(np.float32) for name, array in tree(family, config).items()}
    return from_arrays(config, arrays, mesh)


@functools.cache
def prompts(family: str) -> list[np.ndarray]:
    with np.load(FOLDER / family / "inputs.npz") as inputs:
        return [inputs[f"prompt_{i}"] for i in range(len(inputs.files))]


@functools.cache
def outputs(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / family / "outputs.npz") as arrays:
        return {name: arrays[name] for name in arrays.files if not name.startswith("hidden")}


def error(family: str, mesh: jax.sharding.Mesh | None = None) -> float:
    """Largest error of a logit, with all prompts packed into one row, the same for four devices."""
    lengths = [len(prompt) for prompt in prompts(family)]
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    # A new function each time, for jax.jit not to reuse what it traced with or without a mistake.
    run = jax.jit(lambda model, *inputs: model.unembed(model.hidden(*inputs)[0]))
    inputs = np.concatenate(prompts(family))[None], segments, positions
    rows = [np.pad(array, ((0, 3), (0, -array.shape[1] % 8)), "wrap") for array in inputs]
    logits_BTV = np.asarray(run(model(family, mesh), *rows))[:, : segments.shape[1]]
    expected = np.concatenate([outputs(family)[f"logits_{i}"] for i in range(len(lengths))])
    return np.abs(logits_BTV - expected).max()


@pytest.mark.parametrize(
    "sizes", [None, *(pytest.param(s, marks=pytest.mark.prove) for s in ((2, 2, 2), (1, 2, 4)))]
)
@pytest.mark.parametrize("family", TOLERANCE)
def test_logits_of_packed_prompts_are_the_releases(family, sizes):
    found = error(family, sizes and grok.make_mesh(*sizes))
    print(f"\n{family}, {sizes}: {found:.1e}")
    assert found < TOLERANCE[family]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake, monkeypatch):
    (family, change), (_, function) = MISTAKES[mistake], terms.MISTAKES[mistake]
    for module in terms.MODULES:
        if hasattr(module, function):
            monkeypatch.setattr(module, function, mistake)
    found = error(family)
    print(f"\n{mistake.__name__}: {found:.2f}, {found / TOLERANCE[family]:.0f} times the tolerance")
    assert found == pytest.approx(change, abs=TOLERANCE[family])
