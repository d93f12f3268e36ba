"""The programs that a plan compiles: the real steps, with abstract arguments. Letters: B rows, T
new tokens, S tokens of a row in the cache, Q tokens of a block."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from grok import sharding
from grok.config import RunConfig
from grok.infer.page_pool import PageLayout
from grok.infer.shapes import prefill_chunk_size
from grok.model import build, params
from grok.model.attend import PagedBatch, init_cache
from grok.optim.offload import is_on_host
from grok.optim.optimizer import make_optimizer
from grok.plan.estimate import batch_of
from grok.train.state import abstract_state
from grok.train.step import train_step
from grok.weights.cast import release_groups


class Program(NamedTuple):
    """A function to compile."""

    function: Callable
    arguments: dict[str, Any]  # abstract, by name, in order
    donate: int  # the place of the one that the function may overwrite


def make_program(config: RunConfig, mesh: Mesh) -> Program:
    """The step that `config.plan.program` names, on `mesh`, which must be the ambient one."""
    make = train_program if config.plan.program == "train" else inference_program
    return make(config, mesh)


def train_program(config: RunConfig, mesh: Mesh) -> Program:
    """`train_step` as the loop of `grok train` compiles it, at its batches' largest shape."""
    optimizer = make_optimizer(config)
    B, T = batch_of(config)
    dtypes = {"tokens_BT": jnp.int32, "targets_BT": jnp.int32, "mask_BT": jnp.float32}
    if config.data.datasets:
        dtypes |= {"segment_ids_BT": jnp.int32, "positions_BT": jnp.int32}
    placement = NamedSharding(mesh, sharding.spec("batch", "length"))
    array_BT = functools.partial(jax.ShapeDtypeStruct, (B, T), sharding=placement)
    batch = {name: array_BT(dtype) for name, dtype in dtypes.items()}
    step = functools.partial(train_step, config=config, optimizer=optimizer)
    state = abstract_state(config, optimizer, mesh)
    return Program(step, {"state": state, "batch": batch}, donate=0)


def inference_program(config: RunConfig, mesh: Mesh) -> Program:
    """One step of the model with its cache in pages: a prompt of S tokens a row, or a token a row
    after S - 1, of which a window leaves some in the cache."""
    B, S = batch_of(config)
    size = config.engine.page_size
    pages = cached = -(-S // size)
    groups = sharding.axis_size("batch")
    prefill = config.plan.program == "prefill"
    if not prefill:
        chunks = prefill_chunk_size(config.model, config.engine) // size
        cached = PageLayout(size, chunks, config.model.attention.window).max_pages(S)
    blocks, Q = (B // groups * pages, size) if prefill else (B // groups, 1)
    specs = params.param_specs(config.model)
    scale_groups = {name: release_groups(spec) for name, spec in specs.items() if spec.is_matmul}
    is_int8, dtype = config.model.param_dtype == "int8", config.engine.cache_dtype
    model = build.abstract(config.model, mesh, scale_groups if is_int8 else None)
    dtype = config.model.compute_dtype if dtype == "compute" else dtype
    make = functools.partial(init_cache, config.model, B * cached, size, dtype)
    cache = sharding.abstract_arrays(make, mesh)

    def sharded(*shape: int) -> jax.ShapeDtypeStruct:
        placement = NamedSharding(mesh, sharding.spec("batch", *(None,) * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement)

    def step(model, cache, tokens_BT, batch):
        x_BTD, cache, _ = model.step(tokens_BT, cache, batch)
        return model.next_logits(x_BTD, batch.count_BU), cache

    counts = sharded(groups, blocks)
    batch = PagedBatch(sharded(groups, blocks, pages), counts, counts)
    tokens_BT = sharded(groups, blocks * Q)
    arguments = {"model": model, "cache": cache, "tokens_BT": tokens_BT, "batch": batch}
    return Program(step, arguments, donate=1)


def bytes_per_device(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes that each abstract array of the arguments takes on one device, by its path; none where
    it stays in the hosts' memory."""
    return {
        name + jax.tree_util.keystr(path): math.prod(leaf.sharding.shard_shape(leaf.shape))
        * leaf.dtype.itemsize
        for name, argument in arguments.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]
        if not is_on_host(leaf)
    }
