"""Pytrees as nested dictionaries by names, as checkpoints hold them."""

import jax

from grok.model.params import MATRICES


def to_names(tree) -> dict:
    """A pytree as nested dictionaries by attribute, key and place."""
    nested: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = _names(path)
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def from_names(tree, nested: dict):
    """The inverse of `to_names`: a tree of `tree`'s structure with leaves out of `nested`."""

    def leaf(path, _):
        place = nested
        for name in _names(path):
            place = place[name]
        return place

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _names(path) -> list[str]:
    names = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path
    ]
    # Flax keeps what a parameter holds under `value`; the parameter's own name is enough.
    return [name for name in names if name != "value"]


def lead_axes(path, leaf) -> tuple[int, ...]:
    """Axes of an array, at `path` in a tree, before those of its matrices: layers and experts."""
    where = "/".join(_names(path))
    lead = int("layers/" in where)
    for name, matrix in MATRICES.items():
        if where.endswith(name):
            lead = leaf.ndim - matrix.row_dims - matrix.col_dims
    return tuple(range(lead))


def flatten(nested, prefix="") -> dict:
    """Leaves of nested dictionaries by their path, `a/b/c`."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    leaves: dict = {}
    for name, part in nested.items():
        leaves |= flatten(part, f"{prefix}/{name}" if prefix else name)
    return leaves
