"""The training step and the engine as TPUs run them, kernels interpreted on a mesh of simulated
devices, against the portable form; and that mistakes in kernels are found this way.

pytest -n 0 -m prove -s tests/prove/test_tpu_form.py

Letters: B rows, T tokens.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

import grok
from grok import sharding
from grok.config import DataConfig, EngineConfig, LoraConfig, RunConfig, TrainConfig
from grok.config.sampling import SamplingParams
from grok.errors import GrokError
from grok.infer.engine import Engine
from grok.infer.request import Request
from grok.model.lora import adapted
from grok.ops.attention import page_reader, ragged_kernel
from grok.ops.moe import grouped_blocks, grouped_hidden
from grok.optim.param_groups import names, partition, trainable
from grok.train.step import gradients
from grok.weights.cast import converted
from grok.weights.load import put_on_mesh
from tests.fixtures.models import model_config, replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.prove.tpu_interpreter import tpu_form

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]
B, T = 8, 256
CONFIG = model_config(
    {
        "vocab_size": 128,
        "num_layers": 2,
        "embed_dim": 128,
        "context_length": 512,
        "moe.dim": 256,
        "moe.num_experts": 4,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "attention.head_dim": 128,
        "attention.logit_softcap": 5.0,
        "compute_dtype": "float32",
    }
)
EXPERTS = {"grouped_hidden", "grouped_matmul", "grouped_weight_gradient"}
BACKWARD = ("dq_segmented_no_residuals", "dkv_segmented_no_residuals")
EXPERTS_IN_8_BITS = {
    *("scaled_hidden", "scaled_products", "scaled_matmul", "scaled_weight_gradient"),
    "hidden_gradients",
}
SPLASH = {f"splash_mha_{name}" for name in ("fwd_segmented_residuals", *BACKWARD)}
OWN_FLASH = {"forward_flash_attention", "dq_flash_attention", "dkv_flash_attention"}
# Sums of at most 2048 products in other orders, through two layers.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 3e-6
LOGPROB_TOLERANCE = 5e-6  # nats
# Sums in other orders may round an activation to the next of 127 values.
INT8_LOGPROB_TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step that differs from the plain one: full remat on a mesh of 2x2x2."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = (2, 2, 2, 1)  # data, expert, tensor, slice
    packed: bool = False
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    kernels: frozenset[str] = frozenset(EXPERTS | SPLASH)
    length: int = T
    loss_tolerance: float = LOSS_TOLERANCE
    gradient_tolerance: float = GRADIENT_TOLERANCE


# A width of which each of four devices has two halves of whole lanes.
SAVED = {"moe.dim": 1024}
# Every token goes to both experts: rounding in 8 bits sends none to another.
IN_8_BITS = SAVED | {"moe.num_experts": 2, "num_layers": 1, "remat": "experts"}
TERMS = {"attention.window": 200, "attention.temperature_length": 64}
CASES = {
    "remat: full": Case(),
    "remat: experts": Case({"remat": "experts", **SAVED}),
    "remat: offload": Case({"remat": "offload", **SAVED}),
    "adapters": Case(
        run={
            "lora": LoraConfig(rank=8, targets=("query", "out", "gate", "down")),
            "train": TrainConfig(init_from="weights", z_loss=1e-4),
        },
        # Gates with adapters are multiplied one by one.
        kernels=frozenset(EXPERTS - {"grouped_hidden"} | SPLASH),
    ),
    "two slices": Case(sizes=(2, 1, 2, 2)),
    "packed": Case(packed=True),
    "packed, with a window and a temperature": Case(
        TERMS, packed=True, kernels=frozenset(EXPERTS | OWN_FLASH)
    ),
    # Sums in other orders may round to the next of 127 values, which changes a part of an element.
    "int8": Case(
        IN_8_BITS | {"matmul_dtype": "int8"},
        length=128,
        kernels=frozenset(EXPERTS_IN_8_BITS | SPLASH),
        loss_tolerance=1e-5,
        gradient_tolerance=5e-3,
    ),
    "accumulation": Case(run={"train": TrainConfig(grad_accum_steps=2, z_loss=1e-4)}),
}


def loss_and_gradients(case: Case) -> dict[str, np.ndarray]:
    """The loss, and the gradient of every tensor that is trained."""
    model = replace_keys(CONFIG, {"remat": "full"} | case.model)
    sections = {"train": TrainConfig(z_loss=1e-4, router_balance_loss=0.01)} | case.run
    data = DataConfig(batch_size=B, sequence_length=case.length)
    config = RunConfig(model=model, data=data, **sections)
    mesh = grok.make_mesh(*case.sizes)
    with jax.set_mesh(mesh):
        decoder = grok.init(model, jax.random.key(7), mesh)
        if config.lora.rank:
            decoder = adapted(decoder, config.lora, jax.random.key(8))
        params, frozen = partition(decoder, trainable(config))
        # Adapters begin with zeros, which would hide much.
        params = jax.tree.map(
            lambda w: w + 0.01 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), params
        )
        run = jax.jit(functools.partial(gradients, config=config.train))
        loss, _, grads = run(params, frozen, batch(mesh, case.length, case.packed))
        return {"loss": np.asarray(loss)} | dict(
            zip(names(grads), map(np.asarray, jax.tree.leaves(grads)), strict=True)
        )


def batch(mesh, T: int, packed: bool) -> dict[str, jax.Array]:
    """Rows of T random tokens, some not counted; packed: two documents and padding."""
    random = np.random.default_rng(0)
    arrays = {name: random.integers(0, 128, (B, T)) for name in ("tokens_BT", "targets_BT")}
    arrays["mask_BT"] = (np.arange(T)[None, :] < np.arange(T - B, T)[:, None]).astype(np.float32)
    if packed:
        first = np.arange(T)[None, :] < 100 + np.arange(B)[:, None]
        is_padding = arrays["mask_BT"] == 0
        arrays["segment_ids_BT"] = np.where(is_padding, 0, np.where(first, 1, 2))
        starts = np.where(first, 0, 100 + np.arange(B)[:, None])
        arrays["positions_BT"] = np.where(is_padding, 0, np.arange(T)[None, :] - starts)
    dtypes = {name: np.float32 if name == "mask_BT" else np.int32 for name in arrays}
    rows = NamedSharding(mesh, sharding.spec("batch", "length"))
    return {name: jax.device_put(a.astype(dtypes[name]), rows) for name, a in arrays.items()}


@functools.cache
def portable(name: str) -> dict[str, np.ndarray]:
    """The step of a case in plain XLA."""
    return loss_and_gradients(CASES[name])


def differences(actual, expected) -> dict[str, float]:
    """The largest of each tensor's, relative to its largest value."""
    return {
        name: float(np.abs(actual[name] - right).max() / np.abs(right).max())
        for name, right in expected.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_training_step(name):
    with tpu_form() as kernels:
        actual = loss_and_gradients(CASES[name])
    errors = differences(actual, portable(name))
    loss = errors.pop("loss")
    worst = max(errors, key=errors.get)
    print(f"\n{name}: loss {loss:.1e}, worst gradient {errors[worst]:.1e} ({worst})")
    print(f"kernels: {', '.join(sorted(kernels))}")
    assert CASES[name].kernels <= kernels
    assert loss < CASES[name].loss_tolerance
    assert errors[worst] < CASES[name].gradient_tolerance


# ---- the engine

ENGINES = {
    "float32": ({}, "compute", {"ragged_paged_attention_kernel"}),
    "int8 weights": ({"param_dtype": "int8"}, "compute", {"ragged_paged_attention_kernel"}),
    "int4 weights": ({"param_dtype": "int4"}, "compute", {"ragged_paged_attention_kernel"}),
    "int4, attention too": (
        {"param_dtype": "int4_all"},
        "compute",
        {"ragged_paged_attention_kernel"},
    ),
    "int4 weights, int8 activations": (
        {"param_dtype": "int4_all", "matmul_dtype": "int8"},
        "compute",
        {"ragged_paged_attention_kernel", "scaled_grouped_matmul"},
    ),
    "int8 cache": ({}, "int8", {"paged_attention_int8"}),
    "window": ({"attention.window": 40}, "compute", {"paged_attention_with_window"}),
}


def answers(name: str) -> tuple[list, np.ndarray]:
    """Tokens of all answers, greedy and drawn, and the log-probabilities of their tokens."""
    model, cache_dtype, _ = ENGINES[name]
    mesh = grok.make_mesh(2, 2, 2)
    options = EngineConfig(
        max_num_seqs=4, page_size=32, prefill_chunk_size=64, num_pages=32, cache_dtype=cache_dtype
    )
    dtype = model.get("param_dtype", "float32")
    random_source = RandomSource(
        replace_keys(CONFIG, model), dtype="int8" if "int" in dtype else dtype
    )
    engine = Engine(put_on_mesh(converted(random_source, dtype), mesh), None, mesh, options)
    random, requests = np.random.default_rng(1), []
    for i, length in enumerate((5, 70, 33)):
        params = SamplingParams(max_tokens=4, seed=i, temperature=float(i % 2), logprobs=1)
        prompt = tuple(random.integers(0, 128, length).tolist())
        requests.append(Request(f"request-{i}", prompt, params))
    tokens: dict[str, list] = {request.id: [] for request in requests}
    logprobs: dict[str, list] = {request.id: [] for request in requests}
    for output in engine.generate(requests):
        tokens[output.request_id] += output.token_ids
        logprobs[output.request_id] += [entry.logprob for entry in output.logprobs or ()]
    return list(tokens.values()), np.concatenate([logprobs[r.id] for r in requests])


portable_answers = functools.cache(answers)


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine(name):
    with tpu_form() as kernels:
        tokens, logprobs = answers(name)
    right, right_logprobs = portable_answers(name)
    worst = np.abs(logprobs - right_logprobs).max()
    print(f"\n{name}: log-probabilities within {worst:.1e}; kernels: {', '.join(sorted(kernels))}")
    assert ENGINES[name][2] <= kernels
    assert tokens == right
    is_int8 = ENGINES[name][0].get("matmul_dtype") == "int8"
    assert worst < (INT8_LOGPROB_TOLERANCE if is_int8 else LOGPROB_TOLERANCE)


# ---- mistakes


class Replaced:
    """A module with some of its names replaced."""

    def __init__(self, module: types.ModuleType, **names: Any):
        self.__dict__ |= {"_module": module} | names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def no_window():
    """A mask is missing: keys behind the window are seen."""
    right = ragged_kernel.causal_mask
    wrong = lambda key, query, window: right(key, query, None)  # noqa: E731
    return mock.patch.object(ragged_kernel, "causal_mask", wrong)


def next_rows():
    """A block is off by one: rows of the tile before."""

    def x_spec(b):
        index = lambda n, i, k, expert, tile, *_: (jnp.maximum(tile[i] - 1, 0), k)  # noqa: E731
        return pl.BlockSpec((b.M, b.tk), index)

    return mock.patch.object(grouped_blocks.Blocks, "x_spec", property(x_spec))


def no_zeros():
    """An accumulator is not zeroed: it begins with what memory holds."""
    wrong = Replaced(jnp, zeros_like=lambda ref: ref[...])
    return mock.patch.object(grouped_hidden, "jnp", wrong)


def no_wait():
    """A copy is not awaited: pages are read before they are there."""
    right = pltpu.make_async_copy

    def wrong(*arguments):
        return types.SimpleNamespace(start=right(*arguments).start, wait=lambda: None)

    return mock.patch.object(ragged_kernel, "pltpu", Replaced(pltpu, make_async_copy=wrong))


def other_scale():
    """A scale is another's: keys get those of values, and values those of keys."""
    right = page_reader.Int8Pages.open

    def wrong(self, *arguments):
        read = right(self, *arguments)

        def swapped(head):
            k_CH, v_CH, k_scale_1C, v_scale_1C = read(head)
            return k_CH, v_CH, v_scale_1C, k_scale_1C

        return swapped

    return mock.patch.object(page_reader.Int8Pages, "open", wrong)


@pytest.mark.parametrize("mistake", [next_rows, no_zeros])
def test_a_mistake_in_training_is_found(mistake):
    expected = portable("remat: full")
    with mistake(), tpu_form():
        errors = differences(loss_and_gradients(CASES["remat: full"]), expected)
    print(f"\n{mistake.__doc__} Worst difference {max(errors.values()):.1e}")
    assert not all(error < GRADIENT_TOLERANCE for error in errors.values())


def find(mistake: Callable, name: str) -> str:
    """What shows a mistake in an engine; "" where nothing does."""
    right, right_logprobs = portable_answers(name)
    with mistake(), tpu_form():
        try:
            tokens, logprobs = answers(name)
        except GrokError as error:  # the engine ends what has no finite log-probabilities
            return str(error)
        except jax.errors.JaxRuntimeError:
            return "the interpreter stops"
        worst = np.abs(logprobs - right_logprobs).max()
    return "" if tokens == right and worst < LOGPROB_TOLERANCE else f"{worst:.1e}"


def print_and_end(mistake: str, name: str) -> None:
    """Prints what `find` says, and ends the process."""
    print(find(globals()[mistake], name), flush=True)
    os._exit(0)


@pytest.mark.parametrize(
    ("mistake", "name"),
    [(no_window, "window"), (no_wait, "int8 cache"), (other_scale, "int8 cache")],
)
def test_a_mistake_in_the_engine_is_found(mistake, name):
    # In a process of its own: an interpreter that stops in the midst of a program may wait for ever
    # at the end of its process.
    script = "import tests.conftest, tests.prove.test_tpu_form as test; test.print_and_end({}, {})"
    command = [sys.executable, "-c", script.format(repr(mistake.__name__), repr(name))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(f"\n{mistake.__doc__} Found by: {done.stdout.strip()}")
    assert done.stdout.strip()
