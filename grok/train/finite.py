"""The last look at a state before it is saved: an update can spoil parameters whose gradient was
finite, and no later step is there to tell, or it would start from what was saved."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from grok import distributed
from grok.checkpoint.tree_names import leaves_by_name
from grok.errors import Diverged
from grok.optim.offload import is_on_host
from grok.train.bad_steps import MAX_NAMES

NO_LOSSES: Mapping[str, float] = {}
ADVICE = (
    "an older checkpoint with a lower optimizer.peak_lr, or train.rollback_on_divergence=true, "
    "may get past them."
)


def raise_if_not_finite(
    step: int, last_good: int, state: Any, losses: Mapping[str, float] = NO_LOSSES
) -> None:
    """Raises Diverged where parameters, averages or moments after `step` are not finite, or one of
    the `losses`. All steps since `last_good` were bad. Moments in the memory of the hosts are not
    looked at. A collective."""
    trees = {"model": state.model, "ema": state.ema, "optimizer": state.opt_state}
    leaves = {
        name: leaf
        for name, leaf in leaves_by_name(trees).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not is_on_host(leaf)
    }
    if distributed.process_count() > 1:
        distributed.compile_in_lockstep(_are_finite, leaves)
    finite = jax.device_get(_are_finite(leaves))
    finite |= {name: math.isfinite(loss) for name, loss in losses.items()}
    spoiled = [name for name, is_finite in finite.items() if not is_finite]
    if not spoiled:
        return
    more = f" and {len(spoiled) - MAX_NAMES} more" if len(spoiled) > MAX_NAMES else ""
    raise Diverged(
        f"after step {step} these are not finite, and it is not saved: "
        f"{', '.join(spoiled[:MAX_NAMES])}{more}; {ADVICE}",
        first=last_good,
        last=step,
    )


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """True, a scalar, for each array in which all values are finite."""
    return {name: jnp.all(jnp.isfinite(leaf)) for name, leaf in leaves.items()}
