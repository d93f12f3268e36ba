"""Pytrees as nested dictionaries by names, as checkpoints hold them."""

from typing import Any

import jax

from grok.model.params import MATRICES


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


def from_names(tree, nested: dict):
    """The inverse of `to_names`: a pytree structured as `tree` with the leaves of `nested`."""

    def leaf(path, _):
        branch: Any = nested
        for name in _names(path):
            branch = branch[name]
        return branch

    return jax.tree_util.tree_map_with_path(leaf, tree)


def leaf_shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its name, `a/b/c`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_names(path)): tuple(leaf.shape) for path, leaf in leaves}


def lead_axes(path, leaf) -> tuple[int, ...]:
    """Axes of the array at `path` in front of those of its matrices: layers and experts."""
    name = "/".join(_names(path))
    lead = int("layers/" in name)
    for parameter, matrix in MATRICES.items():
        if name.endswith(parameter):
            lead = leaf.ndim - matrix.row_dims - matrix.col_dims
    return tuple(range(lead))


def _names(path) -> list[str]:
    names = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path
    ]
    # Flax keeps a parameter's array under `value`; the parameter's own name is enough.
    return [name for name in names if name != "value"]
