"""The programs that a plan compiles: the real steps, with abstract arguments. Letters: B rows, T
tokens of a row, S tokens of a row in the cache, W bytes of V bits of the vocabulary."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok import compiler, sharding
from grok.config import RunConfig
from grok.infer.shapes import EngineShapes
from grok.infer.step import forward_and_sample
from grok.model import build
from grok.optim.offload import is_on_host
from grok.optim.optimizer import make_optimizer
from grok.plan.estimate import batch_of
from grok.train.state import abstract_state
from grok.train.step import train_step
from grok.weights.cast import quantized_groups


class Program(NamedTuple):
    """A step as training or the engine compiles it."""

    jitted: Any  # of `grok.compiler.jit`
    arguments: dict[str, Any]  # abstract, by name, in order


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
    return Program(compiler.jit(step, donate_argnums=0), {"state": state, "batch": batch})


def inference_program(config: RunConfig, mesh: Mesh) -> Program:
    """A step of the engine, sampling included, for sequences of S tokens at most: a prompt of S
    tokens a row, or a token a row after S - 1, of which a window leaves some in the cache."""
    B, S = batch_of(config)
    decodes = config.plan.program == "decode"
    limited = dataclasses.replace(config.model, context_length=S)
    options = dataclasses.replace(config.engine, max_num_seqs=B)
    shapes = EngineShapes.of(config.model, options)
    shapes = dataclasses.replace(shapes, config=limited)
    # Pages of a prompt that was read in one step are all there, whatever the window.
    pages_of_row = shapes.layout.max_pages(S) if decodes else shapes.table_length
    shapes = dataclasses.replace(shapes, pages=B // shapes.groups * pages_of_row)
    groups = quantized_groups(config.model) if config.model.is_quantized else None
    model = build.abstract(config.model, mesh, groups)
    unused_W = functools.partial(jnp.zeros, -(-config.model.vocab_size // 8), jnp.uint8)
    inputs = shapes.abstract_decode() if decodes else shapes.abstract_prefill(shapes.pages)
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = {
        "model": model,
        "cache": sharding.abstract_arrays(shapes.init_cache, mesh),
        "slots": sharding.abstract_arrays(lambda: shapes.init_slots(unused_W()), mesh),
        "inputs": jax.tree.map(lambda array: array.update(sharding=replicated), inputs),
    }
    return Program(forward_and_sample, arguments)


def total_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, each counted once however many devices hold it."""
    return sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def bytes_per_device(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes that each abstract array of the arguments takes on one device, by its path; none where
    it stays in the hosts' memory."""
    return {
        name + jax.tree_util.keystr(path): _bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for name, argument in arguments.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]
        if not is_on_host(leaf)
    }


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jax.dtypes.itemsize_bits(dtype) // 8
