"""The config of `grok batch` from what its command names: a YAML file, a preset, or weights."""

from collections.abc import Sequence
from pathlib import Path

from grok.config.infer import BatchConfig
from grok.config.load import from_dict, load_config


def load_batch_config(name: str, overrides: Sequence[str] = ()) -> BatchConfig:
    """The config of a YAML file or a preset, or that of the weights in the folder, at gs:// or at
    hf://, called `name`. Raises ConfigError."""
    if "://" in name or Path(name).is_dir():
        return from_dict({"weights": name}, name, overrides, BatchConfig)
    return load_config(name, overrides, BatchConfig)
