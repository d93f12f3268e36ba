"""Trained and frozen tensors, and parameter groups: patterns over names such as
`layers/moe/router_DE`. In the trained part of a model, None stands for every frozen tensor."""

import fnmatch
import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from grok.config import OptimizerConfig, ParamGroup, RunConfig
from grok.errors import ConfigError
from grok.model.build import to_arrays
from grok.model.decoder import Decoder
from grok.model.param_spec import ParamSpec, name_of
from grok.model.params import is_adapter

Specs = Mapping[str, ParamSpec]

# Groups in metrics of tensors that are in no named group of the config, by their use; tensors of
# other uses are named for their module.
DEFAULT_GROUPS = {"norm": "norms", "router": "router"}


def names(model: Decoder) -> list[str]:
    """Names of the model's tensors, in the order of its tree."""
    return list(to_arrays(model))


def trainable(config: RunConfig) -> Callable[[str], bool]:
    """The predicate over names of trained tensors: of a run with adapters, only those."""

    def is_trainable(name: str) -> bool:
        if config.lora.rank and not is_adapter(config.model, name):
            return False
        group = group_of(config.optimizer, name)
        return group is None or not group.frozen

    return is_trainable


def group_of(config: OptimizerConfig, name: str) -> ParamGroup | None:
    """The first of the config's groups that matches the tensor."""
    matching = (group for group in config.param_groups if fnmatch.fnmatchcase(name, group.match))
    return next(matching, None)


def metric_group(config: OptimizerConfig, spec: ParamSpec) -> str:
    """The tensor's group in metrics: the config's, or else of DEFAULT_GROUPS or its module."""
    group = group_of(config, spec.name)
    if group is not None and group.name:
        return group.name
    return DEFAULT_GROUPS.get(spec.use, "experts" if spec.is_per_expert else spec.module)


def check_groups(config: RunConfig, tensors: Collection[str]) -> None:
    """Raises ConfigError for a group without tensors, and for groups that freeze everything."""
    groups = [group_of(config.optimizer, name) for name in tensors]
    for group in config.optimizer.param_groups:
        if group not in groups:
            is_shadowed = any(fnmatch.fnmatchcase(name, group.match) for name in tensors)
            matches = "only what groups before it match" if is_shadowed else "no tensor"
            raise ConfigError(
                f"optimizer.param_groups has {group.match}, which matches {matches}; there are "
                f"{', '.join(tensors)}."
            )
    if not any(map(trainable(config), tensors)):
        raise ConfigError(
            "optimizer.param_groups freezes every tensor, and nothing is left to train; a pattern "
            "that leaves some, such as layers/moe/*, would work."
        )


def partition(model: Any, predicate: Callable[[str], bool]) -> tuple[Any, Any]:
    """Splits the model into tensors whose name satisfies `predicate` and the rest; else None."""
    selected = map_named(lambda name, leaf: leaf if predicate(name) else None, model)
    rest = map_named(lambda name, leaf: None if predicate(name) else leaf, model)
    return selected, rest


def combine(selected: Any, rest: Any) -> Any:
    """The inverse of `partition`: tensors from `selected` where it has them, else from `rest`."""
    is_none = functools.partial(operator.is_, None)
    return jax.tree.map(lambda x, y: y if x is None else x, selected, rest, is_leaf=is_none)


def map_named(f: Callable, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` with the tensor's name as the first argument of `f`."""
    return jax.tree.map_with_path(lambda path, *xs: f(name_of(path), *xs), tree, *rest)
