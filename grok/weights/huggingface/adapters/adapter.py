"""A model family on Hugging Face: its tensors' names, its config.json, and its model card. PyTorch
keeps linear layers as [out, in], the transpose of ours, with heads as one axis."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from grok.config import ModelConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.param_spec import ParamSpec
from grok.model.params import param_specs
from grok.weights.huggingface.adapters.config_json import ConfigJson, shown
from grok.weights.source import Part, part_shape

TOKEN_TABLE, HEAD = "embed/table_VD", "lm_head/table_VD"
# The output layer, in every family. Where it is the token table, files may have that as this too.
HEAD_NAME = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor there: its name, parameter, and layer and expert, as far as it has them; or what the
    file of one of `num_ranks` tensor-parallel ranks has of it."""

    name: str
    param: ParamSpec
    lead: tuple[int, ...]
    rank: int = 0
    num_ranks: int = 1

    @property
    def transposed(self) -> bool:
        """Returns True for [out, in]."""
        return is_linear(self.param)

    @property
    def part(self) -> Part:
        """The part of our parameter that it holds."""
        lead = [slice(index, index + 1) for index in self.lead]
        axes = [slice(0, size) for size in self.param.shape[len(lead) :]]
        part = [*lead, *axes]
        if self.num_ranks > 1:
            axis = self.param.axes.index("mlp")
            size = self.param.shape[axis] // self.num_ranks
            part[axis] = slice(self.rank * size, (self.rank + 1) * size)
        return tuple(part)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape there."""
        _, rows, columns = split_axes(self.param, part_shape(self.part))
        return (math.prod(columns), math.prod(rows)) if self.transposed else rows

    @property
    def rank_axis(self) -> int | None:
        """The axis there along which the ranks' parts are joined: that of an expert's width. None
        for a tensor that every rank has whole."""
        if not self.param.is_per_expert:
            return None
        return 0 if "mlp" in self.param.split(self.param.axes)[2] else 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Our names to theirs, with {layer} and {expert}, in the order of exports; `distinctive` finds
    a name of every layer that tells the layout from those of other families."""

    names: Mapping[str, str]
    distinctive: re.Pattern[str]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A family. `name` is the word for it in commands, `model_types` those of its config.json.
    Exports write `export_layout`, the token table as the output layer too if `copies_tied_head`,
    and experts in files of `num_ranks` ranks. `ignored` are names of buffers in old files.
    `reading_notes` and `tokenizer_note` are text of the model card: on the programs that can read
    an export, and for one without its tokenizer."""

    name: str
    family: str
    model_types: tuple[str, ...]
    layouts: Mapping[str, Layout]
    export_layout: str
    config_json: ConfigJson
    reading_notes: Callable[[ModelConfig], str]
    tokenizer_note: str
    ignored: re.Pattern[str] | None = None
    copies_tied_head: bool = False
    num_ranks: int | None = None

    def layout_of(self, names: Collection[str]) -> str | None:
        """The layout that tensors of these names are in; None for those of another family."""
        for layout, known in self.layouts.items():
            if any(known.distinctive.match(name) for name in names):
                return layout
        return None

    def read_config(self, path: str, data: dict[str, Any]) -> ModelConfig:
        """The model that `data`, the content of the config.json at `path`, describes. Raises
        CheckpointError, with the key, for values that no model of the family can have, and for keys
        that are not known."""
        return self.config_json.read(path, self.family, data)

    def check_holds(self, config: ModelConfig, reading: bool = False) -> None:
        """Raises ConfigError, with the key, for a model that the family cannot express, or that its
        weights cannot be read as."""
        for key, value, right in self.config_json.problems(config, reading):
            raise ConfigError(
                f"model.{key}={shown(value)} has no place in a Hugging Face folder of "
                f"{self.family}, which needs {right}."
            )

    def config_data(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The content of config.json for a model in `export_layout`; raises as `check_holds`."""
        self.check_holds(config)
        return self.config_json.data(config, dtype)

    def config_numbers(self, config: ModelConfig) -> dict[str, Any]:
        """The model's sizes and factors under their keys in config.json; raises likewise."""
        self.check_holds(config)
        return self.config_json.numbers(config)

    def tensors(self, layout: str, config: ModelConfig) -> Iterator[HuggingFaceTensor]:
        """All tensors of a layout, without the copy of a tied table: table, layers, final norm,
        output layer. Raises CheckpointError where the model has other weights than the layout."""
        specs = param_specs(config)
        names = dict(self.layouts[layout].names)
        if HEAD not in specs:
            names.pop(HEAD, None)
        if differing := sorted(specs.keys() ^ names.keys()):
            raise CheckpointError(
                f"the layout {layout} cannot hold this model: only one of them has "
                f"{', '.join(differing)}; a checkpoint of grok, as `grok export params` writes it, "
                "holds every model."
            )
        experts = config.moe.num_experts if config.moe else 0

        def tensor(tree_name: str, layer: int | None = None, expert: int | None = None):
            name = names[tree_name].format(layer=layer, expert=expert)
            lead = tuple(index for index in (layer, expert) if index is not None)
            return HuggingFaceTensor(name, specs[tree_name], lead)

        yield tensor(TOKEN_TABLE)
        for layer in range(config.num_layers):
            for tree_name, name in names.items():
                if "{expert}" in name:
                    for expert in range(experts):
                        yield tensor(tree_name, layer, expert)
                elif "{layer}" in name:
                    yield tensor(tree_name, layer)
        yield tensor("final_norm/scale_D")
        if HEAD in specs:
            yield tensor(HEAD)


def is_linear(spec: ParamSpec) -> bool:
    """True of a parameter that is transposed there."""
    return spec.use in ("matmul", "router")


def split_axes(spec: ParamSpec, axes: tuple) -> tuple[tuple, tuple, tuple]:
    """A parameter's axes, or one value for each, as those of layer and expert, rows, and columns. A
    parameter that is not transposed has rows only."""
    if is_linear(spec):
        return spec.split(axes)
    lead = int(spec.is_stacked)
    return axes[:lead], axes[lead:], ()
