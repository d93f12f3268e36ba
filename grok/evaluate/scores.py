"""Log-probabilities of continuations, in batches of few shapes.

Letters: B rows, T tokens, D embed, V vocab, c tokens of a chunk, n chunks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.data.device_feed import shard_batch
from grok.model.decoder import Decoder
from grok.train.loss import hidden

SHORTEST = 16
CHUNK = 512  # tokens of a row that have logits at a time


class Score(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities in nats, and whether each of
    them is the likeliest at its place."""

    log_probability: float
    greedy: bool


class Scorer:
    """A model on its mesh that scores continuations, `rows` at a time.

    Lengths are rounded up to powers of two, so that requests of all lengths share a few programs.
    """

    def __init__(self, model: Decoder, mesh: Mesh, rows: int):
        self._model, self._mesh, self._rows = model, mesh, rows
        self._scores = jax.jit(_scores)
        self.context_length = model.config.context_length

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """The scores of (context, continuation) pairs of token ids, in order.

        A context has a token at least. Of a pair with more than context_length + 1 tokens the
        first are left out.
        """
        sizes = [self._bucket(len(context) + len(after) - 1) for context, after in pairs]
        scores: list[Score | None] = [None] * len(pairs)
        for size in sorted(set(sizes), reverse=True):
            places = [place for place, own in enumerate(sizes) if own == size]
            for first in range(0, len(places), self._rows):
                some = places[first : first + self._rows]
                batch = self._batch([pairs[place] for place in some], size)
                with jax.set_mesh(self._mesh):
                    found = jax.device_get(
                        self._scores(self._model, shard_batch(batch, self._mesh))
                    )
                for place, log_p, greedy in zip(some, *found, strict=False):
                    scores[place] = Score(float(log_p), bool(greedy))
        return [score for score in scores if score is not None]

    def _bucket(self, length: int) -> int:
        return min(self.context_length, max(SHORTEST, 1 << (length - 1).bit_length()))

    def _batch(self, pairs, size: int) -> dict[str, np.ndarray]:
        """Rows of pairs, with padding behind each and rows of padding at the end."""
        shape = (self._rows, size)
        batch = {
            name: np.zeros(shape, np.int32)
            for name in ("tokens_BT", "targets_BT", "segment_ids_BT")
        }
        batch["mask_BT"] = np.zeros(shape, np.float32)
        for row, (context, continuation) in enumerate(pairs):
            tokens = np.array([*context, *continuation], np.int32)[-size - 1 :]
            length = len(tokens) - 1
            batch["tokens_BT"][row, :length] = tokens[:-1]
            batch["targets_BT"][row, :length] = tokens[1:]
            batch["segment_ids_BT"][row, :length] = 1
            batch["mask_BT"][row, max(0, length - len(continuation)) : length] = 1
        return batch


def _scores(model: Decoder, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Of each row, whole on every device: log-probability of what the mask selects (float32), and
    whether all of it is likeliest."""
    x_BTD, _ = hidden(model, batch)

    def one_chunk(x_BcD, targets_Bc):
        logits_BcV = model.unembed(x_BcD)
        is_target = jnp.arange(logits_BcV.shape[-1])[None, None, :] == targets_Bc[:, :, None]
        target_Bc = jnp.sum(jnp.where(is_target, logits_BcV, 0), axis=-1)
        log_z_Bc = jax.nn.logsumexp(logits_BcV, axis=-1)
        return target_Bc - log_z_Bc, target_Bc >= jnp.max(logits_BcV, axis=-1)

    B, T = batch["targets_BT"].shape
    chunks = T // CHUNK if T % CHUNK == 0 else 1

    def split(x):
        return jnp.moveaxis(x.reshape(B, chunks, T // chunks, *x.shape[2:]), 1, 0)

    found = jax.lax.map(lambda chunk: one_chunk(*chunk), (split(x_BTD), split(batch["targets_BT"])))
    log_p_BT, greedy_BT = (jnp.moveaxis(x_nBc, 0, 1).reshape(B, T) for x_nBc in found)
    counts_BT = batch["mask_BT"] > 0
    log_p_B = jnp.sum(jnp.where(counts_BT, log_p_BT, 0), axis=1)
    greedy_B = jnp.all(greedy_BT | ~counts_BT, axis=1)
    return sharding.constrain(log_p_B, None), sharding.constrain(greedy_B, None)
