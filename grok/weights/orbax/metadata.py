"""The small files beside the arrays of a checkpoint, in Orbax's format: `_METADATA`, the list of
the arrays of an item such as `model`, each named by its path with dots; and `meta`, plain data."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grok import storage
from grok.checkpoint import file_list
from grok.errors import CheckpointError
from grok.weights.orbax.zarr import ZarrArray
from grok.weights.source import read_object

MODEL, LORA, META = "model", "lora", "meta"
METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
_HANDLERS = "orbax.checkpoint._src.handlers"
HANDLERS = {
    META: f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    MODEL: f"{_HANDLERS}.standard_checkpoint_handler.StandardCheckpointHandler",
}
DICT_KEY = 2  # Orbax's number for a key of a dictionary


def write_files(step: Path, arrays: Iterable[ZarrArray], meta: dict[str, Any]) -> None:
    """Writes the files of the checkpoint in folder `step` but its arrays, the list of all last."""
    (step / META).mkdir(exist_ok=True)
    (step / META / "metadata").write_text(json.dumps(meta))
    tree = {
        str(tuple(array.name.split("."))): {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in array.name.split(".")],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": array.stored_shape(array.shard),
            },
        }
        for array in arrays
    }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (step / MODEL / METADATA).write_text(json.dumps(metadata))
    (step / STEP_METADATA).write_text(json.dumps({"item_handlers": HANDLERS}))
    file_list.commit(step, 0)


def read_tree(folder: str) -> tuple[list[str], bool, bool]:
    """The names with dots of an item's arrays, in order, whether it is zarr3, and whether OCDBT.
    Raises CheckpointError where `_METADATA` cannot be read."""
    path = storage.join(folder, METADATA)
    data = read_object(path)
    try:
        keys = (entry["key_metadata"] for entry in data["tree_metadata"].values())
        names = sorted({".".join(str(key["key"]) for key in path) for path in keys})
        return names, bool(data.get("use_zarr3")), bool(data["use_ocdbt"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not as Orbax writes it ({error!r}).") from error


def read_meta(step: str) -> dict[str, Any]:
    """The plain data of the checkpoint in folder `step`; empty where there is none."""
    path = storage.join(step, META, "metadata")
    return read_object(path) if storage.exists(path, CheckpointError) else {}
