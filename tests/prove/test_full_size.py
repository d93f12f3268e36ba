"""The real model, 314 B parameters and 64 layers, compiled for real slices with no TPU at hand.

`make prove` runs these; each compile takes minutes. They say that the training step as it stands
fits a slice, and print what the compiler answers.
"""

import json
import subprocess
import sys

import pytest

HBM_GIB = {"v5p": 95}

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
import grok
from grok import sharding
from grok.train.optimizer import make_optimizer
from grok.train.state import abstract_state
from grok.train.step import train_step

topology, expert, overrides = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
devices = topologies.get_topology_desc(topology, platform="tpu").devices
config = grok.load_config("grok-1", ["data.sequence_length=8192", *overrides])
mesh = grok.make_mesh(expert=expert, devices=devices)
optimizer = make_optimizer(config)
rows = NamedSharding(mesh, sharding.spec("batch", "length"))
shape = (len(devices), 8192)
batch = {
    "tokens_BT": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
    "targets_BT": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
    "mask_BT": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
}
step = functools.partial(train_step, config=config, optimizer=optimizer)
with jax.set_mesh(mesh):
    state = abstract_state(config, optimizer, mesh)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
memory = compiled.memory_analysis()
gib = 2**30
print(json.dumps({
    "chips": len(devices),
    "state_gib": memory.argument_size_in_bytes / gib,
    "peak_gib": memory.peak_memory_in_bytes / gib,
}))
"""


@pytest.mark.prove
@pytest.mark.parametrize(("topology", "expert"), [("v5p:4x4x8", 8)])
def test_the_training_step_of_grok_1_fits(topology: str, expert: int, monkeypatch):
    """Float32 parameters and moments, one sequence of 8192 tokens a chip."""
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
    }.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", COMPILE, topology, str(expert)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(topology, figures)
    assert figures["peak_gib"] < HBM_GIB[topology.split(":")[0]]
