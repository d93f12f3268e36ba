"""A model family on Hugging Face: its tensors' names, its config.json, and its model card. PyTorch
keeps linear layers as [out, in], the transpose of ours, with heads as one axis."""

import abc
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from grok.config import ModelConfig
from grok.errors import CheckpointError
from grok.model.param_spec import ParamSpec
from grok.model.params import param_specs

TOKEN_TABLE = "embed/table_VD"


@dataclasses.dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor there: its name, parameter, and layer and expert, as far as it has them."""

    name: str
    param: ParamSpec
    lead: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Returns True for [out, in]."""
        return is_linear(self.param)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape there."""
        _, rows, columns = split_axes(self.param, self.param.shape)
        return (math.prod(columns), math.prod(rows)) if self.transposed else rows


class Adapter(abc.ABC):
    """A family; `release` names its released weights, of `release_parameters` parameters. A layout,
    by repository, maps our names to theirs, with {layer} and {expert}, in the order of exports,
    which write `export_layout`. `tied_head` names the token table as the output layer."""

    family: str
    layouts: Mapping[str, Mapping[str, str]]
    export_layout: str
    tied_head: str
    release: str
    release_parameters: int

    @abc.abstractmethod
    def layout_of(self, names: Iterable[str]) -> str | None:
        """The layout that tensors of these names are in; None for those of another family."""

    @abc.abstractmethod
    def read_config(self, path: str, data: dict[str, Any]) -> ModelConfig:
        """The model that `data`, the content of the config.json at `path`, describes. Raises
        CheckpointError, with the key, for values that no model of the family can have."""

    @abc.abstractmethod
    def stated_fields(self, data: dict[str, Any]) -> set[str]:
        """The fields of our config that a config.json has."""

    @abc.abstractmethod
    def config_data(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The content of config.json for a model in `export_layout`."""

    @abc.abstractmethod
    def config_numbers(self, config: ModelConfig) -> dict[str, int | float]:
        """The model's sizes and factors under their keys in config.json. Raises ConfigError, with
        the key, for a model that the family cannot express."""

    @abc.abstractmethod
    def reading_notes(self, config: ModelConfig) -> str:
        """Text of the model card on the programs that can read an export."""

    def tensors(self, layout: str, config: ModelConfig) -> Iterator[HuggingFaceTensor]:
        """All tensors of a layout except `tied_head`: table, layers, final norm. Raises
        CheckpointError where the model has other weights than the layout."""
        specs = param_specs(config)
        names = self.layouts[layout]
        if differing := sorted(specs.keys() ^ names.keys()):
            raise CheckpointError(
                f"the layout {layout} cannot hold this model: only one of them has "
                f"{', '.join(differing)}; a checkpoint of grok, as `grok export params` writes it, "
                "holds every model."
            )

        def tensor(tree_name: str, layer: int | None = None, expert: int | None = None):
            name = names[tree_name].format(layer=layer, expert=expert)
            lead = tuple(index for index in (layer, expert) if index is not None)
            return HuggingFaceTensor(name, specs[tree_name], lead)

        yield tensor(TOKEN_TABLE)
        for layer in range(config.num_layers):
            for tree_name, name in names.items():
                if "{expert}" in name:
                    assert config.moe is not None
                    for expert in range(config.moe.num_experts):
                        yield tensor(tree_name, layer, expert)
                elif "{layer}" in name:
                    yield tensor(tree_name, layer)
        yield tensor("final_norm/scale_D")


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
