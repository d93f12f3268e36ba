"""Each kernel against its reference, on the devices that are here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grok.calibrate import attention_checks, expert_checks
from grok.calibrate.check import FULL, SMALL, Check, Sizes

CHECKS = (*expert_checks.CHECKS, *attention_checks.CHECKS)
# Largest error as a share of the reference's largest value. Sums of some hundred products and a
# softmax in another order: some units of 2^-24; in bfloat16, three roundings to 8 bits in turn.
BOUNDS = {"float32": 5e-5, "bfloat16": 2**-6}


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """One kernel's comparison. `errors` are those of its results; without any, `problem` says
    why."""

    name: str
    mode: str  # compiled, or interpreted
    dtype: str
    bound: float
    errors: dict[str, float]
    problem: str = ""
    skipped: bool = False  # it cannot run here, which says nothing about it

    @property
    def is_wrong(self) -> bool:
        """True if a result is further from the reference's than rounding explains, or missing."""
        if self.skipped:
            return False
        # Not `any(error > bound)`: an error that is not a number is one too.
        return not (self.errors and all(error <= self.bound for error in self.errors.values()))

    def describe(self) -> str:
        """A line of text."""
        if not self.errors:
            return f"{self.name}: {self.problem}"
        worst = max(self.errors, key=lambda name: (np.isnan(self.errors[name]), self.errors[name]))
        error = f"{worst} is off by {self.errors[worst]:.2g} of its largest value"
        return f"{self.name}, {self.mode}: {error}, at most {self.bound:.2g} would be rounding"


def run_check(check: Check, platform: str) -> KernelResult:
    """Runs a kernel on this process's first device: compiled on a TPU, elsewhere Pallas kernels
    interpreted at small sizes."""
    compiled = platform == "tpu" or not check.is_pallas
    sizes = FULL if platform == "tpu" else SMALL
    bound = BOUNDS[sizes.dtype]
    mode = "compiled" if compiled else "interpreted"
    if not compiled and not check.can_interpret:
        problem = "not checked: it runs compiled for a TPU alone, no interpreter knows all of it"
        return KernelResult(check.name, mode, sizes.dtype, bound, {}, problem, skipped=True)
    try:
        errors, problem = compare(check, sizes, interpret=not compiled), ""
    except Exception as error:  # of any kind: the report names the kernel, and goes on
        lines = str(error).strip().splitlines() or [""]
        errors, problem = {}, f"{type(error).__name__}: {lines[0]}"
    return KernelResult(check.name, mode, sizes.dtype, bound, errors, problem)


def compare(check: Check, sizes: Sizes, interpret: bool) -> dict[str, float]:
    """The largest error of each result, as a share of the reference's largest value."""
    with jax.default_device(jax.local_devices()[0]):
        inputs = jax.jit(lambda: check.make_inputs(sizes))()
        results = jax.jit(lambda *inputs: check.kernel(*inputs, interpret=interpret))(*inputs)
        # A TPU rounds float32 operands to bfloat16, unless it is asked for more.
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(lambda *inputs: check.reference(*inputs))(*inputs)
    return {name: _error(results[name], expected[name]) for name in expected}


def _error(actual, expected) -> float:
    actual, expected = (np.asarray(jnp.asarray(x, jnp.float32)) for x in (actual, expected))
    # A NaN stays one.
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


def check_kernels(platform: str, on_check=lambda name: None) -> list[KernelResult]:
    """All kernels, in order; `on_check` is called with the name of each before it runs."""
    results = []
    for check in CHECKS:
        on_check(check.name)
        results.append(run_check(check, platform))
    return results
