"""The places of mesh axes on chips that are wired in two dimensions, as v5e's and v6e's are."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from grok.hardware import chip_of


def block_grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray | None:
    """The devices of a rectangle of chips in the shape of a mesh, whose last axis moves the most.

    From the last axis on, each takes the block of chips that gives it most links: four chips in a
    square have two links each to others of them, and four in a line one. None where the devices are
    no such rectangle, or an axis divides neither side.
    """
    if (chips := _rectangle(devices)) is None:
        return None
    ring = _ring_length(devices[0])
    left, apart, blocks = list(chips.shape), [1, 1], []
    for size in reversed(shape):
        options = [
            (size // y, y) for y in range(1, size + 1) if size % y == 0
            if left[0] % (size // y) == 0 and left[1] % y == 0
        ]  # fmt: skip
        if not options:
            return None

        def links(block: tuple[int, int], apart=apart) -> float:
            sides = zip(block, apart, chips.shape, strict=True)
            return sum(_links(n, gap, side, ring) for n, gap, side in sides)

        # Of equals a line, which leaves a whole side to the next axis.
        blocks.append(max(options, key=lambda block: (links(block), 1 in block)))
        left = [n // b for n, b in zip(left, blocks[-1], strict=True)]
        apart = [gap * b for gap, b in zip(apart, blocks[-1], strict=True)]
    blocks.reverse()
    sides = [x for x, _ in blocks] + [y for _, y in blocks]
    order = [i for axis in range(len(shape)) for i in (axis, axis + len(shape))]
    return chips.reshape(sides).transpose(order).reshape(shape)


def _links(chips: int, apart: int, side: int, ring: int) -> float:
    """Links of a chip to others of so many along a side, of which groups in between have a part."""
    if chips == 1:
        return 0.0
    is_ring = chips * apart == side and side % ring == 0
    return (1 + is_ring) / apart


def _ring_length(device: jax.Device) -> int:
    chip = chip_of(device.device_kind)
    assert chip is not None
    return chip.ring


def _rectangle(devices: Sequence[jax.Device]) -> np.ndarray | None:
    """The devices by their coordinates, if each is one chip of a rectangle of a generation that is
    wired in two dimensions."""
    chip = chip_of(devices[0].device_kind)
    if chip is None or chip.dimensions != 2 or len(devices) == 1:
        return None
    coords = np.array([device.coords[:2] for device in devices])
    coords -= coords.min(axis=0)
    sides = tuple(coords.max(axis=0) + 1)
    if math.prod(sides) != len(devices) or len(np.unique(coords, axis=0)) != len(devices):
        return None
    chips = np.empty(sides, object)
    for (x, y), device in zip(coords, devices, strict=True):
        chips[x, y] = device
    return chips
