"""A model from named arrays and back: what every importer and exporter of weights goes through.

A parameter's name is its path in the tree, as in `layers/moe/w_gate_EDF`; arrays of `layers/` have
the layers stacked on a leading axis. An int8 matrix is two arrays, `NAME/values` and `NAME/scales`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok import sharding
from grok.config import GrokConfig
from grok.errors import CheckpointError
from grok.model import params
from grok.model.decoder import Grok, check_mesh
from grok.ops.weights.int8 import QuantizedArray


def from_arrays(
    config: GrokConfig, arrays: Mapping[str, np.ndarray], mesh: Mesh | None = None
) -> Grok:
    """The model of `config` with these parameters, in `config.param_dtype`.

    On a mesh each device gets only its own part, read from `arrays` and converted part by part,
    so an array may be a map of a file; without one everything is on the default device. Raises
    CheckpointError where an array is missing, too many or of another shape, and ConfigError when
    the model cannot be split over the mesh.
    """
    wanted = abstract(config, mesh)
    shapes = {name: leaf.shape for name, leaf in to_arrays(wanted).items()}
    _check_shapes(shapes, {name: tuple(array.shape) for name, array in arrays.items()})

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = arrays[name_of(path)]
        if mesh is None:
            return jnp.asarray(np.asarray(array, leaf.dtype))
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda part: np.asarray(array[part], leaf.dtype)
        )

    return jax.tree_util.tree_map_with_path(place, wanted)


def to_arrays(model: Grok) -> dict[str, Any]:
    """The parameters by name, where and as they are; of int8 ones `values` and `scales`."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def abstract(
    config: GrokConfig, mesh: Mesh | None = None, groups: Mapping[str, int] | None = None
) -> Grok:
    """The model of `config` as shapes, types and, on a mesh, placements.

    Matrices named in `groups` are int8, with that many groups of rows; on a mesh that splits the
    rows, groups are divided further until each device has whole ones (`sharded_scale_groups`).
    Raises ConfigError when the model cannot be split over the mesh.
    """

    def make() -> Grok:
        return Grok(config, jax.random.key(0))

    if mesh is None:
        model = jax.eval_shape(make)
    else:
        check_mesh(config, mesh)
        model = sharding.abstract_arrays(make, mesh)

    if not groups:
        return model

    def quantized(path, param: nnx.Param) -> nnx.Variable:
        name = name_of(path)
        if name not in groups:
            return param
        return param.replace(_abstract_int8(name, param.get_value(), groups[name]))

    return jax.tree_util.tree_map_with_path(quantized, model, is_leaf=_is_param)


def _abstract_int8(name: str, w, groups: int) -> QuantizedArray:
    matrix = params.MATRICES[name]
    shape = params.scales_shape(name, w.shape, groups)
    if w.sharding is None:
        values = jax.ShapeDtypeStruct(w.shape, jnp.int8)
        scales = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    else:
        mesh, parts = w.sharding.mesh, (*w.sharding.spec, *[None] * len(w.shape))[: len(w.shape)]
        columns = len(w.shape) - matrix.col_dims
        rows = columns - matrix.row_dims
        over = () if parts[rows] is None else parts[rows]
        split = math.prod(mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over))
        finer = sharded_scale_groups(groups, split)
        spec = P(*parts[:rows], None if groups == 1 else parts[rows], *parts[columns:])
        shape = params.scales_shape(name, w.shape, finer)
        values = jax.ShapeDtypeStruct(w.shape, jnp.int8, sharding=w.sharding)
        scales = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    return QuantizedArray(values, scales, matrix.row_dims, matrix.col_dims)


def sharded_scale_groups(groups: int, split: int) -> int:
    """How many groups of rows a device grid that splits the rows `split` ways needs.

    A group cut into equal parts with its scale repeated is the same matrix. One group stays one:
    its scales go to every device.
    """
    return 1 if groups == 1 else math.lcm(groups, split)


def _is_param(node) -> bool:
    return isinstance(node, nnx.Param)


def name_of(path) -> str:
    """The path in the tree, without the field of the parameter that holds an array."""
    return "/".join(key.name for key in path if key.name != "value")


def _check_shapes(wanted: dict[str, tuple], given: dict[str, tuple]) -> None:
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            raise CheckpointError(
                f"tensor {name} is missing; this model's config wants it with shape {wanted[name]}."
            )
        if name not in wanted:
            raise CheckpointError(
                f"tensor {name} with shape {given[name]} is no parameter of this model's config; "
                f"it has {', '.join(sorted(wanted))}."
            )
        if given[name] != wanted[name]:
            raise CheckpointError(
                f"tensor {name} has shape {given[name]}; this model's config wants {wanted[name]}."
            )
