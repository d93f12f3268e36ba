"""A model from named arrays and back: what every importer and exporter of weights goes through.

A parameter's name is its path in the tree, as in `layers/moe/w_gate_EDF`; arrays of `layers/` have
the layers stacked on a leading axis.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.config import GrokConfig
from grok.errors import CheckpointError
from grok.model.grok import Grok, check_mesh


def from_arrays(
    config: GrokConfig, arrays: Mapping[str, np.ndarray], mesh: Mesh | None = None
) -> Grok:
    """The model of `config` with these parameters, in `config.param_dtype`.

    On a mesh each device gets only its own part, read from `arrays` and converted part by part,
    so an array may be a map of a file; without one everything is on the default device. Raises
    CheckpointError where an array is missing, too many or of another shape, and ConfigError when
    the model cannot be split over the mesh.
    """
    wanted = _abstract(config, mesh)
    shapes = {name: leaf.shape for name, leaf in to_arrays(wanted).items()}
    _check_shapes(shapes, {name: tuple(array.shape) for name, array in arrays.items()})

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = arrays[_name(path)]
        if mesh is None:
            return jnp.asarray(np.asarray(array, leaf.dtype))
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda part: np.asarray(array[part], leaf.dtype)
        )

    return jax.tree_util.tree_map_with_path(place, wanted)


def to_arrays(model: Grok) -> dict[str, jax.Array]:
    """The model's parameters by name, where and as they are."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def _abstract(config: GrokConfig, mesh: Mesh | None) -> Grok:
    def make() -> Grok:
        return Grok(config, jax.random.key(0))

    if mesh is None:
        return jax.eval_shape(make)
    check_mesh(config, mesh)
    return sharding.abstract(make, mesh)


def _name(path) -> str:
    """The path in the tree without its last part, the field of the parameter that holds it."""
    return "/".join(key.name for key in path[:-1])


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
