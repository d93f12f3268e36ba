"""From a config to a model that answers: what `grok batch` and `grok serve` start with."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax

from grok import sharding, storage
from grok.config import MESH_AXES, RunConfig, check_model_fits, resolve_mesh
from grok.config.engine import InferConfig
from grok.config.load import to_dict
from grok.data.prepare.manifest import TOKENIZER_FILE
from grok.data.tokenizers import parse_tokenizer
from grok.errors import ConfigError, DataError
from grok.infer.chat_template import make_renderer
from grok.infer.openai.requests import RequestParser
from grok.infer.weights import config_of, find_tokenizer
from grok.weights.cast import converted
from grok.weights.checksums import sample_checksum
from grok.weights.detect import open_source
from grok.weights.load import place


class ServedModel:
    """A model that a config names: `config` (a GrokConfig), `tokenizer`, `mesh`. Its weights are
    read when `engine` is called."""

    def __init__(self, config: InferConfig, spans_all_hosts: bool = False):
        """On the devices of this host, or those of all hosts. Raises ConfigError, DataError and
        CheckpointError for what cannot work, before anything slow."""
        dtypes = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
        changes = [f"model.{name}={value}" for name, value in dtypes.items() if value]
        run = config_of(config.weights, config.model or None, changes)
        self.config, self._settings = run.model, config
        file, self._tokenizer_bytes = _read_tokenizer(config, run)
        self.tokenizer = parse_tokenizer(self._tokenizer_bytes, file)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"tokenizer={file} has {self.tokenizer.vocab_size} pieces and the model of "
                f"weights={config.weights} knows {self.config.vocab_size}; the tokenizer that the "
                "model was trained with would work."
            )
        devices = jax.devices() if spans_all_hosts else jax.local_devices()
        wanted = [getattr(config.mesh, axis) for axis in MESH_AXES]
        if -1 not in wanted and not spans_all_hosts:
            # A host may have more devices than are asked for.
            devices = devices[: math.prod(wanted)]
        sizes = resolve_mesh(config.mesh, len(devices), self.config)
        check_model_fits(self.config, sizes)
        self.mesh = sharding.make_mesh(
            sizes["data"], sizes["expert"], sizes["tensor"], sizes["slice"], devices
        )
        self._render = (
            make_renderer(config.chat_template, self.tokenizer) if config.chat_template else None
        )

    def identity(self) -> dict[str, Any]:
        """Plain data that tells this model from others without reading all of it."""
        source = open_source(self._settings.weights, self.config)
        return {
            "model": to_dict(self.config),
            "weights": {"checksum": sample_checksum(source)},
            "tokenizer": {"sha256": hashlib.sha256(self._tokenizer_bytes).hexdigest()},
        }

    def reader(self, most_choices: int = 128) -> RequestParser:
        """What makes calls of bodies, with the config's defaults and template."""
        return RequestParser(
            self.tokenizer,
            self._settings.sampling,
            self.config.context_length,
            self._render,
            most_choices,
        )

    def engine(self, say: Callable[[str], None]) -> Any:
        """Reads the weights and makes the engine; `say` is told what takes time."""
        from grok.infer.engine import Engine

        source = open_source(self._settings.weights, self.config)
        say(f"reading the weights at {self._settings.weights}, {self.config.param_dtype}")
        model = place(converted(source, self.config.param_dtype), self.mesh)
        say(f"compiling for the mesh {dict(self.mesh.shape)}")
        return Engine(model, self.tokenizer, self.mesh, self._settings.engine)


def _read_tokenizer(config: InferConfig, run: RunConfig) -> tuple[str, bytes]:
    """The tokenizer's file, here or at gs://, and its bytes. Raises DataError without one."""
    file, beside = config.tokenizer, storage.join(config.weights, TOKENIZER_FILE)
    try:
        if not file and storage.is_remote(config.weights) and storage.exists(beside):
            file = beside
        file = file or find_tokenizer(config.weights, None, run, ())
        data = storage.read_bytes(file)
    except OSError as error:
        raise DataError(f"tokenizer={file} cannot be read: {storage.reason(error)}.") from error
    if not data:
        raise DataError(f"tokenizer={file} is empty.")
    return file, data
