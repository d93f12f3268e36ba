"""Tokens per second of the engine, in one run on one device, against two simpler ways.

(a) Static batching: as many requests as there are slots start together and the next ones start when
the last of them has ended; same engine, same programs. (b) Experts in their plain form, every
expert on every token. Then the time of a decode step against what its bytes would take at the
bandwidth that a copy reaches here.

    python benchmarks/decode.py
    python benchmarks/decode.py --requests 64 --slots 16 --layers 4
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

import grok
from grok.config import EngineConfig, GrokConfig
from grok.infer.engine import Engine
from grok.infer.request import Request, SamplingParams
from grok.model import moe
from grok.ops.experts import experts_reference


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--embed", type=int, default=256)
    asked = parser.parse_args()
    config = GrokConfig(
        vocab_size=4096,
        num_layers=asked.layers,
        embed_dim=asked.embed,
        mlp_dim=4 * asked.embed,
        num_heads=8,
        num_kv_heads=2,
        head_dim=asked.embed // 8,
        context_length=512,
        compute_dtype="float32",
    )
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    model = grok.init(config, jax.random.key(0), mesh)
    options = EngineConfig(slots=asked.slots, page_size=32, prefill_chunk=128)
    requests = mixed(asked.requests)

    engine = Engine(model, None, mesh, options)
    rate(engine, [requests])  # compiles
    continuous = rate(engine, [requests])
    batches = [requests[i : i + asked.slots] for i in range(0, len(requests), asked.slots)]
    static = rate(engine, batches)
    token = one_step(engine, asked.slots)

    # The layer looks its form up by name when a program is traced, and a new model shape is traced.
    plain = moe.experts_tiled
    moe.experts_tiled = lambda *arguments: experts_reference(*arguments[:-1])
    jax.clear_caches()
    other = Engine(model, None, mesh, options)
    rate(other, [requests[:2]])
    every = rate(other, [requests])
    moe.experts_tiled = plain

    # What a decode step must read: attention and table once, and of the experts those chosen.
    experts = 3 * config.num_layers * config.embed_dim * config.mlp_dim
    chosen = min(config.num_experts, asked.slots * config.num_selected_experts)
    parameters = config.num_parameters() - experts * (config.num_experts - chosen)
    floor = 4 * parameters / copied_bytes_per_second()
    print(f"continuous batching {continuous:8.1f} tokens/s")
    print(f"static batching     {static:8.1f} tokens/s   {continuous / static:.2f} times slower")
    print(f"all experts         {every:8.1f} tokens/s   {continuous / every:.2f} times slower")
    print(f"a decode step of {asked.slots}: {1e3 * token:.2f} ms; its bytes {1e3 * floor:.2f} ms")


def mixed(count: int) -> list[Request]:
    """Prompts of 4 to 128 tokens, and answers of which most are short and some long."""
    random, found = np.random.default_rng(0), []
    for i in range(count):
        prompt = tuple(random.integers(4, 4096, random.integers(4, 128)).tolist())
        length = int(random.choice([8, 16, 32, 256], p=[0.4, 0.3, 0.2, 0.1]))
        found.append(Request(f"{i}", prompt, SamplingParams(max_tokens=length, temperature=0)))
    return found


def rate(engine: Engine, batches: list[list[Request]]) -> float:
    """New tokens per second over batches, each begun when the one before has ended."""
    before, started = engine.stats.tokens_out, time.perf_counter()
    for batch in batches:
        for _ in engine.generate([fresh(request) for request in batch]):
            pass
    return (engine.stats.tokens_out - before) / (time.perf_counter() - started)


def fresh(request: Request) -> Request:
    """The same with another first token, so that no page of the prompt is known."""
    first = int(time.perf_counter_ns() % 4000) + 4
    return dataclasses.replace(request, prompt=(first, *request.prompt[1:]))


def one_step(engine: Engine, slots: int) -> float:
    """Seconds of a decode step with all slots busy, the median of 50."""
    params = SamplingParams(max_tokens=100, temperature=0)
    for i in range(slots):
        engine.submit(Request(f"step-{i}", (5 + i,), params))
    while engine.stats.waiting:
        engine.step()
    times = []
    for _ in range(50):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    while engine.unfinished:
        engine.step()
    return float(np.median(times))


def copied_bytes_per_second() -> float:
    """Bytes read by a sum over an array larger than the caches, the best of 5."""
    array, total = jnp.ones(1 << 26, jnp.float32), jax.jit(jnp.sum)
    total(array).block_until_ready()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        total(array).block_until_ready()
        best = max(best, array.nbytes / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
