"""Copies of arrays on several hosts are restored once, to the same bits."""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import grok
from grok.checkpoint import copies
from grok.checkpoint.manager import Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.weights.read_plan import MeshProcesses
from grok.weights.source import part_shape

SPECS = {
    "experts": ((4, 16, 8), P(None, "data", "tensor")),
    "norms": ((4, 6), P()),
    "odd": ((3, 7), P()),
    "step": ((), P()),
}


def test_copies_are_restored_as_they_were_saved(tmp_path, monkeypatch):
    mesh = grok.make_mesh(2, 1, 2, 2)
    rng = np.random.default_rng(0)
    arrays = {
        name: jax.device_put(rng.standard_normal(shape), NamedSharding(mesh, spec))
        for name, (shape, spec) in SPECS.items()
    }
    with_slices = MeshProcesses(dict(mesh.shape), np.arange(8).reshape(mesh.devices.shape) // 4)
    monkeypatch.setattr(copies, "_processes", lambda _: with_slices)
    checkpoints = Checkpoints(tmp_path, RetentionPolicy(last=1))
    checkpoints.save(1, {"model": arrays}, {})
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
    checkpoints.wait()
    restored = checkpoints.restore(1, {"model": expected})["model"]
    for name, array in arrays.items():
        assert restored[name].sharding == array.sharding
        np.testing.assert_array_equal(restored[name], array)
    checkpoints.close()


def test_hosts_of_two_slices_restore_disjoint_chunks():
    """A matrix of `train-two-v5p-4x4x8` whose layers are cut on disk."""
    sizes = {"slice": 2, "data": 16, "expert": 8, "tensor": 1}
    processes = np.arange(256).reshape(tuple(sizes.values())) // 4
    mesh = MeshProcesses(sizes, processes)
    sharding = NamedSharding(
        jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)), P(None, None, "data", None)
    )
    leaf = jax.ShapeDtypeStruct((64, 8, 6144, 128), np.float32, sharding=sharding)
    plan = copies.plan_copies(leaf, (1, 1, 384, 128), mesh)
    start = (0,) * 4
    read = 0
    for devices in mesh.devices.values():
        for part in {plan.read_part(device, start) for device in devices}:
            assert all(s.start % n == 0 for s, n in zip(part, (1, 1, 384, 128), strict=True))
            read += math.prod(part_shape(part))
    assert read == math.prod(leaf.shape)
