"""Cost of the SDC check, beside that of a training step.

    python -m benchmarks.sdc --steps 10 --checks 5

A small model on simulated CPU devices or the machine's own: steps and checks alternate, and each is
timed to its end. Prints medians in milliseconds, and the share of a run's time that checks take at
`train.sdc_check_every`'s default."""

import argparse
import functools
import statistics
import time

import jax

from benchmarks.save_cost import make_batch
from grok import sharding
from grok.config import DataConfig, RunConfig, TrainConfig
from grok.config.load import load_config
from grok.hardware import configure_devices
from grok.optim.optimizer import make_optimizer
from grok.train.sdc import SdcCheck
from grok.train.state import init_state
from grok.train.step import train_step


def main() -> None:
    """Runs the steps and checks and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="grok-10m", help="preset or YAML file of the model")
    parser.add_argument("--checks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="between two checks")
    parser.add_argument("--devices", type=int, default=8, help="simulated; 0: the machine's own")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
    arguments = parser.parse_args()
    configure_devices(arguments.devices)
    batch_size = jax.device_count() * arguments.accumulate
    config = RunConfig(
        model=load_config(arguments.config).model,
        data=DataConfig(batch_size=batch_size, sequence_length=128),
        train=TrainConfig(sdc_check="stop", grad_accum_steps=arguments.accumulate),
    )
    mesh, optimizer = sharding.make_mesh(), make_optimizer(config)
    with jax.set_mesh(mesh):
        step = jax.jit(
            functools.partial(train_step, config=config, optimizer=optimizer), donate_argnums=0
        )
        batch, state = make_batch(config, mesh), init_state(config, optimizer, mesh)
        check = SdcCheck(config.train, mesh)
        state, _ = jax.block_until_ready(step(state, batch))
        check.check(0, state, batch)
        steps, checks = [], []
        for number in range(arguments.checks):
            for _ in range(arguments.steps):
                began = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, batch))
                steps.append(time.perf_counter() - began)
            began = time.perf_counter()
            check.check(number, state, batch)
            checks.append(time.perf_counter() - began)
    step_s, check_s = statistics.median(steps), statistics.median(checks)
    every = config.train.sdc_check_every
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {arguments.config}")
    print(f"step {1e3 * step_s:.0f} ms, check {1e3 * check_s:.0f} ms: {check_s / step_s:.2f} steps")
    share = check_s / (every * step_s + check_s)
    print(f"every {every} steps: {share:.2%} of the time")


if __name__ == "__main__":
    main()
