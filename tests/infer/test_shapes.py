"""Sizes of an engine's programs by the chip that they are for."""

import dataclasses

import jax
import pytest

import grok
from grok import hardware
from grok.config import EngineConfig
from grok.config.load import load_config
from grok.infer.shapes import EngineShapes, prefill_chunk_size


@pytest.mark.parametrize(
    ("preset", "chip", "expert", "tokens"),
    [
        # FLOP per byte of the chip, times bytes of a weight / 2, times 8/2 experts over the groups
        # that share each; in pages of 32.
        ("decode-v6e-4x4", "TPU v6 lite", 2, 576),  # 560 / 2 * 4 / 2 = 560.4
        ("decode-v5p-2x2x2", "TPU v5p", 1, 352),  # 166 / 2 * 4 = 332
        ("decode-v5p-2x2x1-int4", "TPU v5p", 1, 352),  # the int8 rate: 332 / 4 * 4 = 332
        ("decode-v5e-8x8", "TPU v5e", 8, 256),  # 243 / 2 = 122: the fewest
        ("decode-llama-3.1-70b-v6e-2x4", "TPU v6 lite", 1, 288),  # no experts: 280.2
        ("decode-v6e-4x4", "cpu", 2, 256),
    ],
)
def test_a_prefill_reads_weights_for_as_many_tokens_as_the_chip_asks(
    monkeypatch, preset, chip, expert, tokens
):
    monkeypatch.setattr(hardware, "device_kind", lambda: chip)
    mesh = grok.make_mesh(data=1, expert=expert, tensor=8 // expert)
    config = load_config(preset)
    with jax.set_mesh(mesh):
        assert prefill_chunk_size(config.model, config.engine) == tokens
        explicit = EngineConfig(prefill_chunk_size=64)
        assert prefill_chunk_size(config.model, explicit) == 64
        shapes = EngineShapes.of(config.model, dataclasses.replace(config.engine, page_size=64))
    assert shapes.layout.max_chunks == -(-tokens // 64)


def test_attention_in_int4_changes_no_prefill(monkeypatch):
    """Experts decide: they are as large in both."""
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU v5p")
    int4, int4_all = (
        load_config("decode-v5p-2x2x1-int4", (f"model.param_dtype={dtype}",))
        for dtype in ("int4", "int4_all")
    )
    sizes = [prefill_chunk_size(config.model, config.engine) for config in (int4, int4_all)]
    assert sizes[0] == sizes[1]
