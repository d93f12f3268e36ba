"""Rotary frequencies against Llama 3.1's published ones."""

import numpy as np
import pytest

from grok.config.model import RopeConfig, RopeScalingConfig
from grok.model.rope import rope_frequencies

SCALING = RopeScalingConfig(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
)


def by_hand(head_dim: int, config: RopeConfig) -> np.ndarray:
    """The three cases of the released code, in float64."""
    frequencies = config.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if (scaling := config.scaling) is None:
        return frequencies
    context = scaling.original_context_length
    result = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < context / scaling.high_freq_factor:
            result.append(frequency)
        elif wavelength > context / scaling.low_freq_factor:
            result.append(frequency / scaling.factor)
        else:
            smooth = context / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            result.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(result)


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "scaled"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_are_the_published_ones(head_dim, scaling):
    config = RopeConfig(theta=500000.0, scaling=scaling)
    np.testing.assert_allclose(
        rope_frequencies(head_dim, config), by_hand(head_dim, config), rtol=2e-6
    )


def test_of_64_frequencies_29_stay_and_29_are_divided():
    plain = rope_frequencies(128, RopeConfig(theta=500000.0))
    ratio = np.asarray(rope_frequencies(128, RopeConfig(theta=500000.0, scaling=SCALING)) / plain)
    assert (ratio == 1).sum() == 29
    assert (ratio == 1 / 8).sum() == 29
    np.testing.assert_allclose(ratio[[29, 30, 35]], [0.82817, 0.64374, 0.125], atol=5e-6)
