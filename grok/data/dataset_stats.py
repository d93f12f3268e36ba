"""Statistics of a token dataset: counts, lengths, packing efficiency, and samples of its text.
N documents, S tokens of a document."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from grok.data.dataset import TokenDataset
from grok.data.packing import PACKERS, packing_efficiency
from grok.data.prepare.shards import verify_dataset
from grok.data.tokenizers import load_tokenizer

SAMPLE_TOKENS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """Output of `grok data inspect`."""

    hash: str
    manifest: dict[str, Any]
    histogram: list[dict[str, int]]
    sequence_length: int
    efficiency: dict[str, float]  # share of positions that hold a token, by packing
    truncated_share: float  # of the tokens, which best_fit leaves out
    samples: list[dict[str, Any]]
    problems: list[str]  # of files that differ from the manifest; empty where not compared


def compute_stats(
    folder: str | Path, sequence_length: int, samples: int, tokenizer: str | None, verify: bool
) -> DatasetStats:
    """Statistics of the dataset in `folder`, with text of so many samples. The dataset's own
    tokenizer decodes them where no other is given; `verify` reads all files and compares them with
    the manifest. DataError where the folder is no dataset."""
    problems = verify_dataset(folder) if verify else []
    data = TokenDataset(folder)
    packers = {name: make(data.lengths, sequence_length, "") for name, make in PACKERS.items()}
    truncated_N = np.maximum(data.lengths.astype(np.int64) - sequence_length - 1, 0)
    return DatasetStats(
        hash=data.hash,
        manifest=data.manifest,
        histogram=length_histogram(data.lengths),
        sequence_length=sequence_length,
        efficiency={
            name: packing_efficiency(packer, sequence_length) for name, packer in packers.items()
        },
        truncated_share=float(truncated_N.sum() / data.lengths.sum(dtype=np.int64)),
        # Documents of a damaged shard may not be readable.
        samples=[] if problems else _samples(data, samples, tokenizer),
        problems=problems,
    )


def length_histogram(lengths_N: np.ndarray) -> list[dict[str, int]]:
    """Documents of `low` to `high` tokens and the sum of their tokens, in bins that double."""
    exponents_N = np.frexp(lengths_N.astype(np.float64))[1] - 1
    bins = []
    for exponent in range(int(exponents_N.min()), int(exponents_N.max()) + 1):
        tokens_N = lengths_N[exponents_N == exponent]
        low, tokens = 2**exponent, int(tokens_N.sum(dtype=np.int64))
        bins.append({"low": low, "high": 2 * low - 1, "documents": len(tokens_N), "tokens": tokens})
    return bins


def _samples(data: TokenDataset, count: int, tokenizer_file: str | None) -> list[dict[str, Any]]:
    """Beginnings of documents at even distances; loss_share: of its tokens, which bear loss."""
    tokenizer = load_tokenizer(tokenizer_file or str(data.folder))
    numbers = range(0, len(data), -(-len(data) // count)) if count else ()
    return [
        {
            "document": number,
            "tokens": len(document.tokens_S),
            "loss_share": 1.0 if document.mask_S is None else float(document.mask_S.mean()),
            "metadata": dict(document.metadata),
            "text": tokenizer.decode(document.tokens_S[:SAMPLE_TOKENS].tolist()),
        }
        for number, document in zip(numbers, map(data.__getitem__, numbers), strict=True)
    ]
