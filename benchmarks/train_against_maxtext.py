"""Times a training step on CPU, grok's and MaxText's, in one run.

    python -m benchmarks.train_against_maxtext
    python -m benchmarks.train_against_maxtext --maxtext ENV/bin/python --turns 2

A mixture of experts in Grok's shape: embed dim 512, 4 layers, 8 experts of which each token
selects two, 8 rows of 256 tokens, float32, one device. MaxText comes from the Python package
index, in its own environment (`pip install 'maxtext[tpu]==0.2.5'`, which includes JAX and needs no
TPU), and trains its mixtral block with the same sizes: capacity factor 1.25, which drops tokens,
and its two dropless forms. They alternate, so that other work on the machine slows all of them.
Prints medians of the steps of all turns, tokens per second, and ratios.
"""

import argparse
import functools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.config import RunConfig
from grok.config.load import load_config
from grok.hardware import configure_devices
from grok.optim.optimizer import make_optimizer
from grok.train.state import init_state
from grok.train.step import train_step

ROWS, LENGTH = 8, 256
OURS = [
    "model.vocab_size=8192",
    "model.embed_dim=512",
    "model.num_layers=4",
    "model.attention.num_heads=8",
    "model.attention.num_kv_heads=2",
    "model.attention.head_dim=64",
    "model.moe.dim=2048",
    "model.compute_dtype=float32",
    f"data.sequence_length={LENGTH}",
    f"data.batch_size={ROWS}",
]
MAXTEXT = (
    "dataset_type=synthetic hardware=cpu skip_jax_distributed_system=true "
    "enable_checkpointing=false enable_tensorboard=false decoder_block=mixtral base_emb_dim=512 "
    "base_num_decoder_layers=4 base_num_query_heads=8 base_num_kv_heads=2 head_dim=64 "
    "base_mlp_dim=2048 base_moe_mlp_dim=2048 num_experts=8 num_experts_per_tok=2 vocab_size=8192 "
    f"max_target_length={LENGTH} per_device_batch_size={ROWS} dtype=float32 "
    "weight_dtype=float32"
).split()
VARIANTS = {
    "maxtext capacity 1.25": ["capacity_factor=1.25", "sparse_matmul=False"],
    "maxtext dropless dense": ["sparse_matmul=False"],
    "maxtext dropless ragged": ["sparse_matmul=True", "megablox=False"],
}


def prepared_step(
    remat: str, overrides: tuple[str, ...] = ()
) -> tuple[Any, Any, dict[str, np.ndarray], Mesh]:
    """Our jitted step, its first state, a batch, and the mesh of one device that they are for."""
    config: RunConfig = load_config("grok-10m", [*OURS, f"model.remat={remat}", *overrides])
    optimizer = make_optimizer(config)
    tokens = np.random.default_rng(0).integers(0, 8192, (ROWS, LENGTH), np.int32)
    batch = {
        "tokens_BT": tokens,
        "targets_BT": np.roll(tokens, -1, 1),
        "mask_BT": np.ones((ROWS, LENGTH), np.float32),
    }
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = jax.jit(
        functools.partial(train_step, config=config, optimizer=optimizer), donate_argnums=0
    )
    return step, init_state(config, optimizer, mesh), batch, mesh


def ours(steps: int, remat: str) -> list[float]:
    """Seconds of each step after the first two."""
    step, state, batch, mesh = prepared_step(remat)
    times = []
    with jax.set_mesh(mesh):
        for _ in range(steps + 2):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
    return times[2:]


def maxtext(python: str, arguments: list[str], steps: int) -> list[float]:
    """Seconds of each step after the first two, as MaxText logs them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "maxtext.trainers.pre_train.train", "run_name=benchmark"]
        command += [f"base_output_directory={folder}", f"steps={steps + 2}", *MAXTEXT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = re.findall(r"completed step: \d+, seconds: ([\d.]+)", done.stdout + done.stderr)
    if len(seconds) < steps + 2:
        sys.exit(f"MaxText exited with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return [float(text) for text in seconds[2:]]


def main() -> None:
    """Takes the turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--maxtext", help="Python of an environment that has it")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of each in a turn")
    options = parser.parse_args()
    configure_devices(1)
    timings: dict[str, list[float]] = {}
    for _ in range(options.turns):
        for remat in ("none", "full"):
            timings.setdefault(f"ours, exact, remat {remat}", []).extend(ours(options.steps, remat))
        for name, arguments in VARIANTS.items() if options.maxtext else ():
            timings.setdefault(name, []).extend(maxtext(options.maxtext, arguments, options.steps))
    first = statistics.median(next(iter(timings.values())))
    for name, times in timings.items():
        seconds = statistics.median(times)
        rate = ROWS * LENGTH / seconds
        print(f"{name:28} {seconds:7.2f} s  {rate:7.1f} tokens/s  {seconds / first:6.2f} x ours")


if __name__ == "__main__":
    main()
