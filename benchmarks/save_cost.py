"""Cost of an asynchronous save for the training steps around it.

    python -m benchmarks.save_cost --saves 10 --steps 20

One run of a small model, on simulated CPU devices or the machine's own. Steps are timed one by
one, and every `--steps` steps everything is saved into a temporary folder. Prints medians in
milliseconds, and their ratio to a step without a save, of: steps while a save is in the
background, the part of a save that the loop waits for, and a whole save. The last line is the
share of the run's time that saves cost.
"""

import argparse
import functools
import statistics
import tempfile
import time

import jax
import numpy as np

from grok import sharding
from grok.checkpoint.manager import Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import DataConfig, RunConfig
from grok.config.load import load_config, to_dict
from grok.data.device_feed import shard_batch
from grok.hardware import configure_devices
from grok.optim.optimizer import make_optimizer
from grok.train.checkpointing import state_trees
from grok.train.state import init_state
from grok.train.step import train_step


def make_batch(config: RunConfig, mesh) -> dict[str, jax.Array]:
    """A batch of random tokens on the mesh."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    targets, mask = np.roll(tokens, -1, 1), np.ones(shape, np.float32)
    return shard_batch({"tokens_BT": tokens, "targets_BT": targets, "mask_BT": mask}, mesh)


def main() -> None:
    """Runs the steps and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="grok-10m", help="preset or YAML file of the model")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="between two saves")
    parser.add_argument("--devices", type=int, default=1, help="simulated; 0: the machine's own")
    arguments = parser.parse_args()
    configure_devices(arguments.devices)
    config = RunConfig(
        model=load_config(arguments.config).model,
        data=DataConfig(batch_size=max(1, jax.device_count()), sequence_length=128),
    )
    mesh = sharding.make_mesh()
    optimizer = make_optimizer(config)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        step_function = jax.jit(
            functools.partial(train_step, config=config, optimizer=optimizer), donate_argnums=0
        )
        batch, state = make_batch(config, mesh), init_state(config, optimizer, mesh)
        state, _ = jax.block_until_ready(step_function(state, batch))
        checkpoints = Checkpoints(folder, RetentionPolicy(1))
        without, during, blocking, whole = [], [], [], []
        began = time.perf_counter()
        for number in range(1, arguments.saves + 1):
            start = time.perf_counter()
            checkpoints.save(number, state_trees(state), {"config": to_dict(config)})
            blocking.append(time.perf_counter() - start)
            finished = None
            for _ in range(arguments.steps):
                lap = time.perf_counter()
                state, _ = jax.block_until_ready(step_function(state, batch))
                now = time.perf_counter()
                if not checkpoints.saving() and finished is None:
                    finished = now - start
                    continue  # part of this step was with a save, part without
                (during if finished is None else without).append(now - lap)
            checkpoints.wait()
            whole.append(finished or time.perf_counter() - start)
        seconds = time.perf_counter() - began
        checkpoints.close()
    if not without:
        parser.error("no step was without a save; more --steps would work.")
    report(without, during, blocking, whole)
    steps = len(without) + len(during) + len(whole)
    share = 1 - statistics.median(without) * steps / seconds
    print(f"share of the run's time that {arguments.saves} saves cost: {share:.1%}")


def report(*groups: list[float]) -> None:
    """A line for each group of seconds: how many, median, ratio to the first group's."""
    names = ("step without a save", "step during a save", "save, blocking part", "save, whole")
    base = statistics.median(groups[0])
    for name, seconds in zip(names, groups, strict=True):
        if seconds:
            median = statistics.median(seconds)
            print(f"{name:20} {len(seconds):5}  {median * 1e3:9.1f} ms  {median / base:6.2f}")


if __name__ == "__main__":
    main()
