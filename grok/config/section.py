"""The base of config sections, with keys as `name: Annotated[TYPE, "meaning"] = default`; types of
numbers, and the nearest number that would work."""

import os
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from grok.errors import ConfigError

MAX_INTEGER = 2**31 - 1  # steps and indices are int32 on the devices
MAX_BYTES = 2**63 - 1
MAX_SEED = 2**32 - 1  # of which a key of random numbers is made
Count = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Bytes = Annotated[int, Field(gt=0, le=MAX_BYTES)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# Numbers that the devices hold in 32 bits.
MAX_FLOAT32, MAX_INT32 = 3e38, 10**9
PositiveFloat32 = Annotated[float, Field(gt=0, le=MAX_FLOAT32)]
PositiveOrZeroFloat32 = Annotated[float, Field(ge=0, le=MAX_FLOAT32)]
Float32 = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Count32 = Annotated[int, Field(gt=0, le=MAX_INT32)]
CountOrZero32 = Annotated[int, Field(ge=0, le=MAX_INT32)]


def expand_home(path: str) -> str:
    """The path with the home folder for a ~ that it begins with. Raises ConfigError where it
    names a user who is not there."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{path} is of no user's home; ./{path} would be a name here.")
    return expanded


PathText = Annotated[str, AfterValidator(expand_home)]


class Section:
    """Keys of a config, all below one name; a key that it does not declare is refused."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    @classmethod
    def default(cls, key: str) -> Any:
        """The default of a key."""
        return cls.__dict__["__dataclass_fields__"][key].default


def divisors(number: int) -> list[int]:
    """All divisors of `number`, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no more than `at_most`."""
    return max(d for d in divisors(number) if d <= at_most)


def round_up(number: int, factor: int) -> int:
    """The least multiple of `factor` that is no less than `number`."""
    return -(-number // factor) * factor
