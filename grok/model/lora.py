"""A model with fresh low-rank adapters on its matrices."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from grok import sharding
from grok.config import LoraConfig
from grok.model.decoder import Decoder
from grok.model.param_spec import ParamSpec, map_params, name_of
from grok.model.params import lora_targets, param_specs
from grok.ops.weights.lora import FrozenArray, LoraArray
from grok.ops.weights.weight import Weight, is_plain


def adapted(model: Decoder, config: LoraConfig, key: jax.Array) -> Decoder:
    """Returns `model` with an adapter on each target: of every layer, and of every expert its own.

    a is drawn from a normal of standard deviation 1/sqrt(rows), b is zeros, so that nothing is
    added at first. Both are float32, and split over the mesh as the matrix's rows and columns are.
    Quantised matrices of MLP and experts that get none become FrozenArrays.
    """
    targets, specs = lora_targets(model.config, config), param_specs(model.config)
    matrices = [name for name, spec in specs.items() if spec.is_matmul]

    def adapt(path, param: nnx.Param) -> nnx.Variable:
        name, w = name_of(path), param.get_value()
        if name not in targets:
            is_float = is_plain(w) or not specs[name].is_wide
            return param if is_float else param.replace(FrozenArray(w))
        adapter_key = jax.random.fold_in(key, matrices.index(name))
        return param.replace(_fresh(w, targets[name], config, adapter_key))

    return map_params(adapt, model)


def _fresh(w: Weight, spec: ParamSpec, config: LoraConfig, key: jax.Array) -> LoraArray:
    values = jax.tree.leaves(w)[0]  # also of a quantised matrix
    a_shape, b_shape = spec.lora_shapes(config.rank)
    a_split = b_split = None
    if sharding.ambient_mesh() is not None:
        axes = (*jax.typeof(values).sharding.spec, *[None] * values.ndim)[: values.ndim]
        lead, rows, columns = spec.split(axes)
        a_split, b_split = P(*lead, *rows, None), P(*lead, None, *columns)
    a = jax.random.normal(key, a_shape, jnp.float32, out_sharding=a_split)
    a /= math.sqrt(spec.contract_size)
    return LoraArray(w, a, jnp.zeros(b_shape, jnp.float32, out_sharding=b_split), config.scale)
