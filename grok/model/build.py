"""A model with fresh parameters, from named arrays, or as shapes alone; and a model as named
arrays.

A parameter's name is its path in the tree, as in `layers/moe/w_gate_EDF`; arrays of `layers/` have
the layers stacked on a leading axis. A quantised matrix is two arrays, `NAME/values` and
`NAME/scales`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok.config import MESH_AXES, MeshConfig, ModelConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.decoder import Decoder
from grok.model.mesh_fit import fit_mesh
from grok.model.param_spec import ParamSpec, map_params, name_of
from grok.model.params import param_specs
from grok.ops.weights.quantized import QuantizedArray


def quick_to_compile() -> dict[str, int]:
    """Options of `jax.jit` for a program that runs once and only draws and fills arrays.

    On CPU, LLVM would take several times as long to optimise it as it runs; no bit depends on it.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


@functools.cache
def _init():
    return jax.jit(Decoder, static_argnums=0, compiler_options=quick_to_compile())


def init(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Decoder:
    """A model with fresh parameters, each made on the devices of `mesh` that will hold it.

    The values depend on `key` alone, not on the mesh. Raises ConfigError when the model cannot be
    split over the mesh, or should be int8 or int4, which is made from trained floats only.
    """
    if config.is_quantized:
        problem = f"model.param_dtype={config.param_dtype} is for weights that are loaded"
        right = "model.param_dtype=float32 would work"
        raise ConfigError(f"{problem}, and fresh ones are floats; {right}.")
    if mesh is None:
        return _init()(config, key)
    check_mesh(config, mesh)
    with jax.set_mesh(mesh):
        return _init()(config, key)


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuse, as ConfigError, a mesh of other axes, of axes that JAX would split arrays over by
    itself, or one that the model cannot be split over."""
    if mesh.axis_names != MESH_AXES:
        raise ConfigError(
            f"the mesh has axes {mesh.axis_names} and the model needs {MESH_AXES}; "
            "grok.make_mesh makes one."
        )
    if not mesh.are_all_axes_explicit:
        raise ConfigError(
            "the mesh has axes of JAX's automatic kind and the model needs explicit ones; "
            "grok.make_mesh makes one."
        )
    fit_mesh(MeshConfig(**mesh.shape), mesh.size, config)


def from_arrays(
    config: ModelConfig, arrays: Mapping[str, np.ndarray], mesh: Mesh | None = None
) -> Decoder:
    """The model of `config` with these parameters, in `config.param_dtype`.

    On a mesh each device gets only its own part, read from `arrays` and converted part by part,
    so an array may be a map of a file; without one everything is on the default device. Raises
    CheckpointError where an array is missing, too many or of another shape, and ConfigError when
    the model cannot be split over the mesh.
    """
    expected = abstract(config, mesh)
    shapes = {name: leaf.shape for name, leaf in to_arrays(expected).items()}
    _check_shapes(shapes, {name: tuple(array.shape) for name, array in arrays.items()})

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = arrays[name_of(path)]
        if mesh is None:
            return jnp.asarray(np.asarray(array, leaf.dtype))
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda part: np.asarray(array[part], leaf.dtype)
        )

    return jax.tree_util.tree_map_with_path(place, expected)


def to_arrays(model: Decoder) -> dict[str, Any]:
    """The parameters by name, where and as they are; of quantised ones `values` and `scales`."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def abstract(
    config: ModelConfig, mesh: Mesh | None = None, groups: Mapping[str, int] | None = None
) -> Decoder:
    """The model of `config` as shapes, types and, on a mesh, placements.

    Matrices named in `groups` are int8, or int4 as `ParamSpec.quantized_dtype` says, with that many
    groups of rows; on a mesh that splits the rows, groups are divided further until none is split
    over devices (`sharded_scale_groups`). Token tables are as `config.embedding_dtype` says. Raises
    ConfigError when the model cannot be split over the mesh.
    """
    if mesh is None:
        model = Decoder(config, None)
    else:
        check_mesh(config, mesh)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = Decoder(config, None)
        model = jax.tree.map(lambda leaf: _on_mesh(leaf, mesh), model)

    specs, tables = param_specs(config), int8_tables(config)
    matrices = groups or {}

    def quantized(path, param: nnx.Param) -> nnx.Variable:
        name, w = name_of(path), param.get_value()
        if name in tables:
            return param.replace(_abstract_quantized(tables[name], w, 1, "int8"))
        if name not in matrices:
            return param
        dtype = specs[name].quantized_dtype(config.param_dtype)
        return param.replace(_abstract_quantized(specs[name], w, matrices[name], dtype))

    return map_params(quantized, model) if matrices or tables else model


def int8_tables(config: ModelConfig) -> dict[str, ParamSpec]:
    """Token tables that are int8, by name: V vectors of which each has a scale."""
    if config.embedding_dtype != "int8":
        return {}
    tables = (spec for spec in param_specs(config).values() if spec.use == "embed")
    return {spec.name: dataclasses.replace(spec, output_dims=0) for spec in tables}


def _on_mesh(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    placement = NamedSharding(mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)


def _abstract_quantized(spec: ParamSpec, w, num_groups: int, dtype: str) -> QuantizedArray:
    values_sharding = scales_sharding = None
    if w.sharding is not None:
        values_sharding, mesh = w.sharding, w.sharding.mesh
        lead, rows, columns = spec.split((*w.sharding.spec, *[None] * len(w.shape))[: len(w.shape)])
        over = (rows[0],) if isinstance(rows[0], str) else rows[0] or ()
        row_shards = math.prod(mesh.shape[axis] for axis in over)
        split = P(*lead, None if num_groups == 1 else rows[0], *columns)
        scales_sharding = NamedSharding(mesh, split)
        num_groups = sharded_scale_groups(num_groups, row_shards)
    return QuantizedArray(
        jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=values_sharding),
        jax.ShapeDtypeStruct(spec.scales_shape(num_groups), jnp.bfloat16, sharding=scales_sharding),
        spec.contract_dims,
        spec.output_dims,
    )


def sharded_scale_groups(groups: int, split: int) -> int:
    """Number of groups of rows that a device grid needs which splits the rows `split` ways.

    A group cut into equal parts with its scale repeated is the same matrix. One group stays one:
    its scales go to every device.
    """
    return 1 if groups == 1 else math.lcm(groups, split)


def _check_shapes(shapes: dict[str, tuple], stored: dict[str, tuple]) -> None:
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in stored:
            raise CheckpointError(
                f"tensor {name} is missing; this model's config wants it with shape {shapes[name]}."
            )
        if name not in shapes:
            raise CheckpointError(
                f"tensor {name} with shape {stored[name]} is no parameter of this model's config; "
                f"it has {', '.join(sorted(shapes))}."
            )
        if stored[name] != shapes[name]:
            raise CheckpointError(
                f"tensor {name} has shape {stored[name]}; this model's config wants {shapes[name]}."
            )
