"""Log-probabilities of continuations. B rows, T tokens, D embed, V vocab, n chunks of c tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok import compiler, sharding
from grok.data.device_feed import shard_batch
from grok.model.decoder import Decoder
from grok.ops.cross_entropy import target_and_log_z
from grok.train.loss import hidden

CHUNK_TOKENS = 512  # tokens of a row that have logits at a time


class Score(NamedTuple):
    """A continuation's log-probability in nats; is_greedy: its tokens are all the likeliest."""

    log_probability: float
    is_greedy: bool


class Scorer:
    """Scores continuations under `model`, which may be exchanged for another of the same form, on
    its mesh, `rows` at a time. Lengths are rounded up to powers of two, so that requests of all
    lengths share a few programs."""

    def __init__(self, model: Decoder, mesh: Mesh, rows: int):
        self.model, self._mesh, self.rows = model, mesh, rows
        self._score_rows = compiler.jit(_score_rows)
        self.context_length = model.config.context_length

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Scores of (context, continuation) pairs of token ids, in order. A context has at least
        one token. A pair of more than context_length + 1 tokens loses its first ones."""
        buckets: dict[int, list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            size = 1 << (len(context) + len(continuation) - 2).bit_length()
            size = min(self.context_length, max(16, size))
            buckets.setdefault(size, []).append(index)
        scores: dict[int, Score] = {}
        for size in sorted(buckets, reverse=True):
            for first in range(0, len(buckets[size]), self.rows):
                indices = buckets[size][first : first + self.rows]
                batch = self._batch([pairs[index] for index in indices], size)
                with jax.set_mesh(self._mesh):
                    scored = self._score_rows(self.model, shard_batch(batch, self._mesh))
                for index, log_p, is_greedy in zip(indices, *jax.device_get(scored), strict=False):
                    scores[index] = Score(float(log_p), bool(is_greedy))
        return [scores[index] for index in range(len(pairs))]

    def _batch(self, pairs, size: int) -> dict[str, np.ndarray]:
        """Rows of pairs, with padding behind each and rows of padding at the end."""
        names = ("tokens_BT", "targets_BT", "segment_ids_BT")
        batch: dict = {name: np.zeros((self.rows, size), np.int32) for name in names}
        batch["mask_BT"] = np.zeros((self.rows, size), np.float32)
        for row, (context, continuation) in enumerate(pairs):
            tokens = np.array([*context, *continuation], np.int32)[-size - 1 :]
            length = len(tokens) - 1
            batch["tokens_BT"][row, :length] = tokens[:-1]
            batch["targets_BT"][row, :length] = tokens[1:]
            batch["segment_ids_BT"][row, :length] = 1
            batch["mask_BT"][row, max(0, length - len(continuation)) : length] = 1
        return batch


def _score_rows(model: Decoder, batch: dict) -> tuple[jax.Array, jax.Array]:
    """(B,), replicated: log-probability of each row under the mask, and True where it is greedy."""
    x_BTD, _ = hidden(model, batch)

    def one_chunk(chunk):
        x_BcD, targets_Bc = chunk
        logits_BcV = model.unembed(x_BcD)
        target_Bc, log_z_Bc = target_and_log_z(logits_BcV, targets_Bc)
        return target_Bc - log_z_Bc, target_Bc >= jnp.max(logits_BcV, axis=-1)

    B, T = batch["targets_BT"].shape
    chunks = T // CHUNK_TOKENS if T % CHUNK_TOKENS == 0 else 1

    def split(x):
        return jnp.moveaxis(x.reshape(B, chunks, T // chunks, *x.shape[2:]), 1, 0)

    results = jax.lax.map(one_chunk, (split(x_BTD), split(batch["targets_BT"])))
    log_p_BT, greedy_BT = (jnp.moveaxis(x_nBc, 0, 1).reshape(B, T) for x_nBc in results)
    counts_BT = batch["mask_BT"] > 0
    log_p_B = jnp.sum(jnp.where(counts_BT, log_p_BT, 0), axis=1)
    greedy_B = jnp.all(greedy_BT | ~counts_BT, axis=1)
    return sharding.constrain(log_p_B, None), sharding.constrain(greedy_B, None)
