"""A model as its arrays alone, for programs that are called a thousand times a second: Flax takes a
tenth of a millisecond to flatten the modules of a model, each time that it is an argument."""

import dataclasses
from typing import Any

import jax

from grok.config import ModelConfig
from grok.model.decoder import Decoder


class Structure:
    """A tree's structure, which is compared by its nodes only where it is another object."""

    def __init__(self, definition: Any):
        self.definition, self._hash = definition, hash(definition)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and self.definition == other.definition

    def __repr__(self) -> str:
        return str(self.definition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatModel:
    """The arrays of a model in the order of its tree."""

    leaves: tuple[jax.Array, ...]
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    structure: Structure = dataclasses.field(metadata={"static": True})


def flat(model: Decoder | FlatModel) -> FlatModel:
    """The model as its arrays."""
    if isinstance(model, FlatModel):
        return model
    leaves, definition = jax.tree.flatten(model)
    return FlatModel(tuple(leaves), model.config, Structure(definition))


def modules_of(model: Decoder | FlatModel) -> Decoder:
    """The model as its modules."""
    if isinstance(model, FlatModel):
        return jax.tree.unflatten(model.structure.definition, model.leaves)
    return model
