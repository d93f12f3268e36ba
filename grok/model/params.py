"""The table of a model's weights, by name, collected from the specs that its modules declare.

A weight's name is its path in the tree, as in `layers/moe/w_gate_EDF`: what checkpoints, importers
and exporters agree on. Weights of `layers/` have the layers stacked on a leading axis L, which the
letters at the end of a name leave out.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping

from grok.config import LoraConfig, ModelConfig
from grok.errors import ConfigError
from grok.model.decoder import Decoder
from grok.model.param_spec import ParamSpec


@functools.cache
def param_specs(config: ModelConfig) -> Mapping[str, ParamSpec]:
    """Every weight of the model by name, layers stacked."""
    return types.MappingProxyType(Decoder.param_specs(config))


def num_parameters(config: ModelConfig) -> int:
    """Number of all parameters of the model."""
    return sum(spec.size for spec in param_specs(config).values())


def num_active_parameters(config: ModelConfig) -> int:
    """Number of parameters that one token uses: all but the experts it is not sent to."""
    return sum(active_size(spec, config) for spec in param_specs(config).values())


def active_size(spec: ParamSpec, config: ModelConfig) -> int:
    """Number of a weight's parameters that one token uses."""
    if not spec.is_per_expert:
        return spec.size
    assert config.moe is not None
    return spec.size // config.moe.num_experts * config.moe.num_selected


def lora_targets(config: ModelConfig, lora: LoraConfig) -> dict[str, ParamSpec]:
    """The matrices that get an adapter, by name; none where the rank is 0.

    Raises ConfigError where a target is no matrix of the model.
    """
    if not lora.rank:
        return {}
    matrices = {name: spec for name, spec in param_specs(config).items() if spec.is_matmul}
    words = [spec.short_name for spec in matrices.values()]
    for target in lora.targets:
        if target not in words:
            raise ConfigError(
                f"lora.targets has {target}, which is no matrix of the model; it has "
                f"{', '.join(dict.fromkeys(words))}."
            )
    return {name: spec for name, spec in matrices.items() if spec.short_name in lora.targets}


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Number of parameters of the adapters, all that a run with them trains."""
    return sum(
        math.prod(shape)
        for spec in lora_targets(config, lora).values()
        for shape in spec.lora_shapes(lora.rank)
    )


def describe_lora(config: ModelConfig, lora: LoraConfig) -> str:
    """The adapters in words: parameters, rank, targets."""
    count, total = num_adapter_parameters(config, lora), num_parameters(config)
    targets = ", ".join(lora.targets)
    return (
        f"{count:,} trainable parameters ({count / total:.2%} of {total:,}), rank {lora.rank} "
        f"(alpha {lora.alpha:g}) on {targets}"
    )


def is_adapter(config: ModelConfig, name: str) -> bool:
    """True of an adapter's factor, such as `layers/attention/w_query_DNH/a`."""
    weight, _, part = name.rpartition("/")
    return weight in param_specs(config) and part in ("a", "b")


def tensor_specs(config: ModelConfig, lora: LoraConfig | None = None) -> dict[str, ParamSpec]:
    """Every tensor of the model by name: its weights, of those with an adapter NAME/base, /a,
    /b."""

    def tensors() -> Iterator[tuple[str, ParamSpec]]:
        targets = lora_targets(config, lora) if lora else {}
        for name, spec in param_specs(config).items():
            if name not in targets:
                yield name, spec
                continue
            yield f"{name}/base", dataclasses.replace(spec, name=f"{name}/base")
            for part, shape in zip("ab", spec.lora_shapes(lora.rank if lora else 0), strict=True):
                axes = (*spec.axes[: spec.lead_dims], *(None,) * (len(shape) - spec.lead_dims))
                path = f"{name}/{part}"
                yield path, ParamSpec(shape, axes, "adapter", module=spec.module, name=path)

    return dict(tensors())
