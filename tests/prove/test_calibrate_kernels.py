"""The kernels that `grok calibrate` checks compile for a TPU at the sizes that it checks there."""

import os
import subprocess
import sys

import pytest

from grok.plan.compile import ENVIRONMENT

pytestmark = pytest.mark.prove

# In a process of its own, since libtpu reads its environment once.
COMPILE = """
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from grok.calibrate.check import FULL
from grok.calibrate.kernels import CHECKS
from grok.plan.compile_process import topology_devices
from grok.plan.topology import parse_slice

devices = topology_devices(parse_slice({topology!r}))
mesh = Mesh(devices[:1], "x", axis_types=(AxisType.Explicit,))
for check in CHECKS:
    inputs = jax.eval_shape(lambda: check.make_inputs(FULL))
    placement = NamedSharding(mesh, P())
    inputs = jax.tree.map(lambda x: x.update(sharding=placement), inputs)
    kernel = lambda *inputs: check.kernel(*inputs, interpret=False)
    specs = jax.tree.map(lambda leaf: P(), inputs)
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(kernel, in_specs=specs, out_specs=P(), check_vma=False)
        jax.jit(sharded).lower(*inputs).compile()
    print(check.name)
"""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_every_kernel_compiles(topology):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(topology=topology)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
