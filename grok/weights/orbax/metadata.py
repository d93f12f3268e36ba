"""The small files around the arrays of a checkpoint, as Orbax writes and reads them.

A checkpoint is a folder named by its step, with a folder for each item: `model` holds a tree of
arrays, each named by its path with dots, and `_METADATA` that lists them; `meta` holds plain data.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grok import storage
from grok.errors import CheckpointError
from grok.weights.orbax.zarr import ZarrArray

MODEL, LORA, META = "model", "lora", "meta"
METADATA = "_METADATA"
# Orbax's mark of a checkpoint that is whole, where folders cannot be renamed.
COMMITTED = "commit_success.txt"
HANDLERS = {
    META: "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler",
    MODEL: ("orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"),
}
DICT_KEY = 2  # Orbax's number for a key of a dictionary


@dataclasses.dataclass(frozen=True)
class Tree:
    """The arrays of a tree, by names with dots, and how they are kept."""

    names: frozenset[str]
    zarr3: bool
    ocdbt: bool


def write_files(step: Path, arrays: Iterable[ZarrArray], meta: dict[str, Any]) -> None:
    """Everything but the arrays of the checkpoint in folder `step`; what marks it whole is last."""
    (step / META).mkdir(exist_ok=True)
    _write(step / META / "metadata", meta)
    tree = {
        str(tuple(array.name.split("."))): {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in array.name.split(".")],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": array.shard,
            },
        }
        for array in arrays
    }
    _write(
        step / MODEL / METADATA,
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
    )
    _write(step / "_CHECKPOINT_METADATA", {"item_handlers": HANDLERS})
    for folder in (step / MODEL, step / META, step):
        (folder / COMMITTED).write_text("Checkpoint commit was successful")


def read_tree(folder: str) -> Tree:
    """What `_METADATA` in an item's folder lists; CheckpointError where it cannot be read."""
    path = storage.join(folder, METADATA)
    data = _read(path)
    try:
        names = frozenset(
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in data["tree_metadata"].values()
        )
        return Tree(names, bool(data.get("use_zarr3")), bool(data["use_ocdbt"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not as Orbax writes it ({error!r}).") from error


def read_meta(step: str) -> dict[str, Any]:
    """The plain data of the checkpoint in folder `step`; empty where it has none."""
    path = storage.join(step, META, "metadata")
    return _read(path) if storage.exists(path, CheckpointError) else {}


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data))


def _read(path: str) -> dict[str, Any]:
    try:
        data = json.loads(storage.read_bytes(path, CheckpointError))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is not a JSON object.")
    return data
