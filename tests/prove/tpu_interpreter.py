"""Whole programs in the form that TPUs run, on simulated CPU devices: the platform is taken for a
TPU, and kernels are interpreted, with memory that holds NaN until it is written and a look-out
for races. Gaps of the interpreter of JAX 0.12.0.1 are bridged here.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import callback, config, effects
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import shared_memory
from jax._src.state.indexing import NDIndexer
from jax._src.state.types import BitcastTransform, ReshapeTransform
from jax.experimental.pallas import tpu as pltpu

from grok import hardware


@contextlib.contextmanager
def tpu_form() -> Iterator[set[str]]:
    """Gives what is traced and run inside the form that it has on TPUs. Yields the names of the
    kernels that ran so far."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    kernels: set[str] = set()
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            stack.enter_context(patch())
        stack.enter_context(_names_of_kernels(kernels))
        stack.enter_context(mock.patch.object(hardware, "platform", return_value="tpu"))
        stack.enter_context(pltpu.force_tpu_interpret_mode(params))
        jax.clear_caches()
        try:
            yield kernels
        finally:
            jax.clear_caches()
            pltpu.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def _callbacks_under_remat() -> Iterator[None]:
    """Remat and custom derivatives refuse the effects of the interpreter's callbacks."""
    kinds = effects.remat_allowed_effects, effects.custom_derivatives_allowed_effects
    before = [set(kind._effect_types) for kind in kinds]
    for kind in kinds:
        kind.add_type(callback.IOEffect)
        kind.add_type(callback.OrderedIOEffect)
    try:
        yield
    finally:
        for kind, types in zip(kinds, before, strict=True):
            kind._effect_types = types


def _semantics_of_vmapped_kernels():
    """A dimension that vmap adds to the grid has no semantics: it is sequential."""
    original = interpreter._get_parallel_dim_semantics

    def padded(mosaic_params, dimensions: int) -> tuple[bool, ...]:
        semantics = original(mosaic_params, dimensions)
        added = dimensions - len(semantics)
        # Parallel dimensions would have to come first.
        return semantics if added == 0 else (False,) * dimensions

    return mock.patch.object(interpreter, "_get_parallel_dim_semantics", padded)


def _no_types_of_devices():
    """Inside `shard_map` the interpreter's values have no types over the devices."""
    original = interpreter.interpret_pallas_call

    @functools.wraps(original)
    def unchecked(*args, **params):
        with config._check_vma(False):
            return original(*args, **params)

    return mock.patch.object(interpreter, "interpret_pallas_call", unchecked)


def _names_of_kernels(kernels: set[str]):
    """Adds the names of kernels as they are lowered."""
    original = interpreter.interpret_pallas_call

    @functools.wraps(original)
    def named(*args, name, **params):
        kernels.add(name)
        return original(*args, name=name, **params)

    return mock.patch.object(interpreter, "interpret_pallas_call", named)


def _reads_of_reshaped_refs():
    """A ref that was bitcast or reshaped is read whole, and transformed as a value."""
    original = interpreter.get

    def get(token, device, core, space, buffer, transforms, *args, **kwargs):
        plain = next(
            (i for i, t in enumerate(transforms) if not isinstance(t, NDIndexer)), len(transforms)
        )
        arguments = token, device, core, space, buffer, transforms[:plain]
        token, value = original(*arguments, *args, **kwargs)
        return token, functools.reduce(_transformed, transforms[plain:], value)

    get.__wrapped__ = original.__wrapped__  # what copies between memories use
    return mock.patch.object(interpreter, "get", get)


def _transformed(value: np.ndarray, transform: Any) -> np.ndarray:
    if isinstance(transform, ReshapeTransform):
        return value.reshape(transform.shape)
    if isinstance(transform, BitcastTransform):
        # Rows that share a 32-bit word lie one above the other, the first in the low bits.
        packing = np.dtype(transform.dtype).itemsize // value.dtype.itemsize
        rows = value.reshape(*value.shape[:-2], -1, packing, value.shape[-1])
        words = np.ascontiguousarray(np.moveaxis(rows, -2, -1))
        return words.view(transform.dtype)[..., 0]
    return value[interpreter.interpret_utils.to_range((jax.tree.map(int, transform),))]


def _masks_of_several_dimensions():
    """A store whose mask has several dimensions takes only the first for what lies outside."""
    original = shared_memory.SharedMemory.swap_buffer_content

    def swap(self, key, rnge, value, mask, *args, **kwargs):
        if mask is None:
            return original(self, key, rnge, value, mask, *args, **kwargs)
        with self.lock:
            inside = self.mem[key][rnge]
            assert inside.shape == value.shape
            merged = np.where(mask, value, inside)
        return original(self, key, rnge, merged, None, *args, **kwargs)

    return mock.patch.object(shared_memory.SharedMemory, "swap_buffer_content", swap)


def _memory_kinds_beside_tokens():
    """Results in host memory are counted without the tokens of ordered callbacks before them."""
    original = mlir.lower_jaxpr_to_fun

    @functools.wraps(original)
    def lower(ctx, name, jaxpr, effects, *args, propagated_out_mem_kinds=None, **options):
        if propagated_out_mem_kinds is not None:
            propagated_out_mem_kinds = (*[None] * len(effects), *propagated_out_mem_kinds)
            options["propagated_out_mem_kinds"] = propagated_out_mem_kinds
        return original(ctx, name, jaxpr, effects, *args, **options)

    return mock.patch.object(mlir, "lower_jaxpr_to_fun", lower)


PATCHES = (
    _callbacks_under_remat,
    _semantics_of_vmapped_kernels,
    _no_types_of_devices,
    _reads_of_reshaped_refs,
    _masks_of_several_dimensions,
    _memory_kinds_beside_tokens,
)
