"""YAML 1.2 text (`no` is text, 1e-4 a number) -> plain data that remembers where each key was set.
Tags, anchors and duplicate keys are refused, so no file can run code, blow up in memory, or say two
things at once."""

from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from grok.errors import ConfigError

Key = tuple[str, ...]
Locations = dict[Key, str]  # where keys were set: `run.yaml:7`, "override `train.steps=50`"

# Of an integer; larger ones are no floats either, and the largest could not be printed.
MOST_BITS = 1023
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


def parse_yaml(
    text: str, location_of: Callable[[int], str], locations: Locations, key: Key = ()
) -> Any:
    """The data of YAML text whose root is the key `key`, None if it holds nothing; ConfigError for
    what is not plain data. `location_of` words the location of a line, counted from 1; that of each
    key is added to `locations`."""
    yaml = YAML(typ="safe", pure=True, plug_ins=[])
    locations[key] = location_of(1)
    try:
        root = yaml.compose(text)
        return None if root is None else _Reader(yaml, location_of, locations).data(root, key)
    except RecursionError:
        raise ConfigError(f"{location_of(1)}: the YAML is nested too deeply.") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable text")
        location = location_of(mark.line + 1 if mark else 1)
        raise ConfigError(f"{location}: not valid YAML: {problem}.") from None


class _Reader:
    """Turns composed nodes into data, noting locations on the way."""

    def __init__(self, yaml: YAML, location_of: Callable[[int], str], locations: Locations) -> None:
        self.yaml, self.location_of, self.locations = yaml, location_of, locations

    def data(self, node: Node, key: Key) -> Any:
        location = self._location(node)
        tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if node.anchor:
            problem = f"{location}: the anchor &{node.anchor} is not allowed"
            raise ConfigError(f"{problem}; write it out.")
        if tag == "value" or (tag == "timestamp" and "-" in node.value[:5]):
            return node.value  # `=` and dates, which no key takes, are text
        if tag not in _PLAIN:
            raise ConfigError(f"{location}: the tag {tag} is not allowed; write a plain value.")
        if isinstance(node, MappingNode):
            return self._mapping(node, key)
        if isinstance(node, SequenceNode):
            items = [(item, (*key, str(index))) for index, item in enumerate(node.value)]
            self.locations.update({inner: self._location(item) for item, inner in items})
            return [self.data(item, inner) for item, inner in items]
        try:
            value = self.yaml.constructor.construct_object(node)
        except ValueError:  # such as an integer too long to read
            raise ConfigError(f"{location}: {node.value[:20]}... cannot be read.") from None
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ConfigError(f"{location}: {node.value[:20]}... is larger than any number here.")
        return value

    def _mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name, value in node.value:
            if not isinstance(name.value, str):
                raise ConfigError(f"{self._location(name)}: a key must be a name, such as train.")
            inner = (*key, name.value)
            if name.value in data:
                problem = f"{self._location(name)}: {'.'.join(inner)} is set a second time"
                raise ConfigError(f"{problem}, after {self.locations[inner]}; keep one of them.")
            self.locations[inner] = self._location(name)
            data[name.value] = self.data(value, inner)
        return data

    def _location(self, node: Node) -> str:
        return self.location_of(node.start_mark.line + 1)
