"""Share of the time that a device waits for the engine while all slots decode.

The device is a stand-in: it takes steps one after the other, each `--milliseconds` long, and their
results can be read when they are over. All else is real: the engine, detokenising, the arrays that
are sent, and the call of a compiled program with the arguments of the real one, which does next to
nothing. Also printed: arrays sent and fetched a step, and the time that the host works for a step.

    python -m benchmarks.decode_idle
    python -m benchmarks.decode_idle --slots 512 --milliseconds 8 --profile
    python -m benchmarks.decode_idle --cpu-time  # on a busy machine: the host's work in CPU seconds
"""

import argparse
import cProfile
import dataclasses
import functools
import pstats
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import grok
from grok.config import AttentionConfig, EngineConfig, ModelConfig, MoEConfig
from grok.config.sampling import SamplingParams
from grok.data.tokenizers import Tokenizer, load_tokenizer
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.hardware import configure_devices
from grok.infer import engine as engine_module
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.infer.step import StepResult

PROMPT = 64  # tokens


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--milliseconds", type=float, default=15)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cpu-time", action="store_true", help="count the thread's CPU seconds")
    parser.add_argument(
        "--profile", action="store_true", help="the host's functions, slowest first"
    )
    asked = parser.parse_args()
    configure_devices(0)
    tokenizer = small_tokenizer()
    for slots in asked.slots:
        device = Device(asked.milliseconds / 1e3, asked.cpu_time)
        engine_module.forward_and_sample = device.forward_and_sample
        engine = make_engine(slots, tokenizer)
        start_all(engine, slots, asked.steps)
        profile = cProfile.Profile()
        device.reset()
        if asked.profile:
            profile.enable()
        for _ in range(asked.steps):
            engine.step()
        profile.disable()
        print(f"{slots} slots: {device.summary()}")
        if asked.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(20)


class Device:
    """A device that takes `seconds` for each step, in the order in which they are dispatched. With
    `cpu_time` the time is that in which the engine's thread works or waits for the device: what
    other programs take from it does not count, and nothing sleeps."""

    def __init__(self, seconds: float, cpu_time: bool):
        self._seconds, self._cpu_time, self._end = seconds, cpu_time, 0.0
        self._waited = 0.0
        self.reset()

    def reset(self) -> None:
        """Begins to count."""
        self._started, self._waited_before = self._now(), self._waited
        self._idle = 0.0
        self._steps = self._sent = self.fetched = 0

    def _now(self) -> float:
        return time.thread_time() + self._waited if self._cpu_time else time.perf_counter()

    def forward_and_sample(self, *arguments):
        """Stands for the engine's program: dispatches a step."""
        result, cache, slots = _next_to_nothing(*arguments)
        now = self._now()
        self._idle += max(0.0, now - max(self._end, self._started))
        self._end = max(now, self._end) + self._seconds
        self._steps += 1
        self._sent += sum(isinstance(a, np.ndarray) for a in jax.tree.leaves(arguments))
        fields = (result.sampled_BU2, result.top_BU2X)
        sampled, top = (Pending(self, array, self._end) for array in fields)
        return dataclasses.replace(result, sampled_BU2=sampled, top_BU2X=top), cache, slots

    def wait(self, end: float) -> None:
        """Waits until a step is over."""
        if (seconds := end - (started := self._now())) <= 0:
            return
        if self._cpu_time:
            self._waited += seconds
        else:
            time.sleep(seconds)
            self._waited += self._now() - started

    def summary(self) -> str:
        """Idle share, times and arrays since `reset`."""
        total = self._now() - self._started
        host = total - (self._waited - self._waited_before)
        return (
            f"idle {self._idle / total:.2%}, {1e3 * total / self._steps:.2f} ms a step, of which "
            f"the host works {1e3 * host / self._steps:.2f} ms; {self._sent / self._steps:g} "
            f"arrays sent and {self.fetched / self._steps:g} fetched a step"
        )


class Pending:
    """An array that can be read when its step is over."""

    def __init__(self, device: Device, array: jax.Array, end: float):
        self._device, self._array, self._end = device, array, end

    def copy_to_host_async(self) -> None:
        """Does nothing, as the array is in the host's memory."""

    def __array__(self, *args, **kwargs) -> np.ndarray:
        self._device.wait(self._end)
        self._device.fetched += 1
        return np.asarray(self._array)


@functools.partial(jax.jit, donate_argnums=(1, 2))
def _next_to_nothing(model, cache, slots, inputs):
    """Some token for each chunk."""
    shape = (*inputs.words.shape[:2], 2)
    sampled_BU2 = inputs.words[:, :, 1:3] * 7 % 300 + 4
    top_BU2X = jnp.zeros((*shape, 20), jnp.int32)
    return StepResult(sampled_BU2, top_BU2X, jnp.zeros((*shape[:2], 8)), None), cache, slots


def make_engine(slots: int, tokenizer: Tokenizer) -> Engine:
    """An engine with a small model, and tables and bans as large as in earnest."""
    config = ModelConfig(
        vocab_size=131072,
        num_layers=2,
        embed_dim=8,
        moe=MoEConfig(dim=8),
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4),
        context_length=8192,
        compute_dtype="float32",
    )
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    options = EngineConfig(max_num_seqs=slots, num_pages=64 * slots)
    return Engine(grok.init(config, jax.random.key(0), mesh), tokenizer, mesh, options)


def start_all(engine: Engine, slots: int, steps: int) -> None:
    """Reads the prompts of as many requests as there are slots, so that all decode."""
    params = SamplingParams(max_tokens=steps + 100, stop=("never in the text",), ignore_eos=True)
    for i in range(slots):
        prompt = tuple((np.arange(PROMPT) * (i + 3) % 300 + 4).tolist())
        engine.submit(Request(f"{i}", prompt, params))
    while engine.stats.waiting or engine.stats.tokens_out < 4 * slots:
        engine.step()


def small_tokenizer() -> Tokenizer:
    """A tokenizer of 320 pieces."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(f"The number {i} comes before {i + 1}." for i in range(500)))
        train_tokenizer([text], path := Path(folder) / "tokenizer.model", 320)
        return load_tokenizer(path)


if __name__ == "__main__":
    main()
