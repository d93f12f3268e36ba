"""Bits per UTF-8 byte of held-out text under simple models, smoothing tuned on training text; every
token is predicted, also the eos of each document. V vocabulary, S tokens of a stream."""

import gzip
from collections.abc import Callable, Sequence

import numpy as np

from grok.data.stream_batches import TokenStream, bits_per_byte

ADDED_COUNTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DISCOUNTS = tuple(np.arange(0.05, 1.0, 0.05))


def unigram_bits_per_byte(train: TokenStream, heldout: TokenStream, vocab_size: int) -> float:
    """Bits per byte of `heldout` under token frequencies of `train`, smoothed by added counts."""

    def nats(train_S: np.ndarray, heldout_S: np.ndarray, added: float) -> float:
        return _unigram_nats(train_S, heldout_S, vocab_size, added)

    return _tuned_bits_per_byte(nats, train, heldout, ADDED_COUNTS)


def bigram_bits_per_byte(train: TokenStream, heldout: TokenStream, vocab_size: int) -> float:
    """Bits per byte of `heldout` under pairs of tokens in `train`: interpolated Kneser-Ney. Chen
    and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section
    2.7, with one discount; the lower order is interpolated with the uniform distribution."""

    def nats(train_S: np.ndarray, heldout_S: np.ndarray, discount: float) -> float:
        return _bigram_nats(train_S, heldout_S, vocab_size, train.eos_id, discount)

    return _tuned_bits_per_byte(nats, train, heldout, DISCOUNTS)


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `text` alone under `gzip -9`, header included."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def _tuned_bits_per_byte(
    nats: Callable, train: TokenStream, heldout: TokenStream, constants: Sequence[float]
) -> float:
    """Bits per byte with the constant that is best for the last tenth of the training tokens."""
    cut = len(train.tokens_S) - max(1, int(0.1 * len(train.tokens_S)))
    losses = [nats(train.tokens_S[:cut], train.tokens_S[cut:], c) for c in constants]
    best = constants[int(np.argmin(losses))]
    return bits_per_byte(nats(train.tokens_S, heldout.tokens_S, best), heldout.num_bytes)


def _unigram_nats(train_S: np.ndarray, heldout_S: np.ndarray, vocab_size: int, added: float):
    counts_V = np.bincount(train_S, minlength=vocab_size) + added
    return float(-np.log(counts_V[heldout_S] / counts_V.sum()).sum())


def _bigram_nats(
    train_S: np.ndarray, heldout_S: np.ndarray, vocab_size: int, eos_id: int, discount: float
) -> float:
    """Summed loss under interpolated Kneser-Ney; both streams are led by an eos. P(w|v) = max(c(vw)
    - d, 0) / c(v) + d * N(v.) / c(v) * P(w), where N(v.) is the number of different tokens after v,
    and P(w) comes from N(.w), discounted alike over 1/V."""
    pairs, pair_counts = np.unique(_pairs(train_S, vocab_size, eos_id), return_counts=True)
    before, after = np.divmod(pairs, vocab_size)
    count_V = np.bincount(before, weights=pair_counts, minlength=vocab_size)
    kinds_after_V = np.bincount(before, minlength=vocab_size)
    kinds_before_V = np.bincount(after, minlength=vocab_size)

    uniform = discount * np.count_nonzero(kinds_before_V) / len(pairs) / vocab_size
    lower_V = np.maximum(kinds_before_V - discount, 0) / len(pairs) + uniform

    heldout_pairs_S = _pairs(heldout_S, vocab_size, eos_id)
    index_S = np.searchsorted(pairs, heldout_pairs_S).clip(max=len(pairs) - 1)
    seen_S = np.where(pairs[index_S] == heldout_pairs_S, pair_counts[index_S], 0)
    v_S, w_S = np.divmod(heldout_pairs_S, vocab_size)
    context_S = np.maximum(count_V[v_S], 1)
    # After a token that training lacks, only the lower order is left.
    back_off_S = np.where(count_V[v_S] > 0, discount * kinds_after_V[v_S] / context_S, 1)
    p_S = np.maximum(seen_S - discount, 0) / context_S + back_off_S * lower_V[w_S]
    return float(-np.log(p_S).sum())


def _pairs(tokens_S: np.ndarray, vocab_size: int, eos_id: int) -> np.ndarray:
    """Each token with the one before it, as one number: v * V + w."""
    before_S = np.concatenate([[eos_id], tokens_S[:-1]]).astype(np.int64)
    return before_S * vocab_size + tokens_S
