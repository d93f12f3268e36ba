"""Pallas, imported when a kernel is first traced: CPUs need none, and a start would wait for it."""

import importlib
from typing import TYPE_CHECKING, Any


class _Deferred:
    """A module whose attributes import it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention, splash_attention
else:
    pl = _Deferred("jax.experimental.pallas")
    pltpu = _Deferred("jax.experimental.pallas.tpu")
    ragged_paged_attention = _Deferred("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    splash_attention = _Deferred("jax.experimental.pallas.ops.tpu.splash_attention")

__all__ = ["pl", "pltpu", "ragged_paged_attention", "splash_attention"]
