"""The loss of a model over a text."""

from collections.abc import Callable, Iterable

from jax.sharding import Mesh

from grok.data.batch_schedule import Batch
from grok.data.device_feed import shard_batch
from grok.data.stream_batches import bits_per_byte


def total_loss(
    jitted_eval_step: Callable, model, batches: Iterable[Batch], mesh: Mesh
) -> tuple[float, int]:
    """Sum of the cross-entropy of all tokens that count, in nats, and the number of them."""
    nats, num_tokens = 0.0, 0
    for batch in batches:
        nats += float(jitted_eval_step(model, shard_batch(batch, mesh)))
        num_tokens += int(batch["mask_BT"].sum(dtype="float64"))
    return nats, num_tokens


def validate(
    jitted_eval_step: Callable, model, batches: Iterable[Batch], num_bytes: int | None, mesh: Mesh
) -> dict[str, float]:
    """Loss of a validation pass in nats a token, and in bits per byte where the text's number of
    bytes is known."""
    nats, num_tokens = total_loss(jitted_eval_step, model, batches, mesh)
    losses = {"validation_loss": nats / num_tokens}
    if num_bytes is not None:
        losses["validation_bits_per_byte"] = bits_per_byte(nats, num_bytes)
    return losses
