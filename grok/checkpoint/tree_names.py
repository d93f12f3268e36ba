"""Pytrees as nested dictionaries by names, as checkpoints hold them."""

from collections.abc import Mapping
from typing import Any

import jax

from grok.model.param_spec import ParamSpec


def to_names(tree) -> dict:
    """A pytree as nested dictionaries by attribute, key and index."""
    nested: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = _names(path)
        branch = nested
        for name in parents:
            branch = branch.setdefault(name, {})
        branch[last] = leaf
    return nested


def from_names(tree, leaves: Mapping[str, Any]):
    """The inverse of `leaves_by_name`: a pytree structured as `tree`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves["/".join(_names(path))], tree)


def leaves_by_name(tree) -> dict[str, Any]:
    """The leaves of a tree by their names, `a/b/c`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_names(path)): leaf for path, leaf in leaves}


def lead_axes(path, leaf, specs: Mapping[str, ParamSpec]) -> tuple[int, ...]:
    """Axes of a leaf, of a parameter or its moments, before those of a matrix: layers, experts."""
    name = "/".join(_names(path))
    spec = next((spec for parameter, spec in specs.items() if name.endswith(parameter)), None)
    if spec is None:
        return ()
    if spec.is_matmul:
        return tuple(range(leaf.ndim - spec.contract_dims - spec.output_dims))
    return tuple(range(int(spec.is_stacked)))


def _names(path) -> list[str]:
    names = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", ""))) for key in path)
    # Flax keeps a parameter's array under `value`; the parameter's own name is enough.
    return [str(name) for name in names if name != "value"]
