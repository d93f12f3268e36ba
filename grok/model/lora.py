"""Adapters on a model's matrices: which there are, and a model with fresh ones."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from grok import sharding
from grok.config import GrokConfig, LoraConfig
from grok.model.build import name_of
from grok.model.decoder import Grok
from grok.model.params import MATRICES, shapes
from grok.ops.weights.lora import LoraArray, factor_shapes

# What the config calls each matrix.
TARGETS = {
    "query": "layers/attention/w_query_DNH",
    "key": "layers/attention/w_key_DKH",
    "value": "layers/attention/w_value_DKH",
    "out": "layers/attention/w_out_NHD",
    "gate": "layers/moe/w_gate_EDF",
    "up": "layers/moe/w_up_EDF",
    "down": "layers/moe/w_down_EFD",
}


PARTS = ("base", "a", "b")


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name, as `layers/attention/w_query_DNH/a`, is of an adapter."""
    matrix, _, part = name.rpartition("/")
    return matrix in MATRICES and part in ("a", "b")


def tensor_names(model: GrokConfig, config: LoraConfig) -> list[str]:
    """Names of all tensors of the model with its adapters, if it has any."""
    targets = [TARGETS[target] for target in config.targets] if config.rank else []
    parts = (
        (f"{name}/{part}" for part in PARTS) if name in targets else (name,)
        for name in shapes(model)
    )
    return list(itertools.chain.from_iterable(parts))


def adapted(model: Grok, config: LoraConfig, key: jax.Array) -> Grok:
    """`model` with an adapter on each target: of every layer, and of every expert its own.

    a is drawn from a normal of standard deviation 1/sqrt(rows), b is zeros, so that nothing is
    added at first. Both are float32, and split over the mesh as the matrix's rows and columns are.
    """
    targets = [TARGETS[target] for target in config.targets]

    def adapt(path, param: nnx.Param) -> nnx.Variable:
        name = name_of(path)
        if name not in targets:
            return param
        own_key = jax.random.fold_in(key, list(MATRICES).index(name))
        return param.replace(_fresh(param.get_value(), name, config, own_key))

    return jax.tree_util.tree_map_with_path(
        adapt, model, is_leaf=lambda node: isinstance(node, nnx.Param)
    )


def _fresh(w: jax.Array, name: str, config: LoraConfig, key: jax.Array) -> LoraArray:
    matrix = MATRICES[name]
    columns = w.ndim - matrix.col_dims
    lead = columns - matrix.row_dims
    a_shape, b_shape = factor_shapes(w.shape, matrix.row_dims, matrix.col_dims, config.rank)
    a_split = b_split = None
    if sharding.ambient_mesh() is not None:
        parts = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)[: w.ndim]
        a_split = P(*parts[:columns], None)
        b_split = P(*parts[:lead], None, *parts[columns:])
    a = jax.random.normal(key, a_shape, jnp.float32, out_sharding=a_split)
    a /= math.sqrt(math.prod(w.shape[lead:columns]))
    return LoraArray(w, a, jnp.zeros(b_shape, jnp.float32, out_sharding=b_split), config.scale)
