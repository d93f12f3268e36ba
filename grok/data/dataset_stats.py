"""What a prepared dataset holds: counts, lengths, how well they pack, and some of its text.

N documents, S tokens of a document.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from grok.data.dataset import TokenDataset
from grok.data.packing import make_packer, packing_efficiency
from grok.data.prepare.manifest import TOKENIZER_FILE, verify_dataset
from grok.data.tokenizers import load_tokenizer

SAMPLE_TOKENS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Documents of `low` to `high` tokens, and the tokens that they have together."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentSample:
    """The beginning of a document; learnt: share of its tokens that bear loss."""

    document: int
    tokens: int
    learnt: float
    fields: dict[str, Any]
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """What `grok data inspect` shows.

    packing: share of places that hold a token, by form; cut_share: of tokens that "best_fit" leaves
    out; problems: a sentence for each file unlike the manifest, empty where it was not asked for.
    """

    hash: str
    manifest: dict[str, Any]
    histogram: list[LengthBin]
    length: int
    packing: dict[str, float]
    cut_share: float
    samples: list[DocumentSample]
    problems: list[str]


def compute_stats(
    folder: str | Path,
    length: int = 2048,
    samples: int = 2,
    tokenizer: str | None = None,
    checked: bool = False,
) -> DatasetStats:
    """Look at a prepared dataset; its own tokenizer decodes where no other is given.

    length: tokens of a row, for the packing; checked: read everything and compare with the
    manifest. Raises DataError where the folder is no prepared dataset.
    """
    problems = verify_dataset(folder) if checked else []
    data = TokenDataset(folder)
    layouts = {
        form: make_packer(form, data.lengths, length, "")
        for form in ("concat_then_split", "best_fit")
    }
    cut = np.maximum(data.lengths.astype(np.int64) - length - 1, 0).sum()
    return DatasetStats(
        hash=data.hash,
        manifest=data.manifest,
        histogram=length_histogram(data.lengths),
        length=length,
        packing={form: packing_efficiency(layout, length) for form, layout in layouts.items()},
        cut_share=float(cut / data.lengths.sum(dtype=np.int64)),
        # Documents of a damaged shard may be no documents.
        samples=[] if problems else _samples(data, samples, tokenizer),
        problems=problems,
    )


def length_histogram(lengths_N: np.ndarray) -> list[LengthBin]:
    """Documents by length, in bins that double: 1, 2 to 3, 4 to 7 tokens and so on."""
    exponents_N = np.frexp(lengths_N.astype(np.float64))[1] - 1
    first, last = int(exponents_N.min()), int(exponents_N.max())
    return [
        LengthBin(
            low=2**exponent,
            high=2 ** (exponent + 1) - 1,
            documents=int((exponents_N == exponent).sum()),
            tokens=int(lengths_N[exponents_N == exponent].sum(dtype=np.int64)),
        )
        for exponent in range(first, last + 1)
    ]


def _samples(data: TokenDataset, count: int, tokenizer: str | None) -> list[DocumentSample]:
    """Documents at even distances, from the first on."""
    pieces = load_tokenizer(tokenizer or data.folder / TOKENIZER_FILE)
    found = []
    for number in range(0, len(data), -(-len(data) // count)) if count else ():
        document = data[number]
        mask_S = document.mask_S
        found.append(
            DocumentSample(
                document=number,
                tokens=len(document.tokens_S),
                learnt=1.0 if mask_S is None else float(mask_S.mean()),
                fields=dict(document.fields),
                text=pieces.decode(document.tokens_S[:SAMPLE_TOKENS].tolist()),
            )
        )
    return found
