"""Chips are recognised by what JAX calls them."""

import pytest

from grok.hardware import peak_flops


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # one of the two devices of a chip
        ("cpu", None),
    ],
)
def test_peak_of_one_device(kind, flops):
    assert peak_flops(kind) == flops
