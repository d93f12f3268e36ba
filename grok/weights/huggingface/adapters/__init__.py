"""The model families on Hugging Face; a new one is a file here and an entry in ADAPTERS."""

from collections.abc import Collection
from typing import Any

from grok.config import ModelConfig
from grok.errors import CheckpointError, ConfigError
from grok.weights.huggingface.adapters.adapter import Adapter
from grok.weights.huggingface.adapters.grok_1 import GROK_1
from grok.weights.huggingface.adapters.grok_2 import GROK_2
from grok.weights.huggingface.adapters.llama import LLAMA
from grok.weights.huggingface.adapters.mistral import MISTRAL
from grok.weights.huggingface.adapters.mixtral import MIXTRAL
from grok.weights.source import quoted

# A model that several can hold is exported as the first.
ADAPTERS: tuple[Adapter, ...] = (GROK_1, GROK_2, LLAMA, MISTRAL, MIXTRAL)
# Their copies have each other's model_type and architectures: the tensors tell them apart.
NAMED_ALIKE: tuple[Adapter, ...] = (GROK_1, GROK_2)
BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}


def adapter_of_config(path: str, data: dict[str, Any]) -> Adapter | None:
    """The family that a config.json says it is of; None where it says nothing. Raises
    CheckpointError, with the model_type, for a family that is not known."""
    # Conversions of Grok-1 share Grok-2's `architectures`, and its model_type is a slip.
    if data.get("residual_moe"):
        return GROK_2
    model_type = data.get("model_type")
    if model_type is None:
        return None
    for adapter in ADAPTERS:
        if model_type in adapter.model_types:
            return adapter
    known = ", ".join(f"{adapter.family} ({adapter.model_types[0]})" for adapter in ADAPTERS)
    raise CheckpointError(
        f"{path}: model_type is {quoted(model_type)}, a family that is not known; those that are: "
        f"{known}."
    )


def layout_of(
    folder: str, names: Collection[str], adapter: Adapter | None, config: ModelConfig | None
) -> tuple[Adapter, str]:
    """The family and layout of tensors of these names: of the family that is known already, or else
    the first that also holds the expected model. Raises CheckpointError where they have other
    names."""
    candidates: tuple[Adapter, ...] = ADAPTERS if adapter is None else (adapter,)
    if adapter in NAMED_ALIKE:
        candidates = NAMED_ALIKE
    layouts = [(a, layout) for a in candidates if (layout := a.layout_of(names))]
    holding = [at for at in layouts if config and not any(at[0].config_json.problems(config, True))]
    if layouts:
        return (holding or layouts)[0]
    known = ", ".join(f"{a.family} ({', '.join(a.layouts)})" for a in candidates)
    raise CheckpointError(
        f"{folder}: its tensors have names of another model, such as {quoted(min(names))}; known "
        f"are those of {known}."
    )


def adapter_for_export(config: ModelConfig, family: str | None = None) -> Adapter:
    """The family whose layout can hold a model: the one called `family`, or the first that can.
    Raises ConfigError, with the key that is in the way, where none can."""
    if family is not None:
        if family not in BY_NAME:
            raise ConfigError(f"family={family} is none of {', '.join(BY_NAME)}.")
        BY_NAME[family].check_holds(config)
        return BY_NAME[family]
    problems = {a.name: list(a.config_json.problems(config)) for a in ADAPTERS}
    nearest = min(ADAPTERS, key=lambda adapter: len(problems[adapter.name]))
    nearest.check_holds(config)
    return nearest
