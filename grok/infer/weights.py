"""Weights in any format, to be asked: their config, their tokenizer, and the model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grok.config import DataConfig, RunConfig
from grok.config.load import from_dict, load_config, to_dict
from grok.data.prepare.manifest import TOKENIZER_FILE
from grok.errors import DataError
from grok.infer.load import ONE_DEVICE
from grok.model.decoder import Grok
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.load import DTYPES, place

ALONE = (*ONE_DEVICE, "mesh.simulated_devices=0")


def config_of(path: str, config: str | None, overrides: Sequence[str]) -> RunConfig:
    """The config to run the weights at `path` with, on one device unless overrides say otherwise.

    It is the preset or file `config`, or the config.yaml of a run's folder, or made of what the
    files at `path` say of their model and type. Raises ConfigError and CheckpointError.
    """
    changes = (*ALONE, *overrides)
    own = Path(path) / "config.yaml"
    if config or own.is_file():
        return load_config(config or own, changes)
    source = open_source(path)
    dtype: Any = source.dtype if source.dtype in DTYPES else "float32"
    length = min(DataConfig.sequence_length, source.config.context_length)
    run = RunConfig(
        model=dataclasses.replace(source.config, param_dtype=dtype),
        data=DataConfig(sequence_length=length),
    )
    return from_dict(to_dict(run), path, changes)


def find_tokenizer(path: str, given: str | None, config: RunConfig, data: Sequence[str]) -> str:
    """The tokenizer's file: the one `given`, or beside the weights, or the config's, or that of the
    first prepared dataset. Raises DataError where there is none of these."""
    folder = Path(path)
    # Of one step of a run, the run's folder is two above.
    beside = [each / TOKENIZER_FILE for each in (folder, folder.parent, folder.parent.parent)]
    of_data = [Path(each) / TOKENIZER_FILE for each in data]
    places = [*beside, *([Path(config.data.tokenizer)] if config.data.tokenizer else []), *of_data]
    found = given or next((str(place) for place in places if place.is_file()), None)
    if found is None:
        raise DataError(
            f"there is no {TOKENIZER_FILE} beside {path}; the tokenizer of these weights, as in "
            "--tokenizer FILE or tokenizer=FILE, would work."
        )
    return found


def load_weights(path: str, config: RunConfig, mesh: Mesh) -> Grok:
    """The model at `path` on `mesh`, matrices in `config.model.param_dtype`."""
    return place(converted(open_source(path, config.model), config.model.param_dtype), mesh)
