"""Places of mesh axes on a grid of chips, by coordinates."""

from typing import NamedTuple

import numpy as np
import pytest

from grok.sharding.blocks import block_grid
from grok.sharding.mesh import make_mesh


class Device(NamedTuple):
    """A chip as JAX shows it."""

    coords: tuple[int, int, int]
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    platform: str = "tpu"
    process_index: int = 0

    @property
    def id(self) -> int:
        return 100 * self.coords[0] + self.coords[1]


def slice_of(rows: int, columns: int) -> list[Device]:
    return [Device((x, y, 0)) for x in range(rows) for y in range(columns)]


def extents(devices) -> list[int]:
    """Chips along either side that the devices lie on."""
    coords = np.array([device.coords[:2] for device in devices.reshape(-1)])
    return [len(set(side)) for side in coords.T]


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((1, 64, 4, 1), [2, 2]),
        ((1, 32, 8, 1), [4, 2]),
        ((1, 32, 1, 8), [4, 2]),
        ((1, 16, 16, 1), [1, 16]),  # a ring has two links, and a square of sixteen no more
        ((1, 16, 4, 4), [4, 4]),
        ((1, 1, 256, 1), [16, 16]),
    ],
)
def test_groups_are_blocks_with_most_links(shape, group):
    grid = block_grid(shape, slice_of(16, 16))
    assert grid.shape == shape
    assert len(set(grid.reshape(-1).tolist())) == 256
    assert sorted(extents(grid[0, 0])) == sorted(group)
    neighbours = np.array([device.coords for device in grid[0, 0].reshape(-1)])
    assert (neighbours.max(axis=0) - neighbours.min(axis=0))[:2].tolist() == [
        extent - 1 for extent in extents(grid[0, 0])
    ]


def test_other_devices_are_left_to_jax():
    assert block_grid((1, 2, 2, 1), slice_of(2, 2)[:3]) is None
    assert (
        block_grid((1, 3, 1, 1), [Device((0, 0, 0)), Device((1, 0, 0)), Device((5, 0, 0))]) is None
    )
    cube = [Device((x, 0, z), "TPU v5p") for x in range(2) for z in range(2)]
    assert block_grid((1, 2, 2, 1), cube) is None


def test_a_mesh_of_simulated_devices_is_in_their_order():
    mesh = make_mesh(2, 2, 2)
    assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))
