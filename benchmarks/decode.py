"""Tokens per second of the engine compared with simpler methods, in one run on one device.

(a) Static batching: as many requests as there are slots start together, and the next ones start
when the last of them has finished. A plain loop computes every row until then; one that drops
finished rows reads fewer experts as rows finish. Same engine, same programs.
(b) Every expert on every token: as in the released code, and with weights read in place as the
engine does, which differs by the bytes alone. For each method: the time of a prompt, and the time
of a decode step of one row and of all slots, compared with the floor, the time in which all cores
together read its bytes. All times are of the wall: a thread's own clock knows of one core.

    python benchmarks/decode.py
    python benchmarks/decode.py --requests 64 --slots 16 --layers 8
"""

import argparse
import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import grok
from grok.config import AttentionConfig, EngineConfig, ModelConfig, MoEConfig
from grok.config.sampling import SamplingParams
from grok.hardware import configure_devices
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model import moe
from grok.model.params import num_parameters
from grok.ops.moe.experts_xla import experts_reference, experts_xla
from grok.ops.moe.tiling import serving_tile_rows
from grok.ops.weights import weight

PROMPT = 256  # tokens, in chunks of half as many


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--embed", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50, help="decode steps to take the median of")
    asked = parser.parse_args()
    configure_devices(0)
    config = ModelConfig(
        vocab_size=8192,
        num_layers=asked.layers,
        embed_dim=asked.embed,
        moe=MoEConfig(dim=4 * asked.embed),
        attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=asked.embed // 8),
        context_length=512,
        compute_dtype="float32",
    )
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    model = grok.init(config, jax.random.key(0), mesh)
    speed = read_bytes_per_second()

    def engine(slots: int) -> Engine:
        options = EngineConfig(max_num_seqs=slots, page_size=32, prefill_chunk_size=128)
        return Engine(model, None, mesh, options)

    def steps(method: str) -> None:
        seconds = one_prompt(engine(1), asked.steps)
        print(f"{method}, a prompt of {PROMPT}: {1e3 * seconds:.1f} ms")
        for slots in (1, asked.slots):
            seconds = one_step(engine(slots), slots, asked.steps)
            floor = 4 * read_parameters(config, slots) / speed
            print(
                f"{method}, a step of {slots}: {1e3 * seconds:.1f} ms; the chosen experts' bytes "
                f"take {1e3 * floor:.1f} ms, {seconds / floor:.2f} times less"
            )

    print(f"memory is read at {speed / 1e9:.1f} GB/s")
    steps("chosen experts")
    # The layer looks the function up by name when a program is traced.
    original = moe.experts_xla
    for method, function in (("all, in place", in_place), ("all, plain", plain)):
        moe.experts_xla = function
        jax.clear_caches()
        steps(method)
    moe.experts_xla = original
    jax.clear_caches()

    running, requests = engine(asked.slots), mixed(asked.requests)
    batches = [requests[i : i + asked.slots] for i in range(0, len(requests), asked.slots)]
    rate(running, [requests[:2]])  # compiles
    continuous = rate(running, [requests])
    print(f"continuous batching {continuous:.1f} tokens/s")
    for name, dispatched in (("", padded(batches)), (", finished rows left out", batches)):
        static = rate(running, dispatched) * total(batches) / total(dispatched)
        print(f"static batching{name} {static:.1f} tokens/s, {continuous / static:.2f} times less")


def plain(x_RD, topk_weights_RC, expert_ids_RC, *rest):
    """Every expert on every row, of weights that are an array of their own."""
    return experts_reference(
        x_RD, topk_weights_RC, expert_ids_RC, *map(weight.materialize, rest[:3])
    )


def in_place(x_RD, topk_weights_RC, expert_ids_RC, *rest):
    """The same without copies: each row has all experts, most of them with weight 0."""
    E, R = rest[0].shape[0], len(x_RD)
    expert_ids_RE = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[None, :], (R, E))
    is_RCE = expert_ids_RC[:, :, None] == expert_ids_RE[:, None, :]
    topk_weights_RE = jnp.sum(is_RCE * topk_weights_RC[:, :, None], axis=1)
    return experts_xla(x_RD, topk_weights_RE, expert_ids_RE, *rest[:3], serving_tile_rows(R, E, E))


def read_parameters(config: ModelConfig, rows: int) -> float:
    """Parameters that a step of so many rows has to read: all but the experts that no row chose,
    were they chosen at random."""
    E, share = config.moe.num_experts, config.moe.num_selected / config.moe.num_experts
    expert = 3 * config.num_layers * config.embed_dim * config.moe.dim
    return num_parameters(config) - expert * E * (1 - share) ** rows


def mixed(count: int) -> list[Request]:
    """Prompts of 4 to 128 tokens; answers of 64 on average, geometric as the lengths of texts
    nearly are, and 256 at most."""
    random, requests = np.random.default_rng(0), []
    for i in range(count):
        prompt = tuple(random.integers(4, 4096, random.integers(4, 128)).tolist())
        length = min(256, int(random.geometric(1 / 64)))
        requests.append(Request(f"{i}", prompt, SamplingParams(max_tokens=length, temperature=0)))
    return requests


def padded(batches: list[list[Request]]) -> list[list[Request]]:
    """The same, each answer as long as the longest of its batch."""
    padded_batches = []
    for batch in batches:
        params = max((request.params for request in batch), key=lambda p: p.max_tokens)
        padded_batches.append([dataclasses.replace(request, params=params) for request in batch])
    return padded_batches


def total(batches: list[list[Request]]) -> int:
    """Tokens of all answers."""
    return sum(request.params.max_tokens for batch in batches for request in batch)


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


def one_prompt(engine: Engine, count: int) -> float:
    """Seconds from a prompt to its answer's first token, the median of `count` after the first."""
    times = []
    for i in range(count + 1):
        prompt = tuple((np.arange(PROMPT) * (i + 3) % 4000 + 4).tolist())
        started = time.perf_counter()
        for _ in engine.generate([Request(f"{i}", prompt, SamplingParams(max_tokens=1))]):
            pass
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def one_step(engine: Engine, slots: int, count: int) -> float:
    """Seconds of a decode step with all slots busy, the median of `count`."""
    params = SamplingParams(max_tokens=count + 50, temperature=0)
    for i in range(slots):
        engine.submit(Request(f"step-{i}", (5 + i,), params))
    while engine.stats.waiting or engine.stats.tokens_out < 4 * slots:
        engine.step()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def read_bytes_per_second() -> float:
    """Bytes that all cores together read a second, by the wall, of an array larger than the caches:
    the best of 20 of its largest number, by NumPy in threads, and of its sum, by XLA."""
    array, cores = np.ones(1 << 26, np.float32), os.cpu_count() or 1
    parts, on_device, sum_all = (
        np.array_split(array, 4 * cores),
        jnp.asarray(array),
        jax.jit(jnp.sum),
    )
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        reads = (lambda: list(pool.map(np.max, parts))), (lambda: sum_all(on_device).item())
        for read in 20 * reads:
            started = time.perf_counter()
            read()
            best = max(best, array.nbytes / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
