"""Where a plan points: at the preset for its slice, and at the batch that would fill it."""

import dataclasses

from grok.config.load import load_config
from grok.hardware import GIB
from grok.plan.estimate import make_plan
from grok.plan.presets import filling_batch, slice_presets
from tests.plan.test_estimate import CONFIG, MEASURED, RATES, SLICE


def filling(peak: float, rows: int) -> str | None:
    data = dataclasses.replace(CONFIG.data, batch_size=rows)
    config = dataclasses.replace(CONFIG, data=data)
    return filling_batch(make_plan(config, SLICE, RATES, MEASURED | {"peak": peak}, None))


def test_a_batch_that_fills_the_memory():
    # 55 GiB of state, and 2 GiB a row: 95% of 95 GiB would hold 17 rows.
    assert (filling(57 * GIB, 64) or "").startswith("data.batch_size=1024, 16 in place of 1 rows")
    assert (filling(59 * GIB, 128) or "").startswith("data.batch_size=1024, 16 in place of 2 rows")
    assert filling(80 * GIB, 64) is None
    assert filling(57 * GIB, 8) is None  # fewer rows than devices


def test_presets_of_a_model():
    assert list(slice_presets(load_config("grok-8b"))) == ["train-8b-v6e-2x4"]
    assert "train-v5p-4x4x8" in slice_presets(load_config("grok-1"))
    assert slice_presets(load_config("grok-10m")) == {}
