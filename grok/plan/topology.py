"""TPU slices by name, such as v5p:4x4x8: number of chips and wiring. It imports no JAX."""

import dataclasses
import math
import re

from grok.errors import ConfigError
from grok.hardware import CHIPS, Chip

EXAMPLES = {"v4": "4x4x4", "v5e": "16x16", "v5p": "4x4x8", "v6e": "16x16", "7x": "4x4x4"}
LARGEST = {2: 256, 3: 9216}  # chips of a slice, by dimensions of the grid


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice, or several equal ones that the data-centre network joins."""

    generation: str  # of CHIPS
    shape: tuple[int, ...]  # chips along each side
    count: int = 1  # of slices

    @property
    def name(self) -> str:
        """The name that users write."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """The specifications of its chips."""
        return CHIPS[self.generation]

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.count

    def is_ring(self, side: int) -> bool:
        """True if chips along this side are wired in a ring, not a line."""
        return self.shape[side] % self.chip.ring == 0

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.count} slices of {self.name}"


def parse_slice(name: str, count: int = 1) -> Slice:
    """The slice called `name`, such as v5p:4x4x8; ConfigError if there is none of that name."""
    generation, _, sides = name.lower().removeprefix("tpu").partition(":")
    if generation not in CHIPS:
        known = ", ".join(map(":".join, EXAMPLES.items()))
        raise ConfigError(f"topology {name} is of no generation known here; {known} are.")
    dimensions, example = CHIPS[generation].dimensions, f"{generation}:{EXAMPLES[generation]}"
    if not re.fullmatch(r"\d+(x\d+)*", sides) or sides.count("x") != dimensions - 1:
        why = f"since chips of {generation} are wired in {dimensions} dimensions"
        problem = f"topology {name} should have {dimensions} sides, {why}"
        raise ConfigError(f"{problem}; {example} would work.")
    shape = tuple(map(int, sides.split("x")))
    # A host has 2x2 chips along the first two sides.
    near = tuple(n if dim > 1 and n > 0 else max(2, n + n % 2) for dim, n in enumerate(shape))
    if math.prod(shape) != 1 and shape != near:
        problem = f"topology {name} cannot be wired from hosts of 2x2 chips"
        raise ConfigError(f"{problem}; {generation}:{'x'.join(map(str, near))} would work.")
    if math.prod(shape) > LARGEST[dimensions]:
        problem = f"topology {name} has {math.prod(shape)} chips, and a slice has"
        several = f"several slices, as in `--topology {example} --slices 2`, would work"
        raise ConfigError(f"{problem} {LARGEST[dimensions]} at most; {several}.")
    return Slice(generation, shape, count)


def grown(slice_: Slice) -> Slice | None:
    """The next larger slice, with its shortest side doubled; None if there is none, as of devices
    in no grid."""
    side = min(range(len(slice_.shape)), key=lambda dim: (slice_.shape[dim], -dim))
    shape = [*slice_.shape]
    shape[side] *= 2
    fits = math.prod(shape) <= LARGEST.get(slice_.chip.dimensions, 0)
    return Slice(slice_.generation, tuple(sorted(shape)), slice_.count) if fits else None
