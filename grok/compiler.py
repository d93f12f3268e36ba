"""Options of the TPU compiler, for each generation, and `jax.jit` with them: training, evaluation,
the engine and `grok plan` compile their steps through it, so a plan is of the program that runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from grok import hardware

# Collectives run on the SparseCore, beside what the TensorCore computes; without these options no
# collective of a training step is asynchronous (libtpu 0.0.50.1).
_ON_SPARSECORE = {
    **dict.fromkeys(
        (
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
            "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter",
            "xla_sc_enable_instruction_fusion",
        ),
        False,
    ),
    **dict.fromkeys(
        (
            "xla_tpu_enable_sparse_core_collective_offload_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
            "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
            "xla_tpu_enable_all_gather_offload_tracing",
            "xla_tpu_enable_all_reduce_offload_tracing",
            "xla_tpu_enable_reduce_scatter_offload_tracing",
            "xla_tpu_use_tc_device_shape_on_sc",
            "xla_sc_disable_megacore_partitioning",
        ),
        True,
    ),
}

# v5e fuses collectives with products by default.
OPTIONS: dict[str, dict[str, bool]] = {
    "v5p": _ON_SPARSECORE,
    "v6e": _ON_SPARSECORE,
    "7x": _ON_SPARSECORE,
}


class _Jitted:
    """A function that is compiled for the devices that are ambient when it is called."""

    def __init__(self, function: Callable, **arguments: Any):
        functools.update_wrapper(self, function)
        self._function, self._arguments = function, arguments
        self._by_kind: dict[str, Any] = {}

    def _jitted(self) -> Any:
        kind = hardware.device_kind()
        if kind not in self._by_kind:
            options = compiler_options(kind)
            self._by_kind[kind] = jax.jit(
                self._function, compiler_options=options, **self._arguments
            )
        return self._by_kind[kind]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted()(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The function lowered for these arguments, as `jax.jit` lowers it."""
        return self._jitted().lower(*args, **kwargs)


def jit(function: Callable, **arguments: Any) -> _Jitted:
    """`jax.jit(function, **arguments)` with the options of the devices that it is compiled for."""
    return _Jitted(function, **arguments)


def compiler_options(device_kind: str) -> dict[str, Any] | None:
    """The options for devices of this kind; None, for the compiler's defaults, where there are
    none."""
    return OPTIONS.get(hardware.generation_of(device_kind) or "")
