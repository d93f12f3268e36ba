"""Checkpoints of a run through Orbax; the only file that imports it.

A checkpoint is a set of named pytrees of arrays, plus plain data. Each tree is stored as nested
dictionaries under the names of its attributes (`layers/moe/router_DE`), so that what is on disk
does not depend on Python classes, and one tree can be read without the others.
"""

import json
import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from grok.errors import CheckpointError
from grok.model.names import MATRICES

MODEL, OPTIMIZER, EMA, META = "model", "optimizer", "ema", "meta"


class Checkpoints:
    """The checkpoints in a folder, by step. Saves run in the background and appear whole or not
    at all; `close` waits for the last one."""

    def __init__(self, folder: str | Path, keep: int | None = None):
        # Orbax reports each file it writes at INFO and each missing optional part at WARNING.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                MODEL: ocp.StandardCheckpointHandler(),
                OPTIMIZER: ocp.StandardCheckpointHandler(),
                EMA: ocp.StandardCheckpointHandler(),
                META: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None),
        )

    def latest(self) -> int | None:
        """The newest step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, trees: dict, meta: dict) -> None:
        """Starts saving `trees` (MODEL, OPTIMIZER, EMA -> pytree) and plain data as `step`."""
        names = {name: _to_names(tree) for name, tree in trees.items()}
        items = {
            name: ocp.args.StandardSave(tree, jax.tree_util.tree_map_with_path(_storage, tree))
            for name, tree in names.items()
        }
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def meta(self, step: int) -> dict:
        """The plain data saved with `step`."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(step, args)[META]

    def restore(self, step: int, trees: dict) -> dict:
        """Reads the named trees of `step`. `trees` holds, for each, a pytree of
        `jax.ShapeDtypeStruct` with shardings: arrays arrive in that shape, type and place.

        Raises CheckpointError naming the tensors that are missing or of another shape.
        """
        names = {name: _to_names(tree) for name, tree in trees.items()}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in names.items()}
        stored = self._manager.item_metadata(step)
        for name, tree in names.items():
            self._check(step, name, tree, stored.get(name))
        read = self._read(step, ocp.args.Composite(**items))
        return {name: _from_names(tree, read[name]) for name, tree in trees.items()}

    def saving(self) -> bool:
        """Whether a save is going on in the background."""
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Waits until the last save is on disk."""
        self._manager.close()

    def _read(self, step: int, args):
        try:
            return self._manager.restore(step, args=args)
        except (FileNotFoundError, ValueError, KeyError, json.JSONDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.folder / str(step)} cannot be read as a checkpoint: {reason}"
            ) from error

    def _check(self, step: int, name: str, wanted: dict, stored) -> None:
        where = self.folder / str(step) / name
        if stored is None:
            raise CheckpointError(f"{where} is missing: this checkpoint holds no such tree.")
        have = {path: tuple(leaf.shape) for path, leaf in _flat(stored.tree).items()}
        want = {path: tuple(leaf.shape) for path, leaf in _flat(wanted).items()}
        for path in want.keys() | have.keys():
            if have.get(path) != want.get(path):
                raise CheckpointError(
                    f"{where}: tensor {path} is {have.get(path, 'absent')} there and "
                    f"{want.get(path, 'absent')} in the model of this config; "
                    "the config's model section must be the one it was trained with."
                )


def _to_names(tree) -> dict:
    """A pytree as nested dictionaries by attribute, key and place."""
    nested: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = _names(path)
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def _from_names(tree, nested: dict):
    """The inverse of `_to_names`: a tree of `tree`'s structure with leaves out of `nested`."""

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


def _storage(path, leaf) -> ocp.SaveArgs:
    """How a leaf is cut on disk, besides as on the mesh: so that it can be read in matrices."""
    where = "/".join(_names(path))
    lead = int("layers/" in where)
    for name, matrix in MATRICES.items():
        if where.endswith(name):
            lead = leaf.ndim - matrix.row_dims - matrix.col_dims
    return ocp.SaveArgs(shard_axes=tuple(range(lead)))


def _flat(nested, prefix="") -> dict:
    """Leaves of nested dictionaries by their path, `a/b/c`."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    leaves: dict = {}
    for name, part in nested.items():
        leaves |= _flat(part, f"{prefix}/{name}" if prefix else name)
    return leaves
