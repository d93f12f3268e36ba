"""A training step and a decode step of a config, as `grok train` and the engine run them, timed
beside their plans."""

import dataclasses
import time
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok.calibrate.timing import Clock, Timing, timing
from grok.config import RunConfig
from grok.config.sampling import SamplingParams
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model import build
from grok.optim.optimizer import make_optimizer
from grok.plan.programs import train_program
from grok.train.state import init_state

WARM_UP, REPEATS = 2, 9
ENGINE_STEPS = 4  # of a run: the engine looks at a step's tokens while the next one is computed


class Step(Protocol):
    """A step that can be repeated."""

    steps: int  # of one run

    def run(self) -> None:
        """Runs it so many times more, and waits for results."""


class TrainingStep:
    """The training step of a config on a mesh, with fresh weights and random tokens."""

    steps = 1

    def __init__(self, config: RunConfig, mesh: Mesh):
        """Compiles it."""
        self._mesh = mesh
        with jax.set_mesh(mesh):
            program = train_program(config, mesh)
            self._state = init_state(config, make_optimizer(config), mesh)
            vocab = config.model.vocab_size
            self._batch = {
                name: _random_rows(name, leaf, vocab)
                for name, leaf in program.arguments["batch"].items()
            }
            self._jitted = program.jitted
            self._jitted.lower(self._state, self._batch).compile()

    def run(self) -> None:
        """One more step."""
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._jitted(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))


def _random_rows(name: str, leaf: jax.ShapeDtypeStruct, vocab: int) -> jax.Array:
    """Random tokens, one document a row, nothing masked."""

    def make() -> jax.Array:
        if name in ("tokens_BT", "targets_BT"):
            return jax.random.randint(jax.random.key(0), leaf.shape, 0, vocab, leaf.dtype)
        if name == "positions_BT":
            return jnp.broadcast_to(jnp.arange(leaf.shape[1], dtype=leaf.dtype)[None], leaf.shape)
        return jnp.ones(leaf.shape, leaf.dtype)

    return jax.jit(make, out_shardings=leaf.sharding)()


class DecodeStep:
    """The engine in the middle of answers: `plan.batch_size` sequences, which reach `plan.tokens`
    tokens after `runs`."""

    steps = ENGINE_STEPS

    def __init__(self, config: RunConfig, mesh: Mesh, runs: int = WARM_UP + REPEATS):
        """Reads the prompts."""
        rows, tokens = config.plan.batch_size, config.plan.tokens
        options = dataclasses.replace(config.engine, max_num_seqs=rows)
        new = self.steps * runs + 2
        model = build.init(config.model, jax.random.key(0), mesh)
        self._engine = Engine(model, None, mesh, options)
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        shape = rows, max(1, tokens - new)
        prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
        for i, prompt in enumerate(prompts):
            self._engine.submit(Request(str(i), tuple(map(int, prompt)), params))
        while self._engine.stats.tokens_out < rows:
            self._engine.step()

    def run(self) -> None:
        """Some more steps."""
        for _ in range(self.steps):
            self._engine.step()


def time_step(step: Step, clock: Clock = time.perf_counter, repeats: int = REPEATS) -> Timing:
    """Seconds of a step, after some for warming up."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = clock()
        step.run()
        times.append((clock() - start) / step.steps)
    return timing(times[WARM_UP:])


def make_step(config: RunConfig, mesh: Mesh) -> TrainingStep | DecodeStep:
    """The step of `config.plan.program`, train or decode."""
    steps: dict[str, Any] = {"train": TrainingStep, "decode": DecodeStep}
    return steps[config.plan.program](config, mesh)
