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
from grok.ops.weights.lora import LoraArray


def adapted(model: Decoder, config: LoraConfig, key: jax.Array) -> Decoder:
    """Returns `model` with an adapter on each target: of every layer, and of every expert its own.

    a is drawn from a normal of standard deviation 1/sqrt(rows), b is zeros, so that nothing is
    added at first. Both are float32, and split over the mesh as the matrix's rows and columns are.
    """
    targets = lora_targets(model.config, config)
    matrices = [name for name, spec in param_specs(model.config).items() if spec.is_matmul]

    def adapt(path, param: nnx.Param) -> nnx.Variable:
        name = name_of(path)
        if name not in targets:
            return param
        adapter_key = jax.random.fold_in(key, matrices.index(name))
        return param.replace(_fresh(param.get_value(), targets[name], config, adapter_key))

    return map_params(adapt, model)


def _fresh(w: jax.Array, spec: ParamSpec, config: LoraConfig, key: jax.Array) -> LoraArray:
    a_shape, b_shape = spec.lora_shapes(config.rank)
    a_split = b_split = None
    if sharding.ambient_mesh() is not None:
        axes = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)[: w.ndim]
        lead, rows, columns = spec.split(axes)
        a_split, b_split = P(*lead, *rows, None), P(*lead, None, *columns)
    a = jax.random.normal(key, a_shape, jnp.float32, out_sharding=a_split)
    a /= math.sqrt(spec.contract_size)
    return LoraArray(w, a, jnp.zeros(b_shape, jnp.float32, out_sharding=b_split), config.scale)
