"""The config.json of a model family <-> our config. Every key of a file is read, or known to change
nothing with the value that it has, or refused; so is every value of our config that has no key."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grok.config import ModelConfig
from grok.config.load import flatten, from_dict, nest, to_dict
from grok.config.model import HOW_IT_RUNS
from grok.errors import CheckpointError, ConfigError
from grok.weights.huggingface.adapters.rope_scaling import LLAMA3_KEYS, read_rope, rope_data
from grok.weights.source import quoted

# No model has more of anything, and arithmetic with more could take for ever.
LARGEST_SIZE = 1 << 24
# A harmless key with any value.
ANY = None
# A field without a default: a file that lacks it is refused, or our own default is taken.
REQUIRED, OURS = object(), object()
SCALING = "attention.rope.scaling"
HARMLESS: dict[str, tuple | None] = {
    **dict.fromkeys(
        (
            *("architectures", "model_type", "_name_or_path", "transformers_version"),
            *("torch_dtype", "dtype", "use_cache", "initializer_range", "return_dict"),
            *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "tokenizer_class"),
            *("output_attentions", "output_hidden_states", "id2label", "label2id"),
            # Settings of `generate`, which early files have here.
            *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p"),
            *("repetition_penalty", "num_beams", "max_new_tokens", "length_penalty"),
        ),
        ANY,
    ),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """The values that a field may have there, in words and as a test, and their form here."""

    words: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any]


SIZE = Kind(
    f"an integer from 1 to {LARGEST_SIZE}",
    lambda value: type(value) is int and 0 < value <= LARGEST_SIZE,
    int,
)
FACTOR = Kind(
    "a positive number",
    lambda value: type(value) in (int, float) and 0 < value < math.inf,
    float,
)
FLAG = Kind("true or false", lambda value: type(value) is bool, bool)


@dataclasses.dataclass(frozen=True)
class Field:
    """A value of our config, under its dotted key, and its keys in config.json, of which exports
    write the first. `default` is that of a file without it, or a function of the path and the
    values before. `absent` is the value there that says there is none: null, where it may be."""

    ours: str
    keys: tuple[str, ...]
    kind: Kind
    default: Any = REQUIRED
    nullable: bool = False
    absent: Any = None

    def read(self, path: str, data: Mapping[str, Any], values: dict[str, Any]) -> None:
        """Adds the value in `data` to `values`, or the default."""
        stated = [key for key in self.keys if data.get(key) is not None]
        if not stated and self.nullable and any(key in data for key in self.keys):
            values[self.ours] = None
        elif not stated:
            self._read_default(path, values)
        elif self.nullable and data[stated[0]] == self.absent:
            values[self.ours] = None
        else:
            value = data[stated[0]]
            if not self.kind.accepts(value):
                right = f"it should be {self.kind.words}"
                raise CheckpointError(f"{path}: {stated[0]} is {value!r:.40}; {right}.")
            values[self.ours] = self.kind.convert(value)

    def _read_default(self, path: str, values: dict[str, Any]) -> None:
        if self.default is REQUIRED:
            what = ", a size of the model" if self.kind is SIZE else ""
            raise CheckpointError(f"{path}: {self.keys[0]} is missing{what}.")
        if callable(self.default):
            values[self.ours] = self.default(path, values)
        elif self.default is not OURS:
            values[self.ours] = self.default


def head_dim_of_width(path: str, values: dict[str, Any]) -> int:
    """The default width of a head, hidden_size / num_attention_heads."""
    embed_dim, num_heads = values["embed_dim"], values["attention.num_heads"]
    if embed_dim % num_heads:
        raise CheckpointError(
            f"{path}: hidden_size={embed_dim} is no multiple of num_attention_heads={num_heads}, "
            "so head_dim must be given."
        )
    return embed_dim // num_heads


def default_logit_scale(values: Mapping[str, Any]) -> float:
    """The attention scale of families without a key for it: 1/sqrt(head_dim)."""
    return 1 / math.sqrt(values["attention.head_dim"])


@dataclasses.dataclass(frozen=True)
class ConfigJson:
    """A family's config.json. `head` are its first entries, the same for all models. `fixed` are
    our keys without one there, and the value that the family's code computes with, or a function of
    our config's values. `harmless` are keys that change nothing, with the values for which that
    holds (ANY), beside those of every family; `written` has their values in exports, or functions
    of our config. `alternatives` are values of fixed keys that a reader may choose instead, and no
    file can say. With `scaled_rope`, the default theta, theta and scaling are where the versions
    of transformers have them."""

    head: Mapping[str, Any]
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    harmless: Mapping[str, tuple | None]
    written: Mapping[str, Any]
    scaled_rope: float | None = None
    alternatives: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, path: str, family: str, data: dict[str, Any]) -> ModelConfig:
        """The model that `data`, the content of the config.json at `path`, describes. Raises
        CheckpointError, with the key, for values that no model of the family can have, and for what
        is not known."""
        self._check_harmless(path, family, data)
        values: dict[str, Any] = {}
        for ours, value in self.fixed.items():
            if not callable(value):
                values[ours] = value
        for field in self.fields:
            field.read(path, data, values)
        if self.scaled_rope is not None:
            values |= read_rope(path, data, self.scaled_rope)
        try:
            return from_dict(nest(values), path, config_type=ModelConfig)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None

    def _check_harmless(self, path: str, family: str, data: dict[str, Any]) -> None:
        harmless = HARMLESS | dict(self.harmless)
        read = {key for field in self.fields for key in field.keys}
        if self.scaled_rope is not None:
            read |= {"rope_theta", "rope_scaling", "rope_parameters"}
        for key, value in data.items():
            if key in read or value is None:
                continue
            if key not in harmless:
                raise CheckpointError(
                    f"{path}: {quoted(key)} is {shown(value)}, and no {family} model that is "
                    "known here has such a key; delete it if it changes nothing that the model "
                    "computes."
                )
            allowed = harmless[key]
            if allowed is not ANY and value not in allowed:
                right = " or ".join(shown(value) for value in allowed)
                raise CheckpointError(
                    f"{path}: {key} is {shown(value)}; {family} models are read with {right} only."
                )

    def stated_fields(self, data: Mapping[str, Any]) -> set[str]:
        """The fields of our config that a config.json has."""
        stated = {f.ours for f in self.fields if any(key in data for key in f.keys)}
        if self.scaled_rope is not None:
            stated |= {SCALING, *(f"{SCALING}.{key}" for key in LLAMA3_KEYS)}
            if any(data.get(key) for key in ("rope_theta", "rope_parameters")):
                stated.add("attention.rope.theta")
        return stated

    def problems(
        self, config: ModelConfig, reading: bool = False
    ) -> Iterator[tuple[str, Any, str]]:
        """Yields each of our keys that such a file cannot hold the value of, or that it cannot be
        read with: key, value, and the values that would do."""
        values = dict(flatten(to_dict(config)))
        fields = {field.ours: field for field in self.fields}
        for key, value in values.items():
            if reading and value is not None and self.alternatives.get(key) == value:
                continue
            if key in self.fixed:
                right = self.fixed[key]
                right = right(values) if callable(right) else right
                numbers = type(right) is float and type(value) is float
                if value != right and not (numbers and math.isclose(value, right, rel_tol=1e-6)):
                    yield key, value, json.dumps(right)
            elif key in fields:
                if value is None and not fields[key].nullable:
                    yield key, value, "a number"
            elif key not in HOW_IT_RUNS and not self._holds_rope(key):
                section = key.rpartition(".")[0]
                yield key, value, f"model.{section}=null" if section in self.fixed else "a section"

    def _holds_rope(self, key: str) -> bool:
        scaled = self.scaled_rope is not None
        return scaled and (key == "attention.rope.theta" or key.startswith(SCALING))

    def numbers(self, config: ModelConfig) -> dict[str, Any]:
        """The model's sizes and factors under their keys in config.json."""
        values = dict(flatten(to_dict(config)))
        data: dict[str, Any] = {}
        for field in self.fields:
            value = values[field.ours]
            data[field.keys[0]] = field.absent if value is None else field.kind.convert(value)
        return data | (rope_data(config.attention.rope) if self.scaled_rope is not None else {})

    def data(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The content of config.json for a model that it can hold."""
        written = {k: v(config) if callable(v) else v for k, v in self.written.items()}
        return {**self.head, **self.numbers(config), **written, "torch_dtype": dtype}


def shown(value: Any) -> str:
    """A value as JSON, for messages, shortened."""
    return f"{json.dumps(value):.60}"
