"""A kernel's check: inputs, the kernel, and the reference that it must equal."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Sizes(NamedTuple):
    """Sizes of a check's arrays."""

    dtype: str
    rows: int
    embed: int
    mlp: int
    experts: int
    tile: int  # rows of a tile of the grouped products
    length: int  # tokens of a row of attention
    page_size: int
    pages: int  # of the longest sequence
    prompt: int  # new tokens of a sequence, where they are a prompt's


SMALL = Sizes("float32", 48, 64, 96, 4, 16, 256, 32, 4, 40)  # seconds in an interpreter
FULL = Sizes("bfloat16", 4096, 2048, 4096, 8, 128, 4096, 64, 32, 512)


class Check(NamedTuple):
    """A kernel and its reference, both of the same inputs; results are compared by name."""

    name: str
    make_inputs: Callable[[Sizes], tuple]
    kernel: Callable[..., dict[str, jax.Array]]  # takes `interpret` too
    reference: Callable[..., dict[str, jax.Array]]
    is_pallas: bool = True  # False: plain XLA, which needs no interpreter
    can_interpret: bool = True


def normal(sizes: Sizes, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Random arrays of these shapes."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, sizes.dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def with_terms(name: str, inputs, kernel, reference, **terms: Any) -> Check:
    """A check whose kernel and reference take these keywords."""
    run, expected = (functools.partial(f, **terms) for f in (kernel, reference))
    return Check(name, inputs, run, expected)
