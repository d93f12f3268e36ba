"""Flips random single bits in the files of a run's checkpoint, and counts those that a restore does
not notice.

    python -m benchmarks.bit_flips --flips 200
    python -m benchmarks.bit_flips --flips 200 --hosts 2 --bucket

Run it from the root of the repository. The state of a tiny run (parameters, moments, averages,
plain data) is saved twice, in a temporary folder or in an emulator of gs://, by one process with
four simulated devices or by two with two each. Then one bit at a time of the newer checkpoint is
flipped: every other one anywhere in all of its bytes, the others in a file drawn first, as most
files are small. After each, the newest good checkpoint is looked for and restored, as a run that
starts again does it, and the bit is put right. Prints, for each part of the checkpoint, the flips
and how many were noticed: "list" by the checksums of files, "array" by those of chunks as they were
read. Exit code 1 where one was silent.
"""

import argparse
import collections
import contextlib
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from http.server import HTTPServer
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from grok import distributed, sharding, storage
from grok.checkpoint.damaged import DAMAGED
from grok.checkpoint.manager import Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import AttentionConfig, DataConfig, MeshConfig, ModelConfig, MoEConfig, RunConfig
from grok.config.load import to_dict
from grok.config.optimizer import OptimizerConfig
from grok.errors import DamageError
from grok.hardware import configure_devices
from grok.optim.optimizer import make_optimizer
from grok.train.checkpointing import state_trees
from grok.train.state import abstract_state, init_state
from tests.emulator import bucket
from tests.fixtures.network import free_address

DEVICES, OLDER, NEWER = 4, 1, 2
CONFIG = RunConfig(
    model=ModelConfig(
        # Chunks of the embedding are large, and have other checksums than the rest.
        vocab_size=8192,
        num_layers=2,
        embed_dim=128,
        moe=MoEConfig(dim=256, num_experts=4),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        context_length=64,
    ),
    data=DataConfig(sequence_length=64, batch_size=8),
    optimizer=OptimizerConfig(ema_decay=0.99),
    mesh=MeshConfig(data=2, expert=2, simulated_devices=DEVICES),
)


def main() -> None:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1)
    parser.add_argument("--bucket", action="store_true", help="in an emulator of gs://")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        with distributed.exit_together():
            silent = flip_bits(arguments.folder, arguments.flips, arguments.seed)
        sys.exit(1 if silent else 0)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if arguments.bucket:
            # It reports each file that is looked for and not there, and clients that have enough.
            logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
            stack.enter_context(mock.patch.object(HTTPServer, "handle_error"))
            stack.enter_context(bucket())
            folder = "gs://bucket/run"
        address, hosts = free_address(), str(arguments.hosts)
        command = [sys.executable, "-m", "benchmarks.bit_flips", "--folder", folder]
        command += ["--flips", str(arguments.flips), "--seed", str(arguments.seed)]
        own = {"JAX_PLATFORMS": "cpu", "GROK_COORDINATOR": address, "GROK_NUM_PROCESSES": hosts}
        processes = [
            subprocess.Popen(command, env=os.environ | own | {"GROK_PROCESS_ID": str(number)})
            for number in range(arguments.hosts)
        ]
        sys.exit(max(process.wait() for process in processes))


def flip_bits(folder: str, flips: int, seed: int) -> list[str]:
    """Saves, flips, restores and prints, as one of the processes; returns the silent flips."""
    configure_devices(DEVICES // int(os.environ["GROK_NUM_PROCESSES"]))
    distributed.initialize(CONFIG)
    mesh = sharding.make_mesh(data=CONFIG.mesh.data, expert=CONFIG.mesh.expert)
    optimizer = make_optimizer(CONFIG)
    with jax.set_mesh(mesh):
        state = init_state(CONFIG, optimizer, mesh)
        # Zeros would take next to no bytes.
        state.opt_state = jax.jit(lambda tree: jax.tree.map(_without_zeros, tree))(state.opt_state)
        checkpoints = Checkpoints(folder, RetentionPolicy(2))
        for step in (OLDER, NEWER):
            checkpoints.save(step, state_trees(state), {"config": to_dict(CONFIG)})
        checkpoints.close()
        expected = state_trees(abstract_state(CONFIG, optimizer, mesh))
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        silent = []
        for number, (name, bit) in enumerate(_bits(folder, flips, seed)):
            if distributed.is_primary() and number % 20 == 0:
                print(f"{time.strftime('%X')}  {number} of {flips}", file=sys.stderr, flush=True)
            original = _flip(folder, name, bit)
            noticed_by = _restore(folder, expected)
            _put_right(folder, name, original)
            counts[name.partition("/")[0], noticed_by] += 1
            if noticed_by == "nothing":
                silent.append(f"bit {bit} of {name}")
    if distributed.is_primary():
        for (part, noticed_by), count in sorted(counts.items()):
            print(f"{part:24} {count:5} flips noticed by: {noticed_by}")
        print(f"{flips} flips, {len(silent)} silent", *silent, sep="\n  ", flush=True)
    return silent


def _without_zeros(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x + jnp.sin(1e4 * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


def _bits(folder: str, flips: int, seed: int) -> list[tuple[str, int]]:
    """The files and bits to flip, the same in all processes."""

    def draw() -> list[tuple[str, int]]:
        rng = random.Random(seed)
        sizes = storage.list_tree(storage.join(folder, str(NEWER)))
        names = sorted(name for name, size in sizes.items() if size)
        weights = [sizes[name] for name in names]
        chosen = [
            rng.choice(names) if number % 2 else rng.choices(names, weights)[0]
            for number in range(flips)
        ]
        return [(name, rng.randrange(8 * sizes[name])) for name in chosen]

    return [(name, bit) for name, bit in distributed.broadcast_from_primary(draw)]


def _flip(folder: str, name: str, bit: int) -> bytes | None:
    """Flips a bit, in process 0, which gets the file as it was."""
    original = None
    if distributed.is_primary():
        path = storage.join(folder, str(NEWER), name)
        original = storage.read_bytes(path)
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        storage.write_bytes(path, bytes(damaged))
    distributed.barrier()
    return original


def _restore(folder: str, expected: dict[str, Any]) -> str:
    """Restores as a run that starts again; returns what noticed the flip."""
    checkpoints = Checkpoints(folder, RetentionPolicy(2))
    try:
        if checkpoints.newest_good(lambda _: None) == OLDER:
            return "list"
        try:
            checkpoints.restore(NEWER, expected)
        except DamageError:
            return "array"
        return "nothing"
    finally:
        checkpoints.close()


def _put_right(folder: str, name: str, original: bytes | None) -> None:
    if original is not None:
        newer, aside = storage.join(folder, str(NEWER)), storage.join(folder, DAMAGED, str(NEWER))
        if storage.exists(aside):
            storage.move(aside, newer)
        storage.write_bytes(storage.join(newer, name), original)
    distributed.barrier()


if __name__ == "__main__":
    main()
