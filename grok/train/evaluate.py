"""The loss of a model over a whole text."""

from collections.abc import Callable, Iterable

from jax.sharding import Mesh

from grok.data.batch_schedule import Batch
from grok.data.device_feed import shard_batch


def total_loss(
    eval_function: Callable, model, batches: Iterable[Batch], mesh: Mesh
) -> tuple[float, int]:
    """Cross-entropy of all tokens that count, summed, in nats, and how many these are.

    `eval_function` is `eval_step`, compiled.
    """
    nats, num_tokens = 0.0, 0
    for batch in batches:
        nats += float(eval_function(model, shard_batch(batch, mesh)))
        num_tokens += int(batch["mask_BT"].sum(dtype="float64"))
    return nats, num_tokens
