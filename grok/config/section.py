"""The base of config sections; a key is `name: Annotated[TYPE, "meaning"] = default`."""

from typing import Any, ClassVar

from pydantic import ConfigDict


class Section:
    """Keys of a config, all below one name; a key that it does not declare is refused."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    @classmethod
    def default(cls, key: str) -> Any:
        """The default of a key."""
        return cls.__dict__["__dataclass_fields__"][key].default
