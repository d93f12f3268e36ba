"""From weights in any format to a model that answers: its config, tokenizer, mesh and engine."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grok import distributed, sharding, storage
from grok.config import (
    MESH_AXES,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    check_servable,
)
from grok.config.infer import InferConfig
from grok.config.load import from_dict, load_config, to_dict
from grok.config.mesh import num_devices_of
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.renderer import TemplateError
from grok.data.chat.template import find_template
from grok.data.tokenizers import TOKENIZER_NAMES, Tokenizer, load_tokenizer
from grok.data.tokenizers.files import find_tokenizer_file, folders_beside
from grok.errors import CheckpointError, ConfigError, DataError
from grok.infer.openai.requests import RequestParser
from grok.model.decoder import Decoder
from grok.model.mesh_fit import check_matmul_dtype, fit_mesh
from grok.ops.cpu import few_rows
from grok.progress import byte_progress
from grok.weights.checksums import sample_checksum
from grok.weights.detect import open_source
from grok.weights.load import DTYPES, load

ONE_DEVICE = (*(f"mesh.{axis}=1" for axis in MESH_AXES), "mesh.simulated_devices=0")


def config_of(path: str, config: str | None, overrides: Sequence[str]) -> RunConfig:
    """The config for the weights at `path`, on one device unless overrides say otherwise: `config`
    (a preset or file), a run's config.yaml, or what the files say of their model and type. A run
    with adapters over quantised weights has their sum in the type of computation. Raises
    ConfigError and CheckpointError."""
    changes = (*ONE_DEVICE, *overrides)
    file = Path(path) / "config.yaml"
    if config or file.is_file():
        run = load_config(config or file, changes)
        if config or not (run.lora.rank and run.model.is_quantized):
            return run
        # Quantised again, the sum would lose much of what the adapters add.
        sum_dtype = f"model.param_dtype={run.model.compute_dtype}"
        return load_config(file, (sum_dtype, *changes))
    source = open_source(path)
    dtype: Any = source.dtype if source.dtype in DTYPES else "float32"
    model = dataclasses.replace(source.config, param_dtype=dtype)
    length = min(DataConfig.sequence_length, model.context_length)
    run = RunConfig(model=model, data=DataConfig(sequence_length=length))
    return from_dict(to_dict(run), path, changes)


def find_tokenizer(
    path: str, tokenizer: str | None, config: RunConfig, datasets: Sequence[str] = ()
) -> str:
    """The tokenizer's file, local or gs://: `tokenizer`, or one beside the weights, in the
    config, or in the first prepared dataset. Raises DataError where there is none of these."""
    if tokenizer:
        return tokenizer
    file = find_tokenizer_file(folders_beside(path))
    if file is None and config.data.tokenizer and storage.exists(config.data.tokenizer, DataError):
        file = config.data.tokenizer
    file = file or find_tokenizer_file(datasets)
    if file is None:
        *others, last = TOKENIZER_NAMES
        right = "the tokenizer of these weights, as in --tokenizer FILE or tokenizer=FILE"
        names = f"{', '.join(others)} or {last}"
        raise DataError(f"there is no {names} beside {path}; {right}, would work.")
    return file


def make_mesh(mesh: MeshConfig, model: ModelConfig, spans_all_hosts: bool = False) -> Mesh:
    """The mesh over this host's devices, as many as it needs, or over those of all hosts. Raises
    ConfigError where it fits neither them nor the model, or the devices have no rate of 8 bits to
    serve its products in."""
    if model.is_quantized:
        check_matmul_dtype(model, jax.devices()[0].device_kind)
    devices = jax.devices() if spans_all_hosts else jax.local_devices()
    if not spans_all_hosts:
        devices = devices[: num_devices_of(mesh, len(devices))]
    return sharding.make_mesh(**fit_mesh(mesh, len(devices), model), devices=devices)


def find_chat(
    setting: str, tokenizer: Tokenizer, allow_special: bool = False
) -> ChatEncoder | None:
    """The encoder of conversations by the template that `setting` names, else by the one beside the
    tokenizer; None where there is none. ConfigError for a setting that is none, and DataError."""
    template = find_template(setting, tokenizer)
    return None if template is None else ChatEncoder(template, tokenizer, allow_special)


class ServedModel:
    """A model that a config names: `config` (a ModelConfig), `tokenizer`, `mesh`; `notices` are
    sentences on what may be amiss with its chat template. Its weights are read when `load` or
    `engine` is called."""

    def __init__(self, config: InferConfig, spans_all_hosts: bool = False):
        """On the devices of this host, or those of all hosts. Raises ConfigError, DataError and
        CheckpointError for what cannot work, before anything slow."""
        if spans_all_hosts:
            weights = distributed.broadcast_from_primary(
                lambda: storage.pinned(config.weights, CheckpointError)
            )
            config = dataclasses.replace(config, weights=weights)
        names = "param_dtype", "embedding_dtype", "compute_dtype"
        dtypes = {name: getattr(config, name) for name in names}
        changes = [f"model.{name}={value}" for name, value in dtypes.items() if value]
        # That of a run is for its training.
        changes.append(f"model.matmul_dtype={config.matmul_dtype}")
        run = config_of(config.weights, config.model or None, changes)
        check_servable(run.model)
        self.config, self._settings = run.model, config
        file = find_tokenizer(config.weights, config.tokenizer, run)
        self.tokenizer = load_tokenizer(file)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            pieces = f"{self.tokenizer.vocab_size} pieces and the model of weights={config.weights}"
            right = "the tokenizer that the model was trained with would work"
            problem = f"tokenizer={file} has {pieces} knows {self.config.vocab_size}"
            raise ConfigError(f"{problem}; {right}.")
        self.mesh = make_mesh(config.mesh, self.config, spans_all_hosts)
        self._chat, self.notices = self._find_chat(config)

    def _find_chat(self, config: InferConfig) -> tuple[ChatEncoder | None, list[str]]:
        """The encoder of conversations, and what may be amiss with it."""
        try:
            chat = find_chat(config.chat_template, self.tokenizer, config.allow_special_tokens)
        except TemplateError as error:
            if config.chat_template:
                raise
            return None, [f"{error} There is no chat; other completions work."]
        return chat, chat.notices if chat else []

    def identity(self) -> dict[str, Any]:
        """Plain data that tells this model from others without reading all of it."""
        source = open_source(self._settings.weights, self.config)
        return {
            "model": to_dict(self.config),
            "weights": {"checksum": sample_checksum(source)},
            "tokenizer": {
                "sha256": self.tokenizer.files.sha256,
                "adds_bos": self.tokenizer.adds_bos,
                "eos_ids": list(self.tokenizer.eos_ids),
            },
            "chat": self._chat and hashlib.sha256(self._chat.template.text.encode()).hexdigest(),
        }

    def parser(self, max_choices: int = 128) -> RequestParser:
        """The parser of request bodies, with the config's defaults and chat template."""
        defaults, context_length = self._settings.sampling, self.config.context_length
        allow_special = self._settings.allow_special_tokens
        return RequestParser(
            self.tokenizer, defaults, context_length, self._chat, max_choices, allow_special
        )

    def load(self, log: Callable[[str], None]) -> Decoder:
        """Reads the weights onto the mesh; `log` gets a line before."""
        path, dtype = self._settings.weights, self.config.param_dtype
        log(f"reading the weights at {path}, {dtype}")
        with byte_progress(quiet=not distributed.is_primary()) as on_progress:
            return load(path, self.config, self.mesh, dtype, on_progress)

    def engine(self, log: Callable[[str], None]) -> Any:
        """Reads the weights and makes the engine; `log` gets a line before each slow part."""
        from grok.infer.engine import Engine
        from grok.infer.programs import ProgramStore

        for notice in self.notices:
            log(notice)
        model = self.load(log)
        if (kernels := few_rows.describe()) is not None:
            log(kernels)
        log(f"compiling for the mesh {dict(self.mesh.shape)}")
        store = ProgramStore.of_user()
        return Engine(model, self.tokenizer, self.mesh, self._settings.engine, store)
