"""Trains with one device that lies from a random step on, again and again, by one or more processes
that are started for it, and says what the SDC check found: a JSON line for each fault."""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax

from grok import distributed, sharding
from grok.cluster import CLUSTER_VARIABLES
from grok.config import RunConfig
from grok.config.load import load_config
from grok.data.device_feed import global_batches
from grok.errors import SilentCorruption
from grok.hardware import configure_devices
from grok.optim.optimizer import make_optimizer
from grok.train.run_data import read_data
from grok.train.sdc import SdcCheck
from grok.train.state import TrainState, init_state
from grok.train.step import train_step
from tests.fixtures.network import free_address
from tests.train.lying_chips import (
    BACKWARD,
    FORWARD,
    Fault,
    copied_tensors,
    install,
    marked,
    with_wrong_copy,
)

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 8, 2


def find_faults(config_file: Path, processes: int, count: int) -> list[dict]:
    """What the check found of `count` faults in runs of this config by so many processes."""
    address, started = free_address(), []
    for number in range(processes):
        cluster = dict(zip(CLUSTER_VARIABLES, (address, str(processes), str(number)), strict=True))
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(config_file), str(count)],
                env=os.environ | (cluster if processes > 1 else {}),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    reports = [
        [json.loads(line) for line in out.splitlines() if line[:1] == "{"] for out in outputs
    ]
    assert all(report == reports[0] for report in reports)
    return reports[0]


def main() -> None:
    """Injects the faults and prints what was found."""
    config = load_config(sys.argv[1])
    with distributed.exit_together():
        distributed.initialize(config)
        configure_devices(config.mesh.simulated_devices // distributed.process_count())
        m = config.mesh
        mesh = sharding.make_mesh(m.data, m.expert, m.tensor, m.slice)
        with install(), jax.set_mesh(mesh):
            _inject(config, mesh, int(sys.argv[2]))


def _inject(config: RunConfig, mesh: jax.sharding.Mesh, count: int) -> None:
    optimizer = make_optimizer(config)
    step = jax.jit(functools.partial(train_step, config=config, optimizer=optimizer))
    check = SdcCheck(config.train, mesh)
    batches = list(global_batches(read_data(config).train, mesh, range(STEPS), 1))
    start = init_state(config, optimizer, mesh)
    distributed.compile_in_lockstep(step, start, marked(batches[0], None))
    tensors = copied_tensors(start)
    for seed in range(count):
        draw = random.Random(seed)
        device, first = draw.randrange(mesh.size), draw.randint(1, STEPS)
        place = (FORWARD, BACKWARD, draw.choice(tensors))[seed % 3]

        def one_step(number: int, state: TrainState, device=device, first=first, place=place):
            lies = number >= first
            batch = batches[number - 1]
            batch = marked(batch, Fault(device, place) if lies and place in (1, 2) else None)
            state, _ = step(state, batch)
            if number == first and isinstance(place, str):
                state = with_wrong_copy(state, place, mesh.devices.flat[device])
            if number % EVERY == 0:
                check.check(number, state, batch)
            return state

        found = {"step": None, "message": ""}
        state = start
        try:
            for number in range(1, STEPS + 1):
                state = one_step(number, state)
        except SilentCorruption as error:
            found = {"step": error.step, "message": str(error)}
        liar = mesh.devices.flat[device]
        fault = {"device": liar.id, "process": liar.process_index, "from_step": first}
        print(json.dumps(fault | {"place": place, "found": found}), flush=True)


if __name__ == "__main__":
    main()
