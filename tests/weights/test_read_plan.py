"""Reads of whole slices, planned for the meshes that the presets name: each byte leaves storage
once."""

import dataclasses

import numpy as np
import pytest

from grok.config import MESH_AXES
from grok.config.load import load_config
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.counted_reads import host_reads
from tests.fixtures.release_writer import write_sparse_release

LAYERS = 4


def processes_of(config: str) -> np.ndarray:
    """The host of each device in the mesh of a preset, as libtpu 0.0.50.1 and
    `make_mesh` have them."""
    mesh = load_config(config).mesh
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    row, column = np.indices((mesh.data, mesh.expert) if mesh.data > 1 else sizes[2:])
    hosts = {
        "train-v5p-4x4x8": 4 * column + (row // 2) % 2 * 2 + row // 8,
        "decode-v5e-8x8": 4 * (row % 4) + 2 * (row // 4) + column // 4,
        "decode-v6e-4x4": 2 * row + column // 4,
    }[config]
    return hosts.reshape(sizes)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> ReleaseSource:
    """Some layers of the release at its full width, in files of holes."""
    model = dataclasses.replace(load_config("grok-1").model, num_layers=LAYERS)
    folder = tmp_path_factory.mktemp("holes") / "ckpt-0"
    write_sparse_release(model, folder)
    return ReleaseSource(folder, model)


@pytest.mark.parametrize("config", ["train-v5p-4x4x8", "decode-v5e-8x8", "decode-v6e-4x4"])
def test_hosts_of_a_slice_read_each_byte_once(release, config):
    dtype = load_config(config).model.param_dtype
    hosts = host_reads(release, dtype, processes_of(config)).values()
    total = sum(host.read for host in hosts)
    print(f"\n{config}: {total / release.nbytes:.4f} of the checkpoint")
    assert 0.99 < total / release.nbytes < 1.1
    # None has to wait for another.
    assert max(host.read for host in hosts) < 1.1 * release.nbytes / len(hosts)
    assert max(host.batch for host in hosts) < 1 << 30
    # Requests of some size, and not one for each row.
    assert max(host.requests for host in hosts) < 1000
